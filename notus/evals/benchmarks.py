"""The answers that AlpacaEval and MT-Bench ask for: temperatures, lengths, seeds, file formats."""

import hashlib
import json
import secrets
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from notus.generate.prompts import Prompt

# FastChat's gen_model_answer; a category that is not here has OTHER_TEMPERATURE.
MT_BENCH_TEMPERATURES = {
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
    **dict.fromkeys(("stem", "humanities"), 0.1),
}
OTHER_TEMPERATURE = 0.7  # also that of Zephyr's and Notus's AlpacaEval answers
MAX_NEW_TOKENS = {"alpaca_eval": 2048, "mt_bench": 1024, "prompts": 1024, "samples": 1024}
# The default of transformers' generate, and so the value behind the published answers.
TOP_K = 50
SUFFIXES = {"alpaca_eval": ".json", "mt_bench": ".jsonl", "prompts": ".jsonl", "samples": ".jsonl"}


class Answered(NamedTuple):
    """One prompt's responses, one for each turn, and the Unix time in seconds of the last one."""

    responses: list[str]
    time: float


def answers_text(
    kind: str,
    prompts: Sequence[Prompt],
    answers: Sequence[Answered],
    seeds: Sequence[int],
    name: str,
) -> str:
    """The file of a model's answers.

    AlpacaEval's model_outputs.json is a list of objects, FastChat's model_answer file has a line
    for each question, sorted by id. For "samples" see `_samples_text`. For other prompts: JSON
    lines, each prompt's row with "response" and "generator" added.
    """
    if kind == "samples":
        return _samples_text(prompts, answers, seeds, name)
    rows = [_row(kind, *answered, name) for answered in zip(prompts, answers, strict=True)]
    if kind == "alpaca_eval":
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    if kind == "mt_bench":
        rows.sort(key=lambda row: row["question_id"])
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _row(kind: str, prompt: Prompt, answered: Answered, name: str) -> dict[str, Any]:
    row, response = prompt.row, answered.responses[0]
    if kind == "alpaca_eval":
        kept = {key: row[key] for key in ("dataset", "instruction") if key in row}
        return kept | {"output": response, "generator": name}
    if kind == "mt_bench":
        return {
            "question_id": row["question_id"],
            "answer_id": secrets.token_urlsafe(16),  # 22 characters, as FastChat's short ids
            "model_id": name,
            "choices": [{"index": 0, "turns": answered.responses}],
            "tstamp": answered.time,
        }
    return row | {"response": response, "generator": name}


def temperature_of(prompt: Prompt, kind: str, override: float | None) -> float:
    """The temperature for a prompt: the override, else the benchmark's own."""
    if override is not None:
        return override
    category = prompt.row["category"] if kind == "mt_bench" else None
    return MT_BENCH_TEMPERATURES.get(category, OTHER_TEMPERATURE)


def seeds_of(prompts: Sequence[Prompt], kind: str, draws: int | None, seed: int) -> list[int]:
    """The seed of each prompt's random stream.

    draws: how often each prompt comes in a row, for the kind "samples" (see `_draw_seed`).
    FastChat uses the same seed for every question.
    """
    if kind == "samples":
        return [_draw_seed(prompt, i % draws, seed) for i, prompt in enumerate(prompts)]
    return [seed if kind == "mt_bench" else seed + i for i in range(len(prompts))]


def _draw_seed(prompt: Prompt, draw: int, seed: int) -> int:
    """The seed of one of several draws for a prompt, below 2**48.

    It depends on nothing else, so that the other prompts of the file, their order and the number of
    draws change no draw.
    """
    text = f"{seed}:{draw}:{json.dumps(prompt.prompt)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _samples_text(
    prompts: Sequence[Prompt], answers: Sequence[Answered], seeds: Sequence[int], name: str
) -> str:
    """JSON lines: the row of each prompt with its K "responses", their "seeds" and "generator".

    prompts: each of them K times in a row. "prompt" is text for a single question of the user, else
    messages; "source" is null where it is unknown.
    """
    lines = []
    for _, group in groupby(zip(prompts, answers, seeds, strict=True), lambda one: id(one[0])):
        (prompt, *_), drawn, used = zip(*group, strict=True)
        single = len(prompt.prompt) == 1 and prompt.prompt[0]["role"] == "user"
        row = (
            {"source": None}
            | prompt.row
            | {
                "prompt": prompt.text if single else prompt.prompt,
                "responses": [answered.responses[0] for answered in drawn],
                "seeds": list(used),
                "generator": name,
            }
        )
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)
