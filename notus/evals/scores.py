"""The evaluators' own output files -> the rows of Notus's table, beside the published ones.

python eval.py score alpaca_eval annotations.json
python eval.py score mt_bench gpt-4_single.jsonl
python eval.py score lm_eval RESULTS_DIR
"""

import argparse
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from notus.curation.rows import read_rows
from notus.errors import UserError
from notus.evals.leaderboard import report_lm_eval, result_files
from notus.evals.published import (
    ALPACA_EVAL,
    ALPACA_EVAL_1,
    ALPACA_EVAL_PROMPTS,
    BASELINES,
    MT_BENCH,
    MT_BENCH_CATEGORIES,
    WinRate,
)
from notus.evals.tables import (
    Cell,
    add_json_option,
    check_new,
    text_table,
    write_json,
)

Row = dict[str, Any]
Placed = tuple[str, Row]  # where a row stands, for messages, and the row


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


def _read_file(file: Path) -> list[Placed]:
    """All rows of a JSON or JSONL file; UserError if it is missing, cut off or has no rows."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    return list(read_rows(str(file)))


def _found(row: Row, column: str) -> str:
    return f"{column} is {row[column]!r}" if column in row else f"there is no {column}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------ AlpacaEval


def score_alpaca_eval(options: argparse.Namespace) -> int:
    """The command `score alpaca_eval`; returns the exit code."""
    check_new(options.json)
    baseline, found = alpaca_eval_win_rates(options.annotations)
    version = BASELINES.get(baseline or ALPACA_EVAL_1)
    header = ("model", "win rate %", "± s.e.", "wins", "losses", "draws", "annotated")
    header += ("mean length", "length-controlled %")
    rows: list[Sequence[Cell]] = [row for row, _ in found]
    rows += [[f"{row.model} (published)", *row[1:]] for row in ALPACA_EVAL.get(version, ())]
    print(text_table(header, rows))
    notes = []
    if baseline is None:
        notes.append(f"The file names no generator_1: taken to be {ALPACA_EVAL_1}, AlpacaEval 1.")
    elif version is None:
        notes.append(f"No published row was compared with {baseline}.")
    for row, rows_read in found:
        if rows_read != row.total:
            notes.append(f"{row.model}: {row.total} of {rows_read} rows hold a preference.")
        if rows_read != ALPACA_EVAL_PROMPTS:
            notes.append(
                f"{row.model}: {rows_read} rows, AlpacaEval has {ALPACA_EVAL_PROMPTS} prompts: "
                "not comparable with the published rows."
            )
    print("".join(f"\n{note}" for note in notes))
    measured = [row._asdict() | {"rows": rows_read} for row, rows_read in found]
    write_json(
        options.json,
        {
            "evaluator": "alpaca_eval",
            "baseline": baseline,
            "measured": measured,
            "published": [row._asdict() for row in ALPACA_EVAL.get(version, ())],
            "notes": notes,
        },
    )
    return 0


def alpaca_eval_win_rates(file: Path) -> tuple[str | None, list[tuple[WinRate, int]]]:
    """The baseline's name, and each model's win rate with the number of its rows.

    Raises UserError for rows that AlpacaEval does not write: none or another preference, several
    baselines, an instruction annotated twice with the same answers.
    """
    models: dict[str, list[Placed]] = defaultdict(list)
    baselines: dict[str | None, str] = {}
    for where, row in _read_file(file):
        models[str(row.get("generator_2", file.stem))].append((where, row))
        baselines.setdefault(row.get("generator_1"), where)
    if len(baselines) > 1:
        listed = ", ".join(f"{name} ({where})" for name, where in baselines.items())
        raise UserError(f"{file}: comparisons with several baselines: {listed}; expected one")
    found = []
    for model, placed in models.items():
        _check_instructions(placed)
        lengths = [
            len(row["output_2"]) for _, row in placed if isinstance(row.get("output_2"), str)
        ]
        preferences = [_preference(where, row) for where, row in placed]
        if all(value is None for value in preferences):
            raise UserError(f"{file}: not one row of {model} holds a preference")
        row = win_rate(model, preferences)
        length = int(statistics.fmean(lengths)) if lengths else None  # whole, as AlpacaEval's
        found.append((row._replace(average_length=length), len(placed)))
    return next(iter(baselines)), found


def win_rate(model: str, preferences: Iterable[float | None]) -> WinRate:
    """AlpacaEval's win rate of the second answer, in percent, and its standard error.

    A preference is None (not annotated: left out), 1 (the baseline's answer is better) to 2 (the
    model's is), by way of 1.5, a draw; graded ones are its expected value. The win rate is the
    mean of preference - 1, the error the sample standard deviation over the square root of n.
    """
    shares = [value - 1 for value in preferences if value is not None]
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


def _preference(where: str, row: Row) -> float | None:
    """A row's preference: from 1 to 2, or None. AlpacaEval's earliest files have 0 for a draw."""
    value = row.get("preference", "missing")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if _is_number(value) and value == 0:
        return 1.5
    if not _is_number(value) or not 1 <= value <= 2:
        raise UserError(
            f"{where}: {_found(row, 'preference')}; expected a number from 1 (the baseline is "
            "better) to 2 (the model is), or null"
        )
    return float(value)


def _check_instructions(placed: Sequence[Placed]) -> None:
    """Raise UserError if a row lacks its instruction, or if two rows are one comparison."""
    first: dict[tuple[Any, ...], str] = {}
    for where, row in placed:
        if not isinstance(row.get("instruction"), str):
            raise UserError(f"{where}: {_found(row, 'instruction')}; expected text")
        same = (row["instruction"], repr(row.get("output_1")), repr(row.get("output_2")))
        if same in first:
            raise UserError(
                f"{where}: the same instruction and answers as {first[same]}; expected each "
                "comparison once"
            )
        first[same] = where


# -------------------------------------------------------------------------------------- MT-Bench


class Question(NamedTuple):
    category: str
    turns: int


class BenchScore(NamedTuple):
    """One model's MT-Bench scores, 1 to 10."""

    model: str
    judge: str | None
    score: float  # the mean over all judged turns
    standard_error: float | None
    turns: tuple[float | None, ...]  # the mean of each turn
    categories: dict[str, float | None]
    judged: int
    unparsable: int


def score_mt_bench(options: argparse.Namespace) -> int:
    """The command `score mt_bench`; returns the exit code."""
    check_new(options.json)
    questions = MT_BENCH_QUESTIONS
    if options.questions is not None:
        questions = read_questions(options.questions)
    found = mt_bench_scores(options.judgments, questions)
    categories = list(dict.fromkeys(question.category for question in questions.values()))
    turns = max(question.turns for question in questions.values())
    header = ["model", "MT-Bench", "± s.e.", *(f"turn {turn + 1}" for turn in range(turns))]
    rows: list[list[Cell]] = [
        [f.model, f.score, f.standard_error, *f.turns, *map(f.categories.get, categories)]
        for f in found
    ]
    published = MT_BENCH if options.questions is None else {}
    unknown: list[Cell] = [None] * (1 + turns + len(categories))
    rows += [[f"{model} (published)", score, *unknown] for model, score in published.items()]
    print(text_table([*header, *categories], rows))
    notes = [
        f"{f.model}: {f.unparsable} of {f.judged + f.unparsable} judgments hold no score (-1) "
        "and are left out."
        for f in found
        if f.unparsable
    ]
    notes += [
        f"{f.model}: judged by {f.judge}; the published rows by gpt-4."
        for f in found
        if published and f.judge not in (None, "gpt-4")
    ]
    print("".join(f"\n{note}" for note in notes))
    write_json(
        options.json,
        {
            "evaluator": "mt_bench",
            "measured": [f._asdict() for f in found],
            "published": [{"model": model, "score": score} for model, score in published.items()],
            "notes": notes,
        },
    )
    return 0


MT_BENCH_QUESTIONS = {
    number: Question(category, 2) for number, category in MT_BENCH_CATEGORIES.items()
}


def read_questions(file: Path) -> dict[int, Question]:
    """The questions of FastChat's question.jsonl, by id.

    Raises UserError for a row without id, category or turns, and for an id that comes twice.
    """
    questions: dict[int, Question] = {}
    for where, row in _read_file(file):
        number, category, turns = (row.get(key) for key in ("question_id", "category", "turns"))
        if not isinstance(number, int) or isinstance(number, bool):
            raise UserError(f"{where}: {_found(row, 'question_id')}; expected a whole number")
        if not isinstance(category, str):
            raise UserError(f"{where}: {_found(row, 'category')}; expected text")
        if not isinstance(turns, list) or not turns:
            raise UserError(f"{where}: {_found(row, 'turns')}; expected a list of texts")
        if number in questions:
            raise UserError(f"{where}: question_id {number} is there twice; expected it once")
        questions[number] = Question(category, len(turns))
    return questions


def mt_bench_scores(file: Path, questions: Mapping[int, Question]) -> list[BenchScore]:
    """Each model's scores from FastChat's judgments of single answers.

    Raises UserError unless every turn of every question is judged exactly once for each model.
    """
    models: dict[str, dict[tuple[int, int], tuple[str, float]]] = defaultdict(dict)
    judges: dict[str, str | None] = {}
    for where, row in _read_file(file):
        model, key, score = _judgment(where, row, questions)
        if key in models[model]:
            number, turn = key
            raise UserError(
                f"{where}: question_id {number}, turn {turn} of {model} is judged here and in "
                f"{models[model][key][0]}; expected it once"
            )
        models[model][key] = where, score
        judge = row.get("judge")
        judges.setdefault(model, str(judge[0]) if isinstance(judge, list) and judge else None)
    expected = {(number, t + 1) for number, q in questions.items() for t in range(q.turns)}
    found = []
    for model, judgments in models.items():
        missing = sorted(expected - judgments.keys())
        if missing:
            listed = ", ".join(f"{number} (turn {turn})" for number, turn in missing[:6])
            more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
            raise UserError(
                f"{file}: no judgment of {model} for question_id {listed}{more}; expected "
                f"{len(expected)} judgments, found {len(judgments)}"
            )
        scores = {key: score for key, (_, score) in judgments.items()}
        if all(score == -1 for score in scores.values()):
            raise UserError(f"{file}: not one judgment of {model} holds a score: all are -1")
        found.append(bench_score(model, judges[model], scores, questions))
    return found


def bench_score(
    model: str,
    judge: str | None,
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


def _judgment(
    where: str, row: Row, questions: Mapping[int, Question]
) -> tuple[str, tuple[int, int], float]:
    """A row's model, (question id, turn) and score."""
    number, turn, score = (row.get(key) for key in ("question_id", "turn", "score"))
    if not isinstance(row.get("model"), str):
        raise UserError(
            f"{where}: {_found(row, 'model')}; expected the judgment of a single answer, as in "
            "gpt-4_single.jsonl"
        )
    if not isinstance(number, int) or number not in questions:
        raise UserError(
            f"{where}: {_found(row, 'question_id')}; expected one of the {len(questions)} "
            f"questions, {min(questions)} to {max(questions)}"
        )
    if not isinstance(turn, int) or not 1 <= turn <= questions[number].turns:
        turns = " or ".join(str(t + 1) for t in range(questions[number].turns))
        raise UserError(f"{where}: {_found(row, 'turn')}; expected {turns}")
    if not _is_number(score) or not (score == -1 or 0 <= score <= 10):
        raise UserError(f"{where}: {_found(row, 'score')}; expected 1 to 10, or -1")
    return row["model"], (number, turn), float(score)


# -------------------------------------------------------------------------- Open LLM Leaderboard


def score_lm_eval(options: argparse.Namespace) -> int:
    """The command `score lm_eval`; returns the exit code."""
    check_new(options.json)
    report_lm_eval(result_files(options.results), options.json)
    return 0
