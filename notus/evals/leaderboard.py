"""lm-evaluation-harness's results -> the Open LLM Leaderboard's row, next to the published ones.

Reads the files of the harness since 0.4, and the leaderboard's own of 2023, in which Notus's
results are published.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from notus.errors import UserError
from notus.evals.json_option import keep_json
from notus.evals.published import LEADERBOARD, LEADERBOARD_TASKS, MMLU_SUBTASKS, LeaderboardRow
from notus.files import read_object
from notus.tables import text_table

TASK_NAMES = [task.name for task in LEADERBOARD_TASKS]


class Result(NamedTuple):
    """One task's entry in a results file."""

    metrics: dict[str, float]  # also the standard errors, as acc_stderr,none
    few_shot: int | None
    limit: float | None  # the examples used, if not all
    file: Path
    is_part: bool = False  # of another task in the same file


class Measured(NamedTuple):
    """One metric of a task."""

    metric: str
    value: float
    standard_error: float | None
    few_shot: int | None
    limit: float | None


def report_lm_eval(files: Sequence[Path], json_file: Path | None) -> None:
    """Print the results next to the leaderboard's rows, and keep them as JSON."""
    model, results = read_results(files)
    board = leaderboard_results(results)
    others = {
        name: measured_metrics(result)
        for name, result in results.items()
        if name not in TASK_NAMES and not result.is_part
    }
    scores = (100 * board[name].value if name in board else None for name in TASK_NAMES)
    measured = LeaderboardRow(model or "this model", "these results", tuple(scores))
    if board:
        header = ("model", "measured by", *(task.title for task in LEADERBOARD_TASKS))
        rows = [(*row[:2], *row.scores, *averages(row.scores)) for row in (measured, *LEADERBOARD)]
        print(text_table((*header, "average", "without DROP"), rows))
    if any(others.values()):
        rows = [(name, *found[:4]) for name, metrics in others.items() for found in metrics]
        print("\n" if board else "", end="")
        print(text_table(("task", "metric", "value", "± s.e.", "shots"), rows, digits=4))
    notes = leaderboard_notes(board)
    print("".join(f"\n{note}" for note in notes))
    content = {
        "evaluator": "lm_eval",
        "model": model,
        "measured": _plain(measured) | {"tasks": {n: m._asdict() for n, m in board.items()}},
        "other_tasks": {n: [m._asdict() for m in metrics] for n, metrics in others.items()},
        "published": [_plain(row) for row in LEADERBOARD],
        "notes": notes,
    }
    keep_json(json_file, content)


