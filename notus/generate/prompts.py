"""Prompt files and the benchmarks' own prompt sets, and how their prompts become tokens."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from transformers import PreTrainedTokenizerFast

from notus.curation.decontamination import Dropped
from notus.curation.rated_rows import RATED
from notus.curation.rows import PlacedRow, read_rows
from notus.data.columns import ADDED, complete_all
from notus.data.formats import FORMATS
from notus.data.messages import Message, holds, read_messages
from notus.data.pairs import question_pair
from notus.data.template import render, with_system_prompt
from notus.errors import UserError
from notus.strict import Text, parse_part

PROMPT_ROWS = '{"prompt": text or messages}'  # for messages


class Prompt(NamedTuple):
    """A prompt and what belongs to it.

    prompt: text, or a conversation up to the answer. answer: the only right answer, if there is
    one. follow_ups: what the user says after each answer except the last. row: the row it was read
    from, unchanged.
    """

    prompt: str | list[Message]
    answer: str | None = None
    follow_ups: tuple[str, ...] = ()
    row: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The user's question, for display; only the first of several turns."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


class PromptSet(NamedTuple):
    """Prompts of one kind: "alpaca_eval", "mt_bench" or "prompts"."""

    prompts: list[Prompt]
    kind: str


# The benchmarks' own files on the Hugging Face hub: repository, its type, file, number of prompts.
# Single files, because the datasets library no longer runs AlpacaEval's loading script.
HUB_FILES = {
    "alpaca_eval": ("tatsu-lab/alpaca_eval", "dataset", "alpaca_eval.json", 805),
    "mt_bench": ("lmsys/mt-bench", "space", "data/mt_bench/question.jsonl", 80),
}


def read_prompt_set(name: str) -> PromptSet:
    """The prompts of a benchmark, "alpaca_eval" or "mt_bench", or of a JSON or JSONL file.

    A file's kind follows from the columns of its rows: "instruction" as in AlpacaEval's sets,
    "question_id", "category" and "turns" as in FastChat's, or {"prompt": text or messages,
    "answer"?: text}. Raises UserError, which names the row, for a row that is not of the first
    row's kind, for FastChat questions whose ids are not unique, and for a benchmark's file that is
    incomplete or cannot be downloaded.
    """
    own = name in HUB_FILES
    path = _download(name) if own and not Path(name).exists() else name
    rows = list(read_rows(path))
    prompts, kind = _read_known(rows)
    if own and (kind, len(prompts)) != (name, HUB_FILES[name][-1]):
        raise UserError(
            f"{path}: found {len(prompts)} prompts of the kind {kind}, expected {name}'s "
            f"{HUB_FILES[name][-1]}"
        )
    return PromptSet(prompts, kind)


def read_questions(name: str) -> PromptSet:
    """The conversations that a policy is asked to answer, each of them once: the kind "samples".

    name: as for `read_prompt_set`, or a file, folder or hub dataset of any preference format, whose
    prompts are taken. Text is a question of the user; of several questions only the first is kept.
    A prompt's row holds the columns of its prompt file, or "source" of its preference row.
    Raises UserError for rows without a prompt.
    """
    path = _download(name) if name in HUB_FILES and not Path(name).exists() else name
    rows = list(read_rows(path))
    known = {key: entry.recognises for key, entry in FORMATS.items() if entry.recognises}
    formats = [key for key, recognises in known.items() if recognises(rows[0][1])]
    found = _prompts_of_format(formats[0], rows) if formats else _read_known(rows).prompts
    once: dict[str, Prompt] = {}
    for prompt in found:
        if isinstance(prompt.prompt, str):
            prompt = prompt._replace(prompt=[{"role": "user", "content": prompt.prompt}])
        once.setdefault(json.dumps(prompt.prompt), prompt._replace(follow_ups=()))
    return PromptSet(list(once.values()), "samples")


def _prompts_of_format(name: str, rows: Sequence[PlacedRow]) -> Iterator[Prompt]:
    """The prompts of rows in a format of `FORMATS`; rows that give none are left out.

    Raises UserError for rows with tools or options of the chat template.
    """
    rated = RATED.get(name)
    for where, row in rated.gather(rows) if rated and rated.gather else rows:
        kept = {"source": row.get("source")}
        if rated:
            prompt = rated.read(row, where).prompt
            outcome = [question_pair(prompt, "", "", where, (None, None))]
        else:
            outcome = FORMATS[name].convert(row, where)
        outcome = complete_all(outcome, name, row, where)
        for pair in () if isinstance(outcome, Dropped) else outcome:
            if pair.tools or pair.template_options:
                raise UserError(f'{where}: "tools" are not read from prompts; remove them')
            yield Prompt(pair.prompt, row=kept)


def _read_known(rows: Sequence[PlacedRow]) -> PromptSet:
    """The prompts of rows that are all of one kind of `KINDS`. Raises UserError."""
    where, first = rows[0]
    kind = next((kind for kind, (columns, _) in KINDS.items() if columns <= first.keys()), None)
    if kind is None:
        raise UserError(
            f"{where}: the columns are {', '.join(first)}; expected prompt, or AlpacaEval's "
            "instruction, or FastChat's question_id, category and turns"
        )
    prompts, places = [], {}
    for where, row in rows:
        for column in ADDED:  # of a source of pairs they go to the chat template
            if holds(row.get(column)):
                raise UserError(f'{where}: "{column}" is not read from prompts; remove it')
        prompt = parse_part(row, KINDS[kind][1], where)
        if isinstance(prompt.prompt, tuple):
            prompt = prompt._replace(prompt=read_messages(row, "prompt", where))
        prompts.append(prompt._replace(row=row))
        if kind == "mt_bench" and places.setdefault(row["question_id"], where) != where:
            raise UserError(
                f"{where}: question_id {row['question_id']} is also that of "
                f"{places[row['question_id']]}; expected every id once"
            )
    return PromptSet(prompts, kind)


def check_template(
    prompts: Sequence[Prompt], source: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Raise UserError if prompts are conversations and the tokenizer has no chat template."""
    conversational = any(not isinstance(prompt.prompt, str) for prompt in prompts)
    if conversational and not tokenizer.chat_template:
        raise UserError(
            f"{source}: found conversations, but the tokenizer has no chat template; expected "
            "chat_template in the model's tokenizer_config.json, or prompts of plain text"
        )


