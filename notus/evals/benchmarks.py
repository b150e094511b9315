"""The answers that AlpacaEval and MT-Bench ask for: temperatures, lengths, seeds, file formats."""

import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from notus.generate.prompts import Prompt

# FastChat's gen_model_answer; a category that is not here has OTHER_TEMPERATURE.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7  # also that of Zephyr's and Notus's AlpacaEval answers
MAX_NEW_TOKENS = {"alpaca_eval": 2048, "mt_bench": 1024, "prompts": 1024}
# The default of transformers' generate, and so the value behind the published answers.
TOP_K = 50


class Answered(NamedTuple):
    """One prompt's responses, one for each turn, and the Unix time in seconds of the last one."""

    responses: list[str]
    time: float


def alpaca_eval_text(prompts: Sequence[Prompt], answers: Sequence[Answered], name: str) -> str:
    """AlpacaEval's model_outputs.json: a list of objects, `name` the leaderboard's generator."""
    rows = []
    for prompt, answered in zip(prompts, answers, strict=True):
        origin = {"dataset": prompt.row["dataset"]} if "dataset" in prompt.row else {}
        rows.append(
            origin
            | {
                "instruction": prompt.row["instruction"],
                "output": answered.responses[0],
                "generator": name,
            }
        )
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def mt_bench_text(prompts: Sequence[Prompt], answers: Sequence[Answered], name: str) -> str:
    """FastChat's model_answer file: one line for each question, sorted by id."""
    rows = [
        {
            "question_id": prompt.row["question_id"],
            "answer_id": secrets.token_urlsafe(16),  # 22 characters, as FastChat's short ids
            "model_id": name,
            "choices": [{"index": 0, "turns": answered.responses}],
            "tstamp": answered.time,
        }
        for prompt, answered in zip(prompts, answers, strict=True)
    ]
    return _json_lines(sorted(rows, key=lambda row: row["question_id"]))


def prompts_text(prompts: Sequence[Prompt], answers: Sequence[Answered], name: str) -> str:
    """JSON lines: each prompt's row with "response" and "generator" added."""
    return _json_lines(
        [
            prompt.row | {"response": answered.responses[0], "generator": name}
            for prompt, answered in zip(prompts, answers, strict=True)
        ]
    )


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Form(NamedTuple):
    """The format of a kind's answers: the file name's suffix, and the text of the file."""

    suffix: str
    text: Callable[[Sequence[Prompt], Sequence[Answered], str], str]


FORMS = {
    "alpaca_eval": Form(".json", alpaca_eval_text),
    "mt_bench": Form(".jsonl", mt_bench_text),
    "prompts": Form(".jsonl", prompts_text),
}


def temperature_of(prompt: Prompt, kind: str, override: float | None) -> float:
    """The temperature for a prompt: the override, else the benchmark's own."""
    if override is not None:
        return override
    if kind == "mt_bench":
        return MT_BENCH_TEMPERATURES.get(prompt.row["category"], OTHER_TEMPERATURE)
    return OTHER_TEMPERATURE


def seed_of(index: int, kind: str, seed: int) -> int:
    """The seed of a prompt's random stream. FastChat uses the same one for every question."""
    return seed if kind == "mt_bench" else seed + index
