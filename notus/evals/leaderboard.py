"""lm-evaluation-harness's results -> the Open LLM Leaderboard's row, next to the published ones.

Reads the files of the harness since 0.4, and the leaderboard's own of 2023, in which Notus's
results are published.
"""

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from notus.errors import UserError
from notus.evals.options import report
from notus.evals.published import LEADERBOARD, LEADERBOARD_TASKS, BoardRow
from notus.files import read_object
from notus.strict import show
from notus.tables import text_table


class Measured(NamedTuple):
    """One metric of a task in a results file."""

    task: str
    metric: str
    value: float
    standard_error: float | None
    few_shot: int | None
    limit: float | None  # the examples used, if not all
    file: Path

    def plain(self) -> dict[str, Any]:
        return dict(zip(self._fields[1:6], self[1:6], strict=True))


def report_lm_eval(files: Sequence[Path], json_file: Path | None) -> None:
    """Print the results next to the leaderboard's rows, and keep them as JSON."""
    model, results = read_results(files)
    board = leaderboard_results(results)
    others = [found for found in results if found.task not in board]
    scores = (100 * board[name].value if name in board else None for name in LEADERBOARD_TASKS)
    measured = BoardRow(model or "this model", "these results", tuple(scores))
    tables = []
    if board:
        header = ("model", "measured by", *(task.title for task in LEADERBOARD_TASKS.values()))
        rows = [(*row[:2], *row.scores, *averages(row.scores)) for row in (measured, *LEADERBOARD)]
        tables.append(text_table((*header, "average", "without DROP"), rows))
    if others:
        header = ("task", "metric", "value", "± s.e.", "shots")
        tables.append(text_table(header, [found[:5] for found in others], digits=4))
    content = {
        "evaluator": "lm_eval",
        "model": model,
        "measured": _plain(measured) | {"tasks": {name: m.plain() for name, m in board.items()}},
        "other_tasks": {
            found.task: [other.plain() for other in others if other.task == found.task]
            for found in others
        },
        "published": [_plain(row) for row in LEADERBOARD],
    }
    report("\n\n".join(tables), leaderboard_notes(board), json_file, content)


def result_files(path: Path) -> list[Path]:
    """The one file that `path` is, or a folder's results*.json, or else all JSON files in it.

    Subfolders count too. Raises UserError if there is none.
    """
    folder = sorted(path.rglob("results*.json")) or sorted(path.rglob("*.json"))
    if not path.is_file() and not folder:
        raise UserError(f"{path}: found no file results*.json of lm-evaluation-harness")
    return folder or [path]


def read_results(files: Iterable[Path]) -> tuple[str | None, list[Measured]]:
    """The model's name, if the files give it, and all metrics of all tasks.

    Raises UserError for a file in another format, for results of two models and for a task that is
    measured twice.
    """
    model, results, places = None, [], {}
    for file in files:
        content = read_object(file)
        if "results" not in content:
            raise UserError(f'{file}: no table "results", expected lm-evaluation-harness\'s')
        table = _table(file, content, "results", dict)
        about = _table(file, content, "config_general", object)
        name = content.get("model_name") or about.get("model_name")
        if not isinstance(name, str | None):
            raise UserError(f"{file}: model_name is {show(name)}, expected text")
        model = model or name
        if name not in (None, model):
            raise UserError(f"{file}: results of {name}, expected those of {model} as before")
        in_2023 = any(key.startswith("harness|") for key in table)
        try:
            found = list(_results_of_2023(file, table) if in_2023 else _results_in(file, content))
        except (LookupError, ValueError, TypeError) as error:
            raise UserError(f"{file}: not lm-evaluation-harness's results: {error!r}") from None
        for task in dict.fromkeys(measured.task for measured in found):
            if places.setdefault(task, file) != file:
                raise UserError(
                    f"{file}: {task} is measured here and in {places[task]}; expected it once"
                )
        results += found
    return model, results


