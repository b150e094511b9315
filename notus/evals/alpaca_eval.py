"""AlpacaEval's annotations.json -> win rates, next to the published ones."""

import argparse
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from notus.curation.rows import read_rows
from notus.errors import UserError
from notus.evals.options import report
from notus.evals.published import ALPACA_EVAL, ALPACA_EVAL_PROMPTS, WinRate
from notus.strict import Bound, parse_part
from notus.tables import text_table

# 1: the baseline's answer is better, 2: the model's; 0 is an old 1.5.
Preference = Annotated[float, Bound("0 or a number from 1 to 2", lambda x: x == 0 or 1 <= x <= 2)]


@dataclass(frozen=True)
class Annotation:
    """One comparison of the model's answer, output_2, with the baseline's; null: not annotated."""

    instruction: str
    preference: Preference | None
    output_2: str
    generator_1: str
    generator_2: str


def score_alpaca_eval(options: argparse.Namespace) -> None:
    baseline, row, annotations = read_annotations(options.file)
    published = ALPACA_EVAL.get(baseline, ())
    header = ("model", "win rate %", "± s.e.", "wins", "losses", "draws", "annotated")
    header += ("mean length", "length-controlled %")
    others = [(f"{other.model} (published)", *other[1:]) for other in published]
    notes = []
    if not published:
        notes.append(f"No published row was compared with {baseline}.")
    if annotations != row.total:
        notes.append(f"{row.model}: {row.total} of {annotations} rows hold a preference.")
    if annotations != ALPACA_EVAL_PROMPTS:
        notes.append(
            f"{row.model}: {annotations} rows, AlpacaEval has {ALPACA_EVAL_PROMPTS} prompts: "
            "not comparable with the published rows."
        )
    content = {
        "evaluator": "alpaca_eval",
        "baseline": baseline,
        "measured": [row._asdict() | {"rows": annotations}],
        "published": [other._asdict() for other in published],
    }
    report(text_table(header, [row, *others]), notes, options.json, content)


def read_annotations(file: Path) -> tuple[str, WinRate, int]:
    """The baseline's name, the model's win rate and the number of rows of an annotations.json.

    Raises UserError for rows that AlpacaEval does not write: another preference, a second model or
    baseline, an instruction that is annotated twice with the same answer.
    """
    places: dict[tuple[str, str], str] = {}
    annotations = []
    for where, row in read_rows(str(file)):
        found = parse_part(row, Annotation, where)
        first = places.setdefault((found.instruction, found.output_2), where)
        if first != where:
            raise UserError(f"{where}: the same instruction and answer as {first}")
        annotations.append(found)
        baseline, model = annotations[0].generator_1, annotations[0].generator_2
        if (found.generator_1, found.generator_2) != (baseline, model):
            raise UserError(
                f"{where}: compares {found.generator_2} with {found.generator_1}, the first row "
                f"{model} with {baseline}; expected one model and baseline"
            )
    preferences = [found.preference for found in annotations]
    if not any(value is not None for value in preferences):
        raise UserError(f"{file}: not one row of {model} holds a preference")
    # AlpacaEval rounds the mean length down to a whole number of characters.
    length = int(statistics.fmean(len(found.output_2) for found in annotations))
    return baseline, win_rate(model, preferences)._replace(average_length=length), len(annotations)


def win_rate(model: str, preferences: Iterable[float | None]) -> WinRate:
    """AlpacaEval's win rate of the second answer, in percent, and its standard error.

    A preference is None (not annotated: left out), or from 1 (the baseline's answer is better) to
    2 (the model's is); 1.5 is a draw, and so is 0; a graded one is the expected value. The win rate
    is the mean of preference - 1, the error the sample standard deviation over the square root of
    n.
    """
    shares = [(value or 1.5) - 1 for value in preferences if value is not None]
    n = len(shares)
    return WinRate(
        model,
        100 * statistics.fmean(shares),
        100 * statistics.stdev(shares) / math.sqrt(n) if n > 1 else None,
        wins=sum(share > 0.5 for share in shares),
        losses=sum(share < 0.5 for share in shares),
        draws=sum(share == 0.5 for share in shares),
        total=n,
    )
