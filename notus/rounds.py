"""The demo's rounds: `configs/rounds.sh` over its questions, and the share of right answers.

`python -m notus.demo --rounds 2` runs it. The judge is checking, so the shares are exact counts.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from notus.errors import UserError
from notus.tables import text_table

ROOT = Path(__file__).parents[1]  # of the repository, where train.py and configs/ are
# One thread: their number decides the order of float additions, so it is part of the result.
SETTINGS = {"OMP_NUM_THREADS": "1", "MAX_NEW_TOKENS": "24", "BATCH_SIZE": "256"}


class Gain(NamedTuple):
    """A mean over prompts, and the standard error of that mean."""

    mean: float
    error: float


def run_rounds(rounds: int, demo: Path, out: Path) -> None:
    """Run the rounds over the demo in `demo`, below `out`. Raises UserError when a stage fails."""
    script = ROOT / "configs/rounds.sh"
    files = (demo / "sft", demo / "questions.jsonl", demo / "prompts.jsonl")
    arguments = (
        rounds,
        out.resolve(),
        *(path.resolve() for path in files),
        "configs/demo-round.json",
    )
    command = ["bash", str(script), *map(str, arguments)]
    if subprocess.run(command, cwd=ROOT, env=os.environ | SETTINGS).returncode:
        raise UserError(f"{out}: a round failed; the same command resumes it")


def gain(values: list[float], before: list[float]) -> Gain:
    """The mean change from `before` to `values`, prompt by prompt, and its standard error.

    The samples of one prompt are not independent of each other, so the prompt is the unit.
    """
    changes = [value - earlier for value, earlier in zip(values, before, strict=True)]
    mean, count = sum(changes) / len(changes), len(changes)
    variance = sum((change - mean) ** 2 for change in changes) / max(count - 1, 1)
    return Gain(mean, math.sqrt(variance / count))


def rounds_table(out: Path, rounds: int) -> str:
    """A text table: each round's pairs, held-out share of right answers, and its gain."""
    rows, before = [], []
    for number in range(rounds + 1):
        here = out / f"round-{number}"
        shares = [sum(marks) / len(marks) for marks in _ratings(here / "held-out")]
        pairs = sum(len(set(marks)) > 1 for marks in _ratings(here / "judged")) if number else 0
        change = gain(shares, before) if number else (None, None)
        rows.append((f"round {number}", pairs, sum(shares) / len(shares), *change))
        before = shares
    return text_table(("", "pairs", "right answers", "gain", "standard error"), rows, digits=4)


def _ratings(folder: Path) -> list[list[float]]:
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["ratings"] for line in lines]
