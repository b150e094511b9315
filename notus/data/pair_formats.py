"""Rows that hold a chosen and a rejected response, in the published schemas, become pairs.

A converter takes a row and its origin; it returns a list of one pair, or the reason for none.
"""

from math import isfinite
from os.path import commonprefix
from typing import Any

from notus.curation.decontamination import Dropped
from notus.curation.rows import Row, as_number, read_text, reject_column
from notus.data.messages import (
    ASSISTANT,
    SHAREGPT_KEYS,
    USER,
    Message,
    answered,
    helpsteer_turns,
    hh_turns,
    holds,
    read_message,
    read_messages,
)
from notus.data.pairs import Outcome, Pair, question_pair, scores_of
from notus.errors import UserError

PROMPTS_DIFFER = Dropped("prompts differ", is_row=True)
TIED = Dropped("neither response preferred", is_row=True)


# ------------------------------------------------------------- TRL's formats, and turns of a chat


def convert_preference(row: Row, where: str) -> Outcome:
    """TRL's preference formats: text or messages, with a prompt or with one implied.

    Complete dialogues in chosen and rejected imply their common leading messages as the prompt,
    even if a `prompt` repeats it as text (HuggingFaceH4/ultrafeedback_binarized,
    argilla/ultrafeedback-binarized-preferences-cleaned).
    """
    if row.get("chosen") is None or row.get("rejected") is None:
        missing = "chosen" if row.get("chosen") is None else "rejected"
        reject_column(row, missing, where, "text or a list of messages")
    if not isinstance(row["chosen"], str):
        return _convert_messages(row, where)
    chosen, rejected = read_text(row, "chosen", where), read_text(row, "rejected", where)
    implied = "prompt" not in row
    if implied:
        length = common_prompt_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    else:
        prompt = read_text(row, "prompt", where)
    return [Pair(prompt, chosen, rejected, where, *scores_of(row, where), implied=implied)]


def common_prompt_length(chosen: str, rejected: str) -> int:
    """How many leading characters two texts share as their prompt, by TRL's `extract_prompt`.

    A space at the prompt's end goes to the responses, and each response keeps a character even
    if one text begins with all of the other.
    """
    length, shortest = len(commonprefix([chosen, rejected])), min(len(chosen), len(rejected))
    if length == shortest:
        return max(shortest - 1, 0)
    return length - 1 if chosen[:length].endswith(" ") else length


def _response(row: Row, column: str, where: str) -> list[Message]:
    """The message or the messages in `column`, of which the last is the assistant's."""
    if isinstance(row.get(column), dict):
        return answered([read_message(row, column, where)], column, where)
    return answered(read_messages(row, column, where), column, where)


def _convert_messages(row: Row, where: str) -> Outcome:
    chosen, rejected = (_response(row, column, where) for column in ("chosen", "rejected"))
    if isinstance(row.get("prompt"), list):
        prompt = read_messages(row, "prompt", where)
        for column, response in (("chosen", chosen), ("rejected", rejected)):
            if response[0]["role"] != ASSISTANT:
                raise UserError(
                    f'{where}: "{column}" starts with a message of the {response[0]["role"]}; '
                    'expected only the answer, since "prompt" holds the conversation'
                )
    else:
        repeated = read_text(row, "prompt", where) if "prompt" in row else ""
        if repeated and chosen[0]["role"] == rejected[0]["role"] == ASSISTANT:
            prompt = [{"role": USER, "content": repeated}]
        else:
            # The last message of either is a response, even if they are equal.
            same = [a == b for a, b in zip(chosen[:-1], rejected[:-1], strict=False)]
            length = (*same, False).index(False)
            prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
            if not chosen[0]["role"] == rejected[0]["role"] == ASSISTANT:
                return PROMPTS_DIFFER
            _check_repeats(repeated.strip(), prompt, where)
    return [Pair(prompt, chosen, rejected, where, *scores_of(row, where))]


def _check_repeats(text: str, prompt: list[Message], where: str) -> None:
    """Raise UserError if a prompt's text has nothing to do with the messages in front of both."""
    contents = [message["content"].strip() for message in prompt]
    if not any(content in text or text in content for content in contents):
        raise UserError(
            f'{where}: "chosen" and "rejected" are complete dialogues, and the prompt\'s text '
            'is not in them; expected "ignore": ["prompt"] in the source, or its column\'s name'
        )


def convert_turns(columns: tuple[str, str, str], row: Row, where: str) -> Outcome:
    """Text columns that are turns of a chat: a question of the user and two answers to it."""
    texts = (read_text(row, column, where) for column in columns)
    return [question_pair(*texts, where, scores_of(row, where))]


QUESTIONS = ("instruction", "question", "query", "input")


