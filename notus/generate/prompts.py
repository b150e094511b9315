"""What a model is asked: prompt files, the benchmarks' own sets, and how both become tokens."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import hf_hub_download
from transformers import PreTrainedTokenizerFast

from notus.curation.rows import read_rows
from notus.data.formats import Message, read_messages
from notus.data.tokenization import with_system_prompt
from notus.data.tokenizer import load_tokenizer
from notus.errors import UserError

PROMPT_FORMATS = ("template", "published")


class Prompt(NamedTuple):
    """Something to answer.

    prompt: text, or a conversation up to the answer. answer: the one right answer, where there is
    one. follow_ups: what the user says after each answer but the last. row: as it was read.
    """

    prompt: str | list[Message]
    answer: str | None = None
    follow_ups: tuple[str, ...] = ()
    row: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """What the user asked first, for display."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


class PromptSet(NamedTuple):
    """Prompts of one kind, "alpaca_eval", "mt_bench" or "prompts", and where they are from."""

    kind: str
    source: str
    prompts: list[Prompt]


class HubFile(NamedTuple):
    """A benchmark's own file on the Hugging Face hub, and how many prompts it must hold."""

    repository: str
    repository_type: str
    file: str
    count: int


# Single files, because the datasets library no longer runs the script that AlpacaEval comes with.
HUB_FILES = {
    "alpaca_eval": HubFile("tatsu-lab/alpaca_eval", "dataset", "alpaca_eval.json", 805),
    "mt_bench": HubFile("lmsys/mt-bench", "space", "data/mt_bench/question.jsonl", 80),
}


def read_prompt_set(name: str) -> PromptSet:
    """The prompts of a benchmark, "alpaca_eval" or "mt_bench", or of a file.

    A file's kind follows from the columns of its rows: "instruction" as in AlpacaEval's sets,
    "question_id" and "turns" as in FastChat's, or "prompt" (see `read_prompts`). Raises UserError
    that names the row when one is not of the first row's kind, a benchmark's file that cannot be
    had, and FastChat questions whose ids are not unique.
    """
    path = name
    if name in HUB_FILES and not Path(name).exists():
        path = _download(name)
    rows = list(read_rows(path))
    where, first = rows[0]
    kind = next((kind for kind, (columns, _) in KINDS.items() if columns <= first.keys()), None)
    if kind is None:
        raise UserError(
            f"{where}: the columns are {', '.join(first)}; expected prompt, or AlpacaEval's "
            "instruction, or FastChat's question_id, category and turns"
        )
    convert = KINDS[kind][1]
    prompts = [convert(row, where)._replace(row=row) for where, row in rows]
    if kind == "mt_bench":
        _check_unique_ids(rows)
    if name in HUB_FILES and (kind != name or len(prompts) != HUB_FILES[name].count):
        raise UserError(
            f"{path}: found {len(prompts)} prompts of the kind {kind}, expected {name}'s "
            f"{HUB_FILES[name].count}"
        )
    return PromptSet(kind, name, prompts)


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a JSON or JSONL file with rows {"prompt": text or messages, "answer"?: text}.

    Files of the benchmarks' forms are read too, see `read_prompt_set`.
    """
    return read_prompt_set(path).prompts


def check_prompts(path: str, folder: Path) -> None:
    """Raise UserError unless the prompts at `path` can be put to the model in `folder`."""
    check_template(read_prompts(path), path, folder, load_tokenizer(folder))


def check_template(
    prompts: Sequence[Prompt], source: str, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Raise UserError when prompts are conversations and the tokenizer has no chat template."""
    conversational = any(not isinstance(prompt.prompt, str) for prompt in prompts)
    if conversational and not tokenizer.chat_template:
        raise UserError(
            f"{source}: found conversations, but the tokenizer has no chat template; expected "
            f"chat_template in {folder}/tokenizer_config.json, or prompts of plain text"
        )