def _download(name: str) -> str:
    repository, kind, file, _ = HUB_FILES[name]
    try:
        return hf_hub_download(repository, file, repo_type=kind)
    except OSError as error:  # the class of the hub's errors and of the network's
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"--prompts {name}: {file} of the hub's {kind} {repository} is not in the local cache "
            f"and cannot be downloaded ({first_line}); give a copy of that file instead: "
            f"--prompts PATH/{Path(file).name}"
        ) from None


def _from_question(*, question_id: int, category: str, turns: tuple[Text, ...]) -> Prompt:
    return Prompt([{"role": "user", "content": turns[0]}], follow_ups=turns[1:])


def _from_instruction(*, instruction: Text) -> Prompt:
    return Prompt([{"role": "user", "content": instruction}])


def _from_prompt(*, prompt: Text | tuple[Any, ...], answer: str | None = None) -> Prompt:
    return Prompt(prompt, answer)


# By kind: the columns that identify it, and the function from one of its rows to a prompt.
KINDS: dict[str, tuple[set[str], Callable[..., Prompt]]] = {
    "mt_bench": ({"question_id", "turns"}, _from_question),
    "alpaca_eval": ({"instruction"}, _from_instruction),
    "prompts": ({"prompt"}, _from_prompt),
}


def encode_prompt(
    prompt: str | list[Message], tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> list[int]:
    """The token ids before the answer, tokenized as in training ("clean").

    A conversation gets the special tokens of its template, plain text those of the tokenizer.
    Raises UserError if the template refuses the conversation.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    messages = with_system_prompt(prompt, system_prompt)
    where = f"the conversation that begins with {messages[0]['content'][:60]!r}"
    text = render(tokenizer, messages, where, opens_answer=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_published(
    prompt: list[Message], tokenizer: PreTrainedTokenizerFast, final_newline: bool
) -> list[int]:
    """Token ids of the prompt text behind Zephyr's and Notus's published answers.

    FastChat's "zephyr" conversation, with an empty system turn unless it has one, and with a BOS
    in front (training had none). Notus's AlpacaEval script omitted the newline after
    "<|assistant|>" (`final_newline` False), which is why 803 of its 805 answers start with one.
    """
    system, *turns = with_system_prompt(prompt, "")
    text = f"<|system|>\n{system['content']}</s>\n"
    for turn in [*turns, {"role": "assistant", "content": ""}]:
        # An empty message is the place for an answer; FastChat writes an empty answer the same way.
        text += f"<|{turn['role']}|>\n" + (turn["content"] + "</s>\n" if turn["content"] else "")
    ids = tokenizer(text if final_newline else text[:-1], add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids]
