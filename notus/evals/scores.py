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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

from notus.curation.rows import read_rows
from notus.errors import UserError
from notus.evals.json_option import add_json_option, check_new, keep_json
from notus.evals.leaderboard import report_lm_eval, result_files
from notus.evals.published import (
    ALPACA_EVAL,
    ALPACA_EVAL_PROMPTS,
    BASELINES,
    MT_BENCH,
    MT_BENCH_CATEGORIES,
    WinRate,
)
from notus.generate.prompts import read_prompt_set
from notus.strict import Bound, parse_part
from notus.tables import text_table


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `score` to the command line."""
    about = "read an evaluator's output files, print the row of the table"
    score = commands.add_parser("score", help=about, description=about)
    evaluators = score.add_subparsers(metavar="EVALUATOR", required=True)

    about = "win rate, standard error and length from AlpacaEval's annotations"
    alpaca_eval = evaluators.add_parser("alpaca_eval", help=about, description=about)
    alpaca_eval.add_argument("annotations", type=Path, help="its annotations.json")
    alpaca_eval.set_defaults(run=score_alpaca_eval)

    about = "mean score over both turns, and per category, from FastChat's judgments"
    mt_bench = evaluators.add_parser("mt_bench", help=about, description=about)
    mt_bench.add_argument("judgments", type=Path, help="its model_judgment/gpt-4_single.jsonl")
    mt_bench.add_argument(
        "--questions", type=Path, help="question.jsonl, if the questions are not MT-Bench's own 80"
    )
    mt_bench.set_defaults(run=score_mt_bench)

    about = "the Open LLM Leaderboard's tasks and average from lm-evaluation-harness's results"
    lm_eval = evaluators.add_parser("lm_eval", help=about, description=about)
    lm_eval.add_argument("results", type=Path, help="its results file, or a folder of these")
    lm_eval.set_defaults(run=score_lm_eval)

    for parser in (alpaca_eval, mt_bench, lm_eval):
        add_json_option(parser)


# ------------------------------------------------------------------------------------ AlpacaEval

Preference = Annotated[
    float,
    Bound("0 or a number from 1 (the baseline is better) to 2", lambda x: x == 0 or 1 <= x <= 2),
]


@dataclass(frozen=True)
class Annotation:
    """One comparison of the model's answer, output_2, with the baseline's; null: not annotated."""

    instruction: str
    preference: Preference | None
    output_2: str
    generator_1: str
    generator_2: str


def score_alpaca_eval(options: argparse.Namespace) -> None:
    """The command `score alpaca_eval`."""
    check_new(options.json)
    baseline, row, annotations = read_annotations(options.annotations)
    version = BASELINES.get(baseline)
    published = ALPACA_EVAL.get(version, ())
    header = ("model", "win rate %", "± s.e.", "wins", "losses", "draws", "annotated")
    header += ("mean length", "length-controlled %")
    others = [(f"{other.model} (published)", *other[1:]) for other in published]
    print(text_table(header, [row, *others]))
    notes = []
    if version is None:
        notes.append(f"No published row was compared with {baseline}.")
    if annotations != row.total:
        notes.append(f"{row.model}: {row.total} of {annotations} rows hold a preference.")
    if annotations != ALPACA_EVAL_PROMPTS:
        notes.append(
            f"{row.model}: {annotations} rows, AlpacaEval has {ALPACA_EVAL_PROMPTS} prompts: "
            "not comparable with the published rows."
        )
    print("".join(f"\n{note}" for note in notes))
    content = {
        "evaluator": "alpaca_eval",
        "baseline": baseline,
        "measured": [row._asdict() | {"rows": annotations}],
        "published": [other._asdict() for other in published],
        "notes": notes,
    }
    keep_json(options.json, content)


def read_annotations(file: Path) -> tuple[str, WinRate, int]:
    """The baseline's name, the model's win rate and the number of rows of an annotations.json.

    Raises UserError for rows that AlpacaEval does not write: another preference, a second model or
    baseline, an instruction that is annotated twice with the same answer.
    """
    places: dict[tuple[str, str], str] = {}
    names: dict[tuple[str, str], str] = {}
    annotations = []
    for where, row in read_rows(str(file)):
        found = parse_part(row, Annotation, where)
        first = places.setdefault((found.instruction, found.output_2), where)
        if first != where:
            raise UserError(
                f"{where}: the same instruction and answer as {first}; expected each comparison "
                "once"
            )
        names.setdefault((found.generator_1, found.generator_2), where)
        annotations.append(found)
    if len(names) > 1:
        listed = ", ".join(f"{b} and {a} ({where})" for (a, b), where in names.items())
        raise UserError(f"{file}: several comparisons: {listed}; expected one model and baseline")
    ((baseline, model),) = names
    preferences = [found.preference for found in annotations]
    if not any(value is not None for value in preferences):
        raise UserError(f"{file}: not one row of {model} holds a preference")
    # AlpacaEval rounds the mean length down to a whole number of characters.
    length = int(statistics.fmean(len(found.output_2) for found in annotations))
    row = win_rate(model, preferences)._replace(average_length=length)
    return baseline, row, len(annotations)


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

Score = Annotated[float, Bound("1 to 10, or -1", lambda x: x == -1 or 0 <= x <= 10)]


@dataclass(frozen=True)
class Judgment:
    """A row of gpt-4_single.jsonl: the score of one turn's answer; -1: it could not be parsed."""

    model: str
    question_id: int
    turn: int
    score: Score
    judge: tuple[str, ...]


