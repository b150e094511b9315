"""lm-evaluation-harness over a trained model, with the few-shot counts of Notus's table.

    python eval.py harness runs/notus-7b-v1/final                  # the seven tasks of the table
    accelerate launch eval.py harness MODEL                        # the examples shared over GPUs
    python eval.py harness MODEL --tasks my_task --tasks-dir my_tasks

Each task's results are written as soon as it is done, to a new file that `score lm_eval` reads.
"""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from notus.data.tokenizer import load_tokenizer
from notus.errors import UserError
from notus.evals.leaderboard import read_results, report_lm_eval, result_files
from notus.evals.published import LEADERBOARD_TASKS
from notus.evals.tables import add_json_option, check_new
from notus.model.weights import open_model

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

FEW_SHOT = {task.name: task.few_shot for task in LEADERBOARD_TASKS}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `harness` to the command line."""
    about = "run lm-evaluation-harness with the few-shot counts of Notus's table"
    parser = commands.add_parser("harness", help=about, description=about)
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder or hub id")
    parser.add_argument(
        "--tasks",
        default="openllm",
        help="openllm, the leaderboard's seven tasks of November 2023 (the default), or task names "
        "with commas between; those seven get the leaderboard's few-shot counts, others their own",
    )
    parser.add_argument(
        "--tasks-dir", type=Path, help="a folder of further task files (YAML), for --tasks to name"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/lm_eval"),
        help="the results go to a folder named after the model in this one (default: %(default)s)",
    )
    parser.add_argument("--batch-size", default="8", help="sequences at once, or auto (default: 8)")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="of the weights (default: %(default)s, as Notus was measured)",
    )
    parser.add_argument(
        "--bos",
        action="store_true",
        help="put the tokenizer's BOS first; Notus was measured without",
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="only so many examples of each task, to try things out",
    )
    add_json_option(parser)
    parser.set_defaults(run=run_harness)


def run_harness(options: argparse.Namespace) -> int:
    """The command `harness`; returns the exit code."""
    check_new(options.json)
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit: found {options.limit}, expected at least 1")
    if not re.fullmatch("[1-9][0-9]*|auto", options.batch_size):
        raise UserError(f"--batch-size: found {options.batch_size}, expected 1 or more, or auto")
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UserError(
            f"harness needs lm-evaluation-harness, and there is no module {error.name}: "
            "pip install -e '.[eval]'"
        ) from None

    folder, _ = open_model(options.model)
    load_tokenizer(folder)
    if options.tasks_dir is not None and not any(options.tasks_dir.rglob("*.y*ml")):
        raise UserError(f"--tasks-dir {options.tasks_dir}: there is no task file (YAML) in it")
    manager = TaskManager(include_path=options.tasks_dir and str(options.tasks_dir))
    names = task_names(options.tasks, manager.all_tasks)
    output = results_folder(options.out, options.model)
    check_not_measured(output, names)
    for name in names:  # all data sets before the first task: some tasks take hours
        check_loads(manager, name)
    files = evaluate_tasks(
        folder,
        names,
        manager,
        output,
        model_name=options.model,
        dtype=options.dtype,
        add_bos=options.bos,
        batch_size=options.batch_size,
        limit=options.limit,
    )
    if files:  # of several processes one writes
        report_lm_eval(files, options.json)
        print(f"\nThe results are in {output}; `score lm_eval {output}` shows them again.")
    return 0


def task_names(tasks: str, known: Iterable[str]) -> list[str]:
    """The tasks that --tasks asks for; UserError for one that the harness does not know."""
    if tasks == "openllm":
        return list(FEW_SHOT)
    names = [name.strip() for name in tasks.split(",")]
    known = set(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UserError(
                f'--tasks: there is no task "{name}"{hint}; `lm_eval ls tasks` lists them all, '
                "and --tasks-dir adds your own"
            )
        if names.count(name) > 1:
            raise UserError(f'--tasks: "{name}" is there twice; expected each task once')
    return names


def results_folder(out: Path, model: str) -> Path:
    """Where the results of a model belong: named after its path, slashes as two underscores."""
    return out / model.strip("/").replace("/", "__")


def check_not_measured(output: Path, names: Sequence[str]) -> None:
    """Raise UserError if `output` holds results of one of the tasks, or cannot be a folder."""
    if output.is_dir() and any(output.iterdir()):
        _, results = read_results(result_files(output))
        for name in names:
            if name in results:
                raise UserError(
                    f"{name}: {results[name].file} holds its results, which are not replaced; give "
                    "another --out, move that file away, or name the other tasks in --tasks"
                )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {output} cannot be made: {error}") from None


def check_loads(manager: "TaskManager", name: str) -> None:
    """Raise UserError if a task's data set cannot be had."""
    try:
        manager.load([name])
    except OSError as error:  # datasets' and the hub's: no network, no such data set, no such file
        raise UserError(
            f"{name}: its data set is neither in the local cache nor to be had: {error}; run once "
            "where there is a network, or give a task whose data is in a file with --tasks-dir"
        ) from None


def evaluate_tasks(
    folder: Path,
    names: Sequence[str],
    manager: "TaskManager",
    output: Path,
    *,
    model_name: str,
    dtype: str,
    add_bos: bool,
    batch_size: str,
    limit: int | None,
) -> list[Path]:
    """Run the tasks one after the other; the results files, which rank 0 alone writes.

    The prompts are plain text without the chat template, as the leaderboard's were. One task at a
    time, because the harness takes one few-shot count per call, and because what is done is then
    on disk.
    """
    import lm_eval
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM

    arguments: dict[str, Any] = {
        "pretrained": str(folder),
        "dtype": dtype,
        "add_bos_token": add_bos,
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = batch_size if batch_size == "auto" else int(batch_size)
    model = HFLM(**arguments, device=device, batch_size=size)
    files = []
    for name in names:
        # A name that ends in .json makes the tracker put the file there, with the time in its name.
        tracker = EvaluationTracker(output_path=str(output / "results.json"))
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments | {"pretrained": model_name},
            tasks=[name],
            num_fewshot=FEW_SHOT.get(name),
            task_manager=manager,
            evaluation_tracker=tracker,
            batch_size=size,
            limit=limit,
            log_samples=False,
        )
        if results is None:  # not rank 0
            continue
        before = set(output.iterdir())
        tracker.save_results_aggregated(results)
        written = sorted(set(output.iterdir()) - before)
        if len(written) != 1:  # the harness logs a failure to write, and goes on
            raise UserError(f"{output}: the results of {name} could not be written there")
        files += written
    return files
