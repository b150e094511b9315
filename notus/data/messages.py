"""The messages of a conversation and its tools, read from a row and checked.

A message is {"role", "content"} as text. Every other key (`tool_calls`, `reasoning_content`, ...)
is kept for the chat template, which has to write what the key holds (template.py).
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from notus.curation.rows import Row, kind_of, read_text, reject_column
from notus.errors import UserError

Message = dict[str, Any]

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
TOOL_ROLES = ("tool", "ipython")  # whose messages are results of tools; Llama 3 says ipython
ROLES = {"system": SYSTEM, "user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT}
ROLES |= {role: role for role in TOOL_ROLES}
MESSAGE_KEYS = ("role", "content")
SHAREGPT_KEYS = ("from", "value")


def holds(value: Any) -> bool:
    """Whether a value says anything: null, "", [] and {} do not."""
    return value is not None and value != "" and value != [] and value != {}


def read_message(
    row: Row, column: str, where: str, keys: tuple[str, str] = MESSAGE_KEYS
) -> Message:
    """The message in `row[column]`, whose role and content are under `keys`, or under ShareGPT's.

    Raises UserError that names `where`, the column and the key.
    """
    message = row.get(column)
    if not isinstance(message, dict):
        reject_column(row, column, where, f"a message with {keys[0]} and {keys[1]}")
    keys = SHAREGPT_KEYS if SHAREGPT_KEYS[0] in message and keys[0] not in message else keys
    place = f"{where}, {column}"
    role = read_text(message, keys[0], place)
    if role not in ROLES:
        raise UserError(f'{where}: "{column}" has the role "{role}"; known are {", ".join(ROLES)}')
    others = {k: v for k, v in message.items() if k not in keys and v is not None}
    if "tool_calls" in others:
        others["tool_calls"] = _read_calls(others, place)
    if isinstance(message.get(keys[1]), list):
        content = _join_parts(message[keys[1]], keys[1], place)
    elif message.get(keys[1]) is None and holds(others.get("tool_calls")):
        content = ""
    else:
        content = read_text(message, keys[1], place)
    return {"role": ROLES[role], "content": content, **others}


def read_messages(
    row: Row, column: str, where: str, keys: tuple[str, str] = MESSAGE_KEYS
) -> list[Message]:
    """The messages in `row[column]`; raises UserError that names `where`, column and index."""
    messages = row.get(column)
    if not isinstance(messages, list):
        reject_column(row, column, where, "a list of messages")
    numbered = {f"{column}[{index}]": message for index, message in enumerate(messages)}
    return [read_message(numbered, name, where, keys) for name in numbered]


def _join_parts(parts: Sequence[Any], key: str, place: str) -> str:
    """A content given as parts of text, as one text."""
    texts = []
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            found = f"of the type {json.dumps(kind)}" if kind else f"that is {kind_of(part)}"
            raise UserError(
                f'{place}: "{key}" holds a part {found} (number {index + 1}); expected text, or '
                'parts {"type": "text", "text": ...}'
            )
        texts.append(read_text(part, "text", f"{place}, {key}[{index}]"))
    return "".join(texts)


def _read_calls(message: Message, place: str) -> list[Any]:
    """The tool calls of a message, with arguments that are JSON text read as objects.

    OpenAI's rows hold text there; chat templates write objects, and text with a second pair of
    quotes.
    """
    calls = message["tool_calls"]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        reject_column(message, "tool_calls", place, "a list of objects")
    return [_read_call(call) for call in calls]


def _read_call(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _read_call(call["function"])}
    with suppress(ValueError, TypeError):
        arguments = json.loads(call["arguments"]) if "arguments" in call else None
        if isinstance(arguments, dict):
            return {**call, "arguments": arguments}
    return call


def read_tools(row: Row, where: str) -> list[dict[str, Any]]:
    """The column `tools`, a list of objects or its JSON text; [] if it holds nothing."""
    tools = _from_json(row, "tools", where) or []
    if isinstance(tools, list):
        tools = [_from_json({"tools": tool}, "tools", where) for tool in tools]
        if all(isinstance(tool, dict) for tool in tools):
            return tools
    reject_column(row, "tools", where, "a list of objects, or its JSON text")


def read_template_options(row: Row, where: str) -> dict[str, Any]:
    """The column `chat_template_kwargs`, an object or its JSON text; {} if it holds nothing."""
    options = _from_json(row, "chat_template_kwargs", where) or {}
    if not isinstance(options, dict):
        reject_column(row, "chat_template_kwargs", where, "an object, or its JSON text")
    return options


def _from_json(row: Row, column: str, where: str) -> Any:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        reject_column(row, column, where, "a list or an object, or its JSON text")


def answered(messages: list[Message], column: str, where: str) -> list[Message]:
    """The messages of `column`; raises UserError unless the last one is of the assistant."""
    if not messages or messages[-1]["role"] != ASSISTANT:
        found = f"a message of the {messages[-1]['role']}" if messages else "no message"
        raise UserError(f'{where}: "{column}" ends with {found}; expected one of the assistant')
    return messages


def with_system(messages: list[Message], system: str, where: str) -> list[Message]:
    """The conversation after the system turn `system`; raises UserError if it has another one."""
    if not messages or messages[0]["role"] != SYSTEM:
        return [{"role": SYSTEM, "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise UserError(
            f"{where}: the column of the system turn differs from the conversation's own; expected "
            'one system turn, or "ignore": ["system"] in the source'
        )
    return messages


# ----------------------------------------------------------------------------- dialogues as text


def hh_turns(row: Row, column: str, where: str) -> list[Message]:
    """The turns of a text with "Human:" and "Assistant:" after empty lines."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", read_text(row, column, where))
    if before.strip() or not parts:
        raise UserError(
            f'{where}: "{column}" starts with {row[column][:40]!r}; expected "\\n\\nHuman:"'
        )
    return [
        {"role": USER if name == "Human" else ASSISTANT, "content": content.strip()}
        for name, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def helpsteer_turns(row: Row, column: str, where: str) -> str | list[Message]:
    """HelpSteer2's prompt: text, in which "<extra_id_1>" and a name begin each later turn."""
    first, *parts = re.split(r"\n*<extra_id_1>(User|Assistant)\n", read_text(row, column, where))
    if not parts:
        return first
    turns = zip(["User", *parts[::2]], [first, *parts[1::2]], strict=True)
    return [
        {"role": USER if name == "User" else ASSISTANT, "content": content}
        for name, content in turns
    ]