class Question(NamedTuple):
    category: str
    turns: int


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


MT_BENCH_QUESTIONS = {
    number: Question(category, 2) for number, category in MT_BENCH_CATEGORIES.items()
}


def score_mt_bench(options: argparse.Namespace) -> None:
    """The command `score mt_bench`."""
    check_new(options.json)
    own = options.questions is not None
    questions = read_questions(options.questions) if own else MT_BENCH_QUESTIONS
    published = {} if own else MT_BENCH
    found = mt_bench_scores(options.judgments, questions)
    header = ["model", "MT-Bench", "± s.e."]
    header += [f"turn {turn + 1}" for turn in range(len(found[0].turns))]
    header += found[0].categories
    rows = [(f.model, f.score, f.standard_error, *f.turns, *f.categories.values()) for f in found]
    unknown = [None] * (len(header) - 2)
    rows += [(f"{model} (published)", score, *unknown) for model, score in published.items()]
    print(text_table(header, rows))
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
    print("".join(f"\n{note}" for note in notes))
    content = {
        "evaluator": "mt_bench",
        "measured": [f._asdict() for f in found],
        "published": [{"model": model, "score": score} for model, score in published.items()],
        "notes": notes,
    }
    keep_json(options.json, content)


def read_questions(file: Path) -> dict[int, Question]:
    """The questions of FastChat's question.jsonl, by id. Raises UserError for another file."""
    found = read_prompt_set(str(file))
    if found.kind != "mt_bench":
        raise UserError(f"{file}: found the kind {found.kind}, expected FastChat's questions")
    return {
        prompt.row["question_id"]: Question(prompt.row["category"], 1 + len(prompt.follow_ups))
        for prompt in found.prompts
    }


def mt_bench_scores(file: Path, questions: Mapping[int, Question]) -> list[BenchScore]:
    """Each model's scores from FastChat's judgments of single answers.

    Raises UserError unless every turn of every question is judged exactly once for each model.
    """
    expected = {(number, t + 1) for number, q in questions.items() for t in range(q.turns)}
    models: dict[str, dict[tuple[int, int], tuple[str, Judgment]]] = defaultdict(dict)
    for where, row in read_rows(str(file)):
        judgment = parse_part(row, Judgment, where)
        model, key = judgment.model, (judgment.question_id, judgment.turn)
        if key not in expected:
            raise UserError(
                f"{where}: question_id {key[0]}, turn {key[1]} is not a turn of the "
                f"{len(questions)} questions, {min(questions)} to {max(questions)}"
            )
        if key in models[model]:
            raise UserError(
                f"{where}: question_id {key[0]}, turn {key[1]} of {model} is judged here and in "
                f"{models[model][key][0]}; expected it once"
            )
        models[model][key] = where, judgment
    found = []
    for model, judgments in models.items():
        if missing := sorted(expected - judgments.keys()):
            listed = ", ".join(f"{number} (turn {turn})" for number, turn in missing[:6])
            more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
            raise UserError(
                f"{file}: no judgment of {model} for question_id {listed}{more}; expected "
                f"{len(expected)} judgments, found {len(judgments)}"
            )
        scores = {key: judgment.score for key, (_, judgment) in judgments.items()}
        if all(score == -1 for score in scores.values()):
            raise UserError(f"{file}: not one judgment of {model} holds a score: all are -1")
        judge = next(iter(judgments.values()))[1].judge[0]
        found.append(bench_score(model, judge, scores, questions))
    return found


def bench_score(
    model: str,
    judge: str,
    scores: Mapping[tuple[int, int], float],
    questions: Mapping[int, Question],
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
    for (number, turn), score in kept.items():
        deviations[number] += score - mean
        turns[turn].append(score)
        categories[questions[number].category].append(score)
    q = len(deviations)
    squares = sum(deviation**2 for deviation in deviations.values())
    error = math.sqrt(q / (q - 1) * squares) / len(kept) if q > 1 else None
    last = max(question.turns for question in questions.values())
    names = dict.fromkeys(question.category for question in questions.values())
    return BenchScore(
        model,
        judge,
        mean,
        error,
        tuple(_mean(turns[turn]) for turn in range(1, last + 1)),
        {name: _mean(categories[name]) for name in names},
        judged=len(kept),
        unparsable=len(scores) - len(kept),
    )


def _mean(scores: Sequence[float]) -> float | None:
    return statistics.fmean(scores) if scores else None


# -------------------------------------------------------------------------- Open LLM Leaderboard


def score_lm_eval(options: argparse.Namespace) -> None:
    """The command `score lm_eval`."""
    check_new(options.json)
    report_lm_eval(result_files(options.results), options.json)
