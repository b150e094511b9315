"""FastChat's gpt-4_single.jsonl -> MT-Bench scores, next to the published ones."""

import argparse
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from notus.curation.rows import read_rows
from notus.errors import UserError
from notus.evals.options import report
from notus.evals.published import MT_BENCH, MT_BENCH_TURNS
from notus.generate.prompts import read_prompt_set
from notus.strict import Bound, parse_part
from notus.tables import text_table

Turns = Mapping[tuple[int, int], str]  # (question id, turn) -> category
Score = Annotated[float, Bound("0 to 10, or -1", lambda x: x == -1 or 0 <= x <= 10)]


@dataclass(frozen=True)
class Judgment:
    """A row of gpt-4_single.jsonl: the score of one turn's answer; -1: it could not be parsed."""

    model: str
    question_id: int
    turn: int
    score: Score
    judge: tuple[str, ...]


class BenchScore(NamedTuple):
    """One model's MT-Bench scores, 1 to 10."""

    model: str
    judge: str
    score: float  # the mean over all judged turns
    standard_error: float | None
    turns: tuple[float | None, ...]  # the mean of each turn
    categories: dict[str, float | None]
    judged: int
    unparsable: int


def score_mt_bench(options: argparse.Namespace) -> None:
    own = options.questions is not None
    questions = read_turns(options.questions) if own else MT_BENCH_TURNS
    published = {} if own else MT_BENCH
    found = mt_bench_scores(options.file, questions)
    header = ["model", "MT-Bench", "± s.e."]
    header += [f"turn {turn + 1}" for turn in range(len(found[0].turns))]
    header += found[0].categories
    rows = [(f.model, f.score, f.standard_error, *f.turns, *f.categories.values()) for f in found]
    unknown = [None] * (len(header) - 2)
    rows += [(f"{model} (published)", score, *unknown) for model, score in published.items()]
    notes = [
        f"{f.model}: {f.unparsable} of {f.judged + f.unparsable} judgments hold no score (-1) "
        "and are left out."
        for f in found
        if f.unparsable
    ]
    notes += [
        f"{f.model}: judged by {f.judge}; the published rows by gpt-4."
        for f in found
        if published and f.judge != "gpt-4"
    ]
    content = {
        "evaluator": "mt_bench",
        "measured": [f._asdict() for f in found],
        "published": [{"model": model, "score": score} for model, score in published.items()],
    }
    report(text_table(header, rows), notes, options.json, content)


def read_turns(file: Path) -> Turns:
    """The turns of FastChat's question.jsonl. Raises UserError for another file."""
    prompts, kind = read_prompt_set(str(file))
    if kind != "mt_bench":
        raise UserError(f"{file}: found the kind {kind}, expected FastChat's questions")
    return {
        (prompt.row["question_id"], turn + 1): prompt.row["category"]
        for prompt in prompts
        for turn in range(1 + len(prompt.follow_ups))
    }


def mt_bench_scores(file: Path, questions: Turns) -> list[BenchScore]:
    """Each model's scores from FastChat's judgments of single answers.

    Raises UserError unless every turn of every question is judged exactly once for each model.
    """
    models: dict[str, dict[tuple[int, int], Judgment]] = defaultdict(dict)
    for where, row in read_rows(str(file)):
        judgment = parse_part(row, Judgment, where)
        judged, key = models[judgment.model], (judgment.question_id, judgment.turn)
        if key not in questions or key in judged:
            problem = "is judged twice" if key in judged else "is not a turn of the questions"
            raise UserError(
                f"{where}: question_id {key[0]}, turn {key[1]} of {judgment.model} {problem}"
            )
        judged[key] = judgment
    found = []
    for model, judged in models.items():
        if missing := sorted(questions.keys() - judged.keys()):
            raise UserError(
                f"{file}: {len(missing)} of {len(questions)} judgments of {model} are missing, the "
                f"first of question_id {missing[0][0]}, turn {missing[0][1]}"
            )
        scores = {key: judgment.score for key, judgment in judged.items()}
        if all(score == -1 for score in scores.values()):
            raise UserError(f"{file}: not one judgment of {model} holds a score: all are -1")
        judge = next(iter(judged.values())).judge[0]
        found.append(bench_score(model, judge, scores, questions))
    return found


def bench_score(
    model: str, judge: str, scores: Mapping[tuple[int, int], float], questions: Turns
) -> BenchScore:
    """One model's means, from the score of each (question id, turn); -1, unparsable, is left out.

    The standard error treats questions as the independent draws, because the two turns of one are
    not: sqrt(q / (q - 1) * sum over the q questions of (sum of score - mean)^2) / n, the linearised
    variance of a ratio.
    """
    kept = {key: score for key, score in scores.items() if score != -1}
    mean = statistics.fmean(kept.values())
    deviations: Counter[int] = Counter()
    turns, categories = defaultdict(list), defaultdict(list)
    for key, score in kept.items():
        deviations[key[0]] += score - mean
        turns[key[1]].append(score)
        categories[questions[key]].append(score)
    q = len(deviations)
    squares = sum(deviation**2 for deviation in deviations.values())
    error = math.sqrt(q / (q - 1) * squares) / len(kept) if q > 1 else None

    def mean_or_none(values: Sequence[float]) -> float | None:
        return statistics.fmean(values) if values else None

    return BenchScore(
        model,
        judge,
        mean,
        error,
        tuple(mean_or_none(turns[turn]) for turn in sorted({turn for _, turn in questions})),
        {name: mean_or_none(categories[name]) for name in dict.fromkeys(questions.values())},
        judged=len(kept),
        unparsable=len(scores) - len(kept),
    )