def _table(
    file: Path, content: Mapping[str, Any], name: str, kind: type | UnionType
) -> Mapping[str, Any]:
    """The object under `name`, empty without one. Raises UserError for values not of `kind`."""
    found = content.get(name) or {}
    if not isinstance(found, dict) or not all(isinstance(v, kind) for v in found.values()):
        raise UserError(f"{file}: {name} is {show(found)}, expected lm-evaluation-harness's table")
    return found


def _results_in(file: Path, content: Mapping[str, Any]) -> Iterator[Measured]:
    """The metrics in a file of the harness since 0.4, without those of parts of other tasks."""
    limit = _table(file, content, "config", object).get("limit")
    if not isinstance(limit, int | float | None):
        raise UserError(f"{file}: config.limit is {show(limit)}, expected a number or null")
    parts = {p for group in _table(file, content, "group_subtasks", list).values() for p in group}
    few_shot = _table(file, content, "n-shot", int | str | None)
    for task, row in _table(file, content, "results", dict).items():
        shots = few_shot.get(task)
        alias = row.get("alias")  # which 0.4.0 indents for parts
        is_part = task in parts or (isinstance(alias, str) and alias.startswith(" "))
        if is_part and task not in LEADERBOARD_TASKS:
            continue
        for metric, value in row.items():
            if isinstance(value, int | float) and not re.match("sample_|.*_stderr", metric):
                # 0.4.0's name for the number after "####", as in the training answers
                name = metric.replace(",get-answer", ",strict-match")
                error = row.get(metric.replace(",", "_stderr,"))
                error = error if isinstance(error, float) else None  # or "N/A"
                yield Measured(task, name, value, error, shots, limit, file)


def _results_of_2023(file: Path, table: Mapping[str, Mapping[str, float]]) -> Iterator[Measured]:
    """The leaderboard's own "harness|arc:challenge|25" and so on, under today's names."""
    for today, task in LEADERBOARD_TASKS.items():
        name, metric = task.in_2023
        found = [key for key in table if key.startswith(f"harness|{name}")]
        if found:  # one row; of MMLU 57, whose mean is taken whatever their sizes
            value = statistics.fmean(table[key][metric] for key in found)
            shots = int(found[0].split("|")[2])
            yield Measured(today, task.metric, value, None, shots, None, file)


def leaderboard_results(results: Sequence[Measured]) -> dict[str, Measured]:
    """The leaderboard's tasks among the results, each with its own metric, a share.

    Raises UserError for a task without that metric.
    """
    files = {found.task: found.file for found in results}
    by_metric = {(found.task, found.metric): found for found in results}
    board = {}
    for name, task in LEADERBOARD_TASKS.items():
        if name not in files:
            continue
        if (name, task.metric) not in by_metric:
            raise UserError(f"{files[name]}: {name} has no {task.metric}")
        board[name] = by_metric[name, task.metric]
    return board


def averages(scores: Sequence[float | None]) -> list[float | None]:
    """The leaderboard's average of seven tasks, and of the six that it kept later, without DROP.

    None if a task is missing: an average over other tasks would not be comparable.
    """
    six = [score for name, score in zip(LEADERBOARD_TASKS, scores, strict=True) if name != "drop"]
    return [None if None in found else statistics.fmean(found) for found in (scores, six)]


def leaderboard_notes(board: Mapping[str, Measured]) -> list[str]:
    """Reasons why the measured numbers are not comparable with the leaderboard's."""
    notes = []
    for name, task in LEADERBOARD_TASKS.items() if board else ():
        if name not in board:
            notes.append(f"{name} was not measured, so there is no average with it.")
            continue
        found = board[name]
        if found.few_shot not in (None, task.few_shot):
            notes.append(
                f"{name} was measured with {found.few_shot} examples, the published with "
                f"{task.few_shot}: not comparable."
            )
        if found.limit is not None:
            notes.append(f"{name} was measured on a part (limit {found.limit:g}): not comparable.")
    return notes


def _plain(row: BoardRow) -> dict[str, Any]:
    averaged = zip(("average", "average_without_drop"), averages(row.scores), strict=True)
    return {
        "model": row.model,
        "measured_by": row.measured_by,
        "scores": dict(zip(LEADERBOARD_TASKS, row.scores, strict=True)),
        **dict(averaged),
    }