def _download(name: str) -> str:
    wanted = HUB_FILES[name]
    try:
        return hf_hub_download(wanted.repository, wanted.file, repo_type=wanted.repository_type)
    except OSError as error:  # what the hub's own errors are, and those of the network
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"--prompts {name}: {wanted.file} of the hub's {wanted.repository_type} "
            f"{wanted.repository} is not in the local cache and cannot be downloaded "
            f"({first_line}); give a copy of that file instead: --prompts PATH/"
            f"{Path(wanted.file).name}"
        ) from None


def _convert_prompt(row: dict[str, Any], where: str) -> Prompt:
    prompt, answer = row.get("prompt"), row.get("answer")
    if isinstance(prompt, list):
        prompt = read_messages(row, "prompt", where)
    if not isinstance(prompt, str | list) or not prompt:
        raise UserError(f"{where}: prompt is {json.dumps(prompt)}, expected text or messages")
    if answer is not None and not isinstance(answer, str):
        raise UserError(f"{where}: answer is {json.dumps(answer)}, expected text")
    return Prompt(prompt, answer)


def _convert_instruction(row: dict[str, Any], where: str) -> Prompt:
    instruction = row.get("instruction")
    if not isinstance(instruction, str) or not instruction:
        raise UserError(f"{where}: instruction is {json.dumps(instruction)}, expected text")
    return Prompt([{"role": "user", "content": instruction}])


def _convert_question(row: dict[str, Any], where: str) -> Prompt:
    for column, kind, expected in (("question_id", int, "a number"), ("category", str, "text")):
        if type(row.get(column)) is not kind:
            found = json.dumps(row.get(column))
            raise UserError(f"{where}: {column} is {found}, expected {expected}")
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(t and type(t) is str for t in turns):
        raise UserError(f"{where}: turns is {json.dumps(turns)}, expected a list of texts")
    first, *follow_ups = turns
    return Prompt([{"role": "user", "content": first}], follow_ups=tuple(follow_ups))


def _check_unique_ids(rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    places: dict[int, str] = {}
    for where, row in rows:
        earlier = places.setdefault(row["question_id"], where)
        if earlier != where:
            raise UserError(
                f"{where}: question_id {row['question_id']} is also that of {earlier}; expected "
                "every id once"
            )


# The columns that tell a kind, and what turns a row of it into a prompt.
KINDS: dict[str, tuple[set[str], Callable[[dict[str, Any], str], Prompt]]] = {
    "mt_bench": ({"question_id", "turns"}, _convert_question),
    "alpaca_eval": ({"instruction"}, _convert_instruction),
    "prompts": ({"prompt"}, _convert_prompt),
}


def encode_prompt(
    prompt: str | list[Message], tokenizer: PreTrainedTokenizerFast, system_prompt: str | None
) -> list[int]:
    """Token ids up to where the answer begins, as in training ("clean").

    A conversation has the special tokens that its template writes, plain text those of the
    tokenizer. Raises UserError when the template refuses the conversation.
    """
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    messages = with_system_prompt(prompt, system_prompt)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError) as error:
        raise UserError(
            f"the chat template refuses the conversation that begins with "
            f"{messages[0]['content'][:60]!r}: {error}"
        ) from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode_published(
    prompt: list[Message],
    tokenizer: PreTrainedTokenizerFast,
    system_prompt: str | None,
    final_newline: bool,
) -> list[int]:
    """Token ids of the text that Zephyr's and Notus's published answers were written to.

    FastChat's "zephyr" conversation, an empty system turn unless one is given, with a BOS in front
    (training had none). Notus's AlpacaEval script left the newline after "<|assistant|>" out, which
    is why 803 of its 805 answers begin with one: `final_newline` False.
    """
    system, *turns = with_system_prompt(prompt, system_prompt or "")
    text = f"<|system|>\n{system['content']}</s>\n"
    for turn in [*turns, {"role": "assistant", "content": ""}]:
        # An empty message is the place of an answer; FastChat writes an empty answer so as well.
        text += f"<|{turn['role']}|>\n" + (turn["content"] + "</s>\n" if turn["content"] else "")
    ids = tokenizer(text if final_newline else text[:-1], add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids]
