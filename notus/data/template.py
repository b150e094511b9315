"""The chat template: conversations become text, and nothing that a row holds is lost on the way."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerFast

from notus.data.messages import SYSTEM, TOOL_ROLES, Message, holds
from notus.errors import UserError
from notus.limits import time_limit

TEMPLATE_SECONDS = 10.0  # of computing, for one conversation
# Keys of a tool's result that only say which call it answers; many templates do without.
LINKS = ("name", "tool_call_id")


def with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """The conversation, with `system_prompt`, if given, as its system turn if it has none."""
    if system_prompt is None or messages[0]["role"] == SYSTEM:
        return messages
    return [{"role": SYSTEM, "content": system_prompt}, *messages]


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    where: str,
    *,
    opens_answer: bool,
    tools: Sequence[dict[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
) -> str:
    """The conversation as the chat template writes it; raises UserError that names `where`.

    opens_answer: whether the text ends with the beginning of the assistant's next turn. options:
    further variables of the template.
    """
    try:
        with time_limit(TEMPLATE_SECONDS):
            text = tokenizer.apply_chat_template(
                messages,
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=opens_answer,
                **options or {},
            )
        text.encode()  # UnicodeEncodeError for half a surrogate pair
    # A template may refuse roles or their order, or compute anything that the values do not allow.
    except Exception as error:
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise UserError(f"{where}: the chat template refuses this conversation: {reason}") from None
    return text


def check_written(
    tokenizer: PreTrainedTokenizerFast,
    messages: list[Message],
    where: str,
    *,
    start: int = 0,
    tools: Sequence[dict[str, Any]] = (),
    options: Mapping[str, Any] | None = None,
) -> None:
    """Raise UserError if the template drops something of a conversation that it renders.

    The conversation is rendered with and without each thing that a template may not know, and both
    texts are compared: tools, system turns, results of tools, and every key of a message except
    role and content. Where later messages make a template leave an earlier key out (the reasoning
    of earlier turns), it is enough that the conversation up to that message shows the key. Options
    have to be named in the template, since their values may be the template's own defaults.

    start: the first message to look at.
    """
    template = tokenizer.get_chat_template(tools=list(tools) or None)
    for name in options or ():
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UserError(
                f'{where}: "chat_template_kwargs" has "{name}", which is no variable of the chat '
                'template; expected one of those, or "ignore": ["chat_template_kwargs"] in the '
                "source"
            )

    def text_of(messages: list[Message], tools: Sequence[dict[str, Any]] = tools) -> str | None:
        with suppress(UserError):
            return render(
                tokenizer, messages, where, opens_answer=False, tools=tools, options=options
            )

    def is_lost(index: int, changed: Message) -> bool:
        """Whether the message at `index` gives the same text as `changed` in its place."""
        after = messages[index + 1 :]
        for rest in ([], after) if after else ([],):
            before = text_of([*messages[: index + 1], *rest])
            if before is not None and before != text_of([*messages[:index], changed, *rest]):
                return False
        return True

    if tools and start == 0 and text_of(messages) == text_of(messages, ()):
        raise UserError(f"{where}: {_lost('tools')}")
    for index, message in enumerate(messages[start:], start):
        role = message["role"]
        # Counted by role, so that a system turn from the configuration or a column does not matter.
        number = [one["role"] for one in messages[: index + 1]].count(role)
        place = f'message {number} of the role "{role}"'
        for key in message.keys() - {"role", "content"}:
            is_link = role in TOOL_ROLES and key in LINKS
            without = {name: value for name, value in message.items() if name != key}
            if holds(message[key]) and not is_link and is_lost(index, without):
                raise UserError(f"{where}, {place}: {_lost(key)}")
        if role in (SYSTEM, *TOOL_ROLES) and message["content"].strip():
            if is_lost(index, {**message, "content": ""}):
                raise UserError(
                    f"{where}, {place}: the chat template leaves it out; expected a template that "
                    "writes messages of this role (a system turn may be from data.system_prompt; "
                    'a column "system" can be ignored by "ignore": ["system"] in the source)'
                )


def _lost(key: str) -> str:
    return (
        f'the chat template leaves "{key}" out; expected a template that writes it, or "ignore": '
        f'["{key}"] in the source'
    )