def result_files(path: Path) -> list[Path]:
    """The one file that `path` is, or a folder's results*.json, or else all JSON files in it.

    Subfolders count too. Raises UserError if there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(path.rglob("results*.json")) or sorted(path.rglob("*.json"))
    if not files:
        raise UserError(f"{path}: the folder holds no results*.json of lm-evaluation-harness")
    return files


def read_results(files: Iterable[Path]) -> tuple[str | None, dict[str, Result]]:
    """The model's name, if the files give it, and every task's result by the task's name today.

    Raises UserError for a file in another format, for results of two models and for a task that is
    measured twice.
    """
    results: dict[str, Result] = {}
    models: dict[str, Path] = {}
    for file in files:
        content = read_object(file)
        model = content.get("model_name") or content.get("config_general", {}).get("model_name")
        if model is not None:
            models.setdefault(model, file)
        for name, result in _results_in(file, content).items():
            if name in results:
                raise UserError(
                    f"{file}: {name} is measured here and in {results[name].file}; expected it "
                    "once: give the one file, or a folder with one result of each task"
                )
            results[name] = result
    if len(models) > 1:
        listed = ", ".join(f"{model} ({file})" for model, file in models.items())
        raise UserError(f"results of several models: {listed}; expected those of one")
    return next(iter(models), None), results


def _results_in(file: Path, content: Mapping[str, Any]) -> dict[str, Result]:
    table = content.get("results")
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise UserError(
            f'{file}: there is no table "results" of tasks; expected a results file of '
            "lm-evaluation-harness"
        )
    if any(key.startswith("harness|") for key in table):
        return _results_of_2023(file, table)
    limit = content.get("config", {}).get("limit")
    parts = {part for group in content.get("group_subtasks", {}).values() for part in group}
    results = {}
    for name, row in table.items():
        metrics = {
            # 0.4.0's name for the number after "####", as in the training answers
            metric.replace(",get-answer", ",strict-match"): value
            for metric, value in row.items()
            if isinstance(value, int | float)
        }
        shots = content.get("n-shot", {}).get(name)
        is_part = name in parts or row.get("alias", "").startswith(" ")  # 0.4.0 indents parts
        results[name] = Result(metrics, shots, limit, file, is_part)
    return results


def _results_of_2023(file: Path, table: Mapping[str, Mapping[str, float]]) -> dict[str, Result]:
    """The leaderboard's own "harness|arc:challenge|25" and so on, under today's names."""
    results = {}
    for task in LEADERBOARD_TASKS:
        name, metric = task.in_2023
        found = [key for key in table if key.startswith(f"harness|{name}")]
        if not found:
            continue
        if task.name == "mmlu" and len(found) != MMLU_SUBTASKS:
            raise UserError(
                f"{file}: found {len(found)} of MMLU's {MMLU_SUBTASKS} subtasks {name}*; expected "
                "all of them"
            )
        # MMLU is the mean over its subtasks, whatever their sizes.
        metrics = {task.metric: statistics.fmean(table[key][metric] for key in found)}
        results[task.name] = Result(metrics, int(found[0].split("|")[2]), None, file)
    return results


def measured_metrics(result: Result) -> list[Measured]:
    """All metrics of a task, each with its standard error."""
    return [
        Measured(
            metric,
            float(value),
            result.metrics.get(metric.replace(",", "_stderr,")),
            result.few_shot,
            result.limit,
        )
        for metric, value in result.metrics.items()
        if "_stderr" not in metric and not metric.startswith("sample_")
    ]


def leaderboard_results(results: Mapping[str, Result]) -> dict[str, Measured]:
    """The leaderboard's tasks among `results`, each with its own metric, from 0 to 1.

    Raises UserError for a task without that metric.
    """
    board = {}
    for task in LEADERBOARD_TASKS:
        if task.name not in results:
            continue
        result = results[task.name]
        found = {measured.metric: measured for measured in measured_metrics(result)}
        if task.metric not in found:
            raise UserError(
                f"{result.file}: {task.name} has no {task.metric}; found "
                f"{', '.join(found) or 'no number'}"
            )
        board[task.name] = found[task.metric]
        if not 0 <= board[task.name].value <= 1:
            raise UserError(
                f"{result.file}: {task.metric} of {task.name} is {board[task.name].value:g}; "
                "expected a share, 0 to 1"
            )
    return board


def averages(scores: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The leaderboard's average of seven tasks, and of the six that it kept later, without DROP.

    None if a task is missing: an average over other tasks would not be comparable.
    """
    six = [score for name, score in zip(TASK_NAMES, scores, strict=True) if name != "drop"]
    return _average(scores), _average(six)


def _average(scores: Sequence[float | None]) -> float | None:
    return None if None in scores else statistics.fmean(scores)


def leaderboard_notes(board: Mapping[str, Measured]) -> list[str]:
    """Reasons why the measured numbers are not comparable with the leaderboard's."""
    notes = []
    for task in LEADERBOARD_TASKS if board else ():
        found = board.get(task.name)
        if found is None:
            notes.append(f"{task.name} was not measured, so there is no average with it.")
            continue
        if found.few_shot not in (None, task.few_shot):
            notes.append(
                f"{task.name} was measured with {found.few_shot} examples, the published with "
                f"{task.few_shot}: not comparable."
            )
        if found.limit is not None:
            notes.append(
                f"{task.name} was measured on a part (limit {found.limit:g}): not comparable."
            )
    return notes


def _plain(row: LeaderboardRow) -> dict[str, Any]:
    average, without_drop = averages(row.scores)
    return {
        "model": row.model,
        "measured_by": row.measured_by,
        "scores": dict(zip(TASK_NAMES, row.scores, strict=True)),
        "average": average,
        "average_without_drop": without_drop,
    }