def convert_question(row: Row, where: str) -> Outcome:
    """A question in a column of `QUESTIONS` (Intel/orca_dpo_pairs, Alpaca) and two answers.

    Alpaca's `input` follows its `instruction` in a new line. The answers are text or messages.
    """
    names = [name for name in QUESTIONS if holds(row.get(name))]
    if not names or (len(names) > 1 and names != ["instruction", "input"]):
        raise UserError(
            f"{where}: the question is in {' and '.join(names) or 'no column'}; found the columns "
            f"{', '.join(row)}; expected one of {', '.join(QUESTIONS)}, or "
            '"columns": {"prompt": ...} in the source'
        )
    question = "\n".join(read_text(row, name, where) for name in names)
    if isinstance(row.get("chosen"), list | dict):
        return _convert_messages({**row, "prompt": question}, where)
    return convert_turns(("prompt", "chosen", "rejected"), {**row, "prompt": question}, where)


# ----------------------------------------------------------------------------- dialogues as text


def convert_hh(row: Row, where: str) -> Outcome:
    """Anthropic's hh-rlhf: two dialogues as text whose last turns are the responses."""
    chosen, rejected = (
        answered(hh_turns(row, column, where), column, where) for column in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1]:
        return PROMPTS_DIFFER
    return [Pair(chosen[:-1], chosen[-1:], rejected[-1:], where, *scores_of(row, where))]


# ------------------------------------------------------------------- a conversation and a message


def convert_sharegpt(row: Row, where: str) -> Outcome:
    """LLaMA-Factory's ShareGPT preferences: a conversation and two messages that may follow it."""
    prompt = read_messages(row, "conversations", where, SHAREGPT_KEYS)
    responses = (
        answered([read_message(row, column, where, SHAREGPT_KEYS)], column, where)
        for column in ("chosen", "rejected")
    )
    return [Pair(prompt, *responses, where, *scores_of(row, where))]


def convert_swift(row: Row, where: str) -> Outcome:
    """ms-swift's: a conversation that ends with the chosen answer, and the rejected one.

    The latter is text, or in `rejected_messages` a complete conversation.
    """
    if holds(row.get("rejected_messages")):
        both = {"chosen": row.get("messages"), "rejected": row["rejected_messages"]}
        return _convert_messages(both, where)
    *prompt, chosen = answered(read_messages(row, "messages", where), "messages", where)
    rejected = read_text(row, "rejected_response", where)
    return [Pair(prompt, [chosen], [{**chosen, "content": rejected}], where)]


# ------------------------------------------------------------- two responses and which is better


def _one_of_two(
    prompt: str | list[Message], responses: list[Any], better: int, where: str, scores: list[float]
) -> Outcome:
    """The pair whose chosen response is `responses[better]`; the scores are in the same order."""
    order = (better, 1 - better)
    found = (scores[i] for i in order) if scores else (None, None)
    return [question_pair(prompt, *(responses[i] for i in order), where, tuple(found))]


def convert_strength(columns: tuple[str, str, str, str], row: Row, where: str) -> Outcome:
    """HelpSteer2's and 3's preferences: prompt, two responses, and how much the second is better.

    columns: theirs. A strength below 0 prefers the first response, and 0 neither. The strength is
    the difference of the pair's scores, of which the rejected response's is 0.
    """
    prompt, *names, strength = columns
    if isinstance(row.get(prompt), list):
        asked = read_messages(row, prompt, where)
    else:
        asked = helpsteer_turns(row, prompt, where)
    found = as_number(row.get(strength))
    if isinstance(found, bool) or not isinstance(found, int | float) or not isfinite(found):
        reject_column(row, strength, where, "a finite number")
    if found == 0:
        return TIED
    scores = [max(0.0, -float(found)), max(0.0, float(found))]
    return _one_of_two(asked, [read_text(row, n, where) for n in names], found > 0, where, scores)


def convert_saferlhf(label: str, row: Row, where: str) -> Outcome:
    """PKU-SafeRLHF by one of its labels, "better_response_id" (more helpful) or "safer_..."."""
    better = as_number(row.get(label))
    if isinstance(better, bool) or better not in (0, 1):
        reject_column(row, label, where, "0 or 1")
    responses = [read_text(row, f"response_{i}", where) for i in (0, 1)]
    return _one_of_two(read_text(row, "prompt", where), responses, int(better), where, [])


def convert_halos(row: Row, where: str) -> Outcome:
    """HALOs' pairwise feedback: a conversation, two outputs, and label 1 if A is the better."""
    label = row.get("label")
    if label not in (0, 1):
        reject_column(row, "label", where, "0 or 1")
    prompt = read_messages(row, "prompt", where)
    outputs = [_response(row, f"output_{name}", where) for name in "AB"]
    rewards = [row.get(f"reward_{name}") for name in "AB"]
    if not all(isinstance(reward, int | float) for reward in rewards):
        rewards = []
    return _one_of_two(
        prompt, outputs, 1 - int(label), where, [float(reward) for reward in rewards]
    )
