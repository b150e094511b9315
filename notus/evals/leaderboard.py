"""lm-evaluation-harness's results -> the Open LLM Leaderboard's row, beside the published ones."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from notus.errors import UserError
from notus.evals.published import (
    LEADERBOARD,
    LEADERBOARD_TASKS,
    MMLU_PREFIX,
    MMLU_SUBTASKS,
    LeaderboardRow,
    LeaderboardTask,
)
from notus.evals.tables import read_json_object, text_table, write_json

Plain = dict[str, Any]


class Result(NamedTuple):
    """One task's metrics in lm-evaluation-harness's results."""

    metrics: dict[str, float]  # also the standard errors, as acc_stderr or acc_stderr,none
    few_shot: int | None
    limit: float | None  # the examples used, if not all
    file: Path
    is_part: bool  # of another task in the same file


class Measured(NamedTuple):
    """A task's one number: a share, 0 to 1."""

    metric: str
    value: float
    standard_error: float | None
    few_shot: int | None
    limit: float | None


def report_lm_eval(files: Sequence[Path], json_file: Path | None) -> None:
    """Print what the harness's results hold, beside the leaderboard, and write it as JSON."""
    model, results = read_results(files)
    board = leaderboard_results(results)
    others = {
        name: metrics
        for name, result in results.items()
        if not result.is_part and (metrics := _other_metrics(name, result))
    }
    measured = leaderboard_row(model or "this model", board)
    if board:
        header = ["model", "measured by", *(task.title for task in LEADERBOARD_TASKS)]
        rows = [
            [row.model, row.measured_by, *row.scores, *averages(row.scores)]
            for row in (measured, *LEADERBOARD)
        ]
        print(text_table([*header, "average", "without DROP"], rows))
    if others:
        rows = [
            [name, found.metric, found.value, found.standard_error, found.few_shot]
            for name, metrics in others.items()
            for found in metrics
        ]
        print("\n" if board else "", end="")
        print(text_table(("task", "metric", "value", "± s.e.", "shots"), rows, digits=4))
    notes = leaderboard_notes(board)
    print("".join(f"\n{note}" for note in notes))
    write_json(
        json_file,
        {
            "evaluator": "lm_eval",
            "model": model,
            "measured": _plain(measured) | {"tasks": {n: m._asdict() for n, m in board.items()}},
            "other_tasks": {n: [m._asdict() for m in metrics] for n, metrics in others.items()},
            "published": [_plain(row) for row in LEADERBOARD],
            "notes": notes,
        },
    )


def result_files(path: Path) -> list[Path]:
    """The results files of a folder and those below it, or the one file that `path` is.

    The harness names them results*.json; where none is so called, every JSON file is taken for
    one. Raises UserError if there is none.
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
    """The model's name, where it is told, and every task's result by the task's name.

    Read are the files of the harness before 0.4 and since, and those of the leaderboard, which
    calls a task "harness|arc:challenge|25". Raises UserError for a file that is not one of these,
    for results of two models and for a task measured twice.
    """
    results: dict[str, Result] = {}
    models: dict[str, Path] = {}
    for file in files:
        content = read_json_object(file)
        if (model := _model_name(content)) is not None:
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


def _model_name(content: Plain) -> str | None:
    """Whose results these are: the harness's model_name, or its argument `pretrained`."""
    config = content.get("config") or content.get("config_general") or {}
    if isinstance(content.get("model_name"), str):
        return content["model_name"]
    arguments = config.get("model_args") if isinstance(config, dict) else None
    if isinstance(arguments, str):
        pairs = [part.split("=", 1) for part in arguments.split(",") if "=" in part]
        arguments = dict(pairs)
    if isinstance(arguments, dict) and isinstance(arguments.get("pretrained"), str):
        return arguments["pretrained"]
    return config.get("model_name") if isinstance(config, dict) else None


def _results_in(file: Path, content: Plain) -> dict[str, Result]:
    table = content.get("results")
    if not isinstance(table, dict) or not all(isinstance(row, dict) for row in table.values()):
        raise UserError(
            f'{file}: there is no table "results" of tasks; expected a results file of '
            "lm-evaluation-harness"
        )
    config = content.get("config") if isinstance(content.get("config"), dict) else {}
    groups = content.get("group_subtasks", {}).values()
    parts = {part for members in groups for part in members}
    results = {}
    for key, row in table.items():
        if key == "all":  # the leaderboard's mean over all subtasks
            continue
        name, suffix = _task_name(key)
        metrics = {metric: value for metric, value in row.items() if isinstance(value, int | float)}
        shots = content.get("n-shot", {}).get(key)
        if shots is None:
            shots = content.get("configs", {}).get(key, {}).get("num_fewshot")
        if shots is None:
            shots = suffix if suffix is not None else config.get("num_fewshot")
        is_part = key in parts or name.startswith(MMLU_PREFIX)
        is_part = is_part or str(row.get("alias", "")).startswith(" ")  # 0.4.0 indents them
        results[name] = Result(metrics, shots, config.get("limit"), file, is_part)
    return results


