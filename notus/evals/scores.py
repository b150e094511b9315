"""The evaluators' own output files -> the rows of Notus's table, next to the published ones.

    python eval.py score alpaca_eval annotations.json
    python eval.py score mt_bench gpt-4_single.jsonl
    python eval.py score lm_eval RESULTS_DIR

The files are those of AlpacaEval 0.6.6, FastChat 0.2.36 and lm-evaluation-harness 0.4.13.
"""

import argparse
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from notus.curation.rows import read_rows
from notus.errors import UserError
from notus.evals.leaderboard import report_lm_eval, result_files
from notus.evals.options import add_json_option, report
from notus.evals.published import (
    ALPACA_EVAL,
    ALPACA_EVAL_PROMPTS,
    MT_BENCH,
    MT_BENCH_TURNS,
    WinRate,
)
from notus.generate.prompts import read_prompt_set
from notus.strict import Bound, parse_part
from notus.tables import text_table


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "read an evaluator's output files, print the row of the table"
    score = commands.add_parser("score", help=about, description=about)
    evaluators = score.add_subparsers(metavar="EVALUATOR", required=True)

    def evaluator(name: str, run: Callable, file: str, about: str) -> argparse.ArgumentParser:
        parser = evaluators.add_parser(name, help=about, description=about)
        parser.add_argument("file", type=Path, help=file)
        add_json_option(parser)
        parser.set_defaults(run=run)
        return parser

    about = "win rate, standard error and length from AlpacaEval's annotations"
    evaluator("alpaca_eval", score_alpaca_eval, "its annotations.json", about)
    file = "its model_judgment/gpt-4_single.jsonl"
    about = "mean score over both turns, and per category, from FastChat's judgments"
    mt_bench = evaluator("mt_bench", score_mt_bench, file, about)
    about = "question.jsonl, if the questions are not MT-Bench's own 80"
    mt_bench.add_argument("--questions", type=Path, help=about)
    file = "its results file, or a folder of these"
    about = "the Open LLM Leaderboard's tasks and average from lm-evaluation-harness's results"
    evaluator("lm_eval", score_lm_eval, file, about)


# ------------------------------------------------------------------------------------ AlpacaEval

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


# -------------------------------------------------------------------------------------- MT-Bench

Turns = Mapping[tuple[int, int], str]  # (question id, turn) -> category
Score = Annotated[float, Bound("1 to 10, or -1", lambda x: x == -1 or 0 <= x <= 10)]


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
    questions = read_questions(options.questions) if own else MT_BENCH_TURNS
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


def read_questions(file: Path) -> Turns:
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


# -------------------------------------------------------------------------- Open LLM Leaderboard


def score_lm_eval(options: argparse.Namespace) -> None:
    report_lm_eval(result_files(options.file), options.json)