def _task_name(key: str) -> tuple[str, int | None]:
    """A task's own name and, in the leaderboard's "harness|arc:challenge|25", its shots."""
    parts = key.split("|")
    if len(parts) == 3 and parts[2].isdigit():
        return parts[1].replace(":", "_"), int(parts[2])
    return key, None


def leaderboard_results(results: Mapping[str, Result]) -> dict[str, Measured]:
    """The leaderboard's tasks among `results`, each by its own metric.

    Raises UserError for a task without that metric, and for a part of MMLU's subtasks.
    """
    board = {task.name: _board_result(task, results) for task in LEADERBOARD_TASKS}
    parts = {name: r for name, r in results.items() if name.startswith(MMLU_PREFIX)}
    if parts:
        if len(parts) != MMLU_SUBTASKS:
            raise UserError(
                f"{next(iter(parts.values())).file}: found {len(parts)} of MMLU's "
                f"{MMLU_SUBTASKS} subtasks {MMLU_PREFIX}*; expected all of them"
            )
        found = [_measured(name, r, "acc") for name, r in parts.items()]
        # The leaderboard's MMLU: every subtask counts the same, whatever its size.
        mean = statistics.fmean(m.value for m in found)
        board["mmlu"] = found[0]._replace(value=mean, standard_error=None)
    return {name: found for name, found in board.items() if found is not None}


def _board_result(task: LeaderboardTask, results: Mapping[str, Result]) -> Measured | None:
    here = [(name, metric) for name, metric in task.found_as if name in results]
    for name, metric in here:
        if metric in results[name].metrics:
            return _measured(name, results[name], metric)
    if not here:
        return None
    name, result = here[0][0], results[here[0][0]]
    raise UserError(
        f"{result.file}: {name} has no {' or '.join(metric for _, metric in here)}; found "
        f"{', '.join(result.metrics) or 'no number'}"
    )


def _measured(name: str, result: Result, metric: str) -> Measured:
    value = result.metrics.get(metric)
    if value is None or not 0 <= value <= 1:
        raise UserError(f"{result.file}: {metric} of {name} is {value}; expected a share, 0 to 1")
    error = result.metrics.get(_error_name(metric))
    return Measured(metric, value, error, result.few_shot, result.limit)


def _error_name(metric: str) -> str:
    base, comma, filtered = metric.partition(",")
    return f"{base}_stderr{comma}{filtered}"


def _other_metrics(name: str, result: Result) -> list[Measured]:
    """All metrics of a task that is not the leaderboard's."""
    board = {called for task in LEADERBOARD_TASKS for called, _ in task.found_as}
    if name in board:
        return []
    errors = {_error_name(metric) for metric in result.metrics}
    return [
        Measured(
            metric,
            float(value),
            result.metrics.get(_error_name(metric)),
            result.few_shot,
            result.limit,
        )
        for metric, value in result.metrics.items()
        if metric not in errors and metric not in ("sample_len", "sample_count")
    ]


def leaderboard_row(model: str, board: Mapping[str, Measured]) -> LeaderboardRow:
    """The measured tasks as a row of the leaderboard, in percent."""
    shares = [board[task.name].value if task.name in board else None for task in LEADERBOARD_TASKS]
    return LeaderboardRow(
        model, "these results", tuple(None if share is None else 100 * share for share in shares)
    )


def averages(scores: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The leaderboard's average of seven tasks, and of the six that it kept when DROP was dropped.

    None where a task is missing: an average over other tasks would not be comparable.
    """
    six = [
        score for task, score in zip(LEADERBOARD_TASKS, scores, strict=True) if task.name != "drop"
    ]
    return _average(scores), _average(six)


def _average(scores: Sequence[float | None]) -> float | None:
    return None if None in scores else statistics.fmean(scores)


def leaderboard_notes(board: Mapping[str, Measured]) -> list[str]:
    """What keeps the measured numbers from being comparable with the leaderboard's."""
    if not board:
        return []
    notes = []
    for task in LEADERBOARD_TASKS:
        found = board.get(task.name)
        if found is None:
            notes.append(f"{task.name} was not measured, so there is no average with it.")
            continue
        if found.few_shot is not None and found.few_shot != task.few_shot:
            notes.append(
                f"{task.name} was measured with {found.few_shot} examples, the published with "
                f"{task.few_shot}: not comparable."
            )
        if found.limit is not None:
            notes.append(
                f"{task.name} was measured on a part (limit {found.limit:g}): not comparable."
            )
    return notes


def _plain(row: LeaderboardRow) -> Plain:
    average, without_drop = averages(row.scores)
    scores = dict(zip((task.name for task in LEADERBOARD_TASKS), row.scores, strict=True))
    return {
        "model": row.model,
        "measured_by": row.measured_by,
        "scores": scores,
        "average": average,
        "average_without_drop": without_drop,
    }
