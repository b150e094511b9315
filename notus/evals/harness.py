"""lm-evaluation-harness on a saved model, with the few-shot counts of Notus's table.

    python eval.py harness runs/notus-7b-v1/final                  # the seven tasks of the table
    accelerate launch eval.py harness MODEL                        # the GPUs share the examples
    python eval.py harness MODEL --tasks my_task --tasks-dir my_tasks

Each task's results are written as soon as it is done, to a new file that `score lm_eval` reads.
"""

import argparse
import difflib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from notus.console import emit
from notus.data.tokenizer import load_tokenizer
from notus.errors import UserError
from notus.evals.leaderboard import read_results, report_lm_eval
from notus.evals.options import add_json_option, at_least, model_path
from notus.evals.published import LEADERBOARD_TASKS
from notus.files import write_whole
from notus.model.weights import open_model

FEW_SHOT = {name: task.few_shot for name, task in LEADERBOARD_TASKS.items()}


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "run lm-evaluation-harness with the few-shot counts of Notus's table"
    parser = commands.add_parser("harness", help=about, description=about)
    add, dtypes, out = parser.add_argument, ("bfloat16", "float16", "float32"), "runs/lm_eval"
    about = "a Hugging Face folder, a run's output_dir, or a hub id"
    add("model", metavar="MODEL", type=model_path, help=about)
    add("--tasks", default="openllm", help="comma-separated names (default: the table's seven)")
    add("--tasks-dir", type=Path, help="a folder of your own task files (YAML), for --tasks")
    add("--out", type=Path, default=Path(out), help=f"results go to OUT/MODEL (default: {out})")
    add("--batch-size", type=size_or_auto, default=8, help="sequences, or auto (default: 8)")
    add("--dtype", default="bfloat16", choices=dtypes, help="of the weights (default: %(default)s)")
    add("--bos", action="store_true", help="start with the tokenizer's BOS; Notus had none")
    add("--limit", type=at_least(1), help="use only so many examples of each task, for a trial")
    add_json_option(parser)
    parser.set_defaults(run=run_harness)


def size_or_auto(text: str) -> int | str:
    return text if text == "auto" else at_least(1)(text)


def run_harness(options: argparse.Namespace) -> None:
    """Evaluate each task with its own few-shot count, on plain text as the leaderboard did."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable
    except ModuleNotFoundError as error:
        raise UserError(f"harness needs {error.name}: pip install -e '.[eval]'") from None
    folder, _ = open_model(options.model)
    load_tokenizer(folder)
    manager = TaskManager(include_path=options.tasks_dir and str(options.tasks_dir))
    names = task_names(options.tasks, manager.all_tasks)
    output = options.out / options.model.strip("/").replace("/", "__")
    check_not_measured(output, names)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {output} cannot be made: {error}") from None
    for name in names:  # all data sets before the first task: some tasks take hours
        try:
            manager.load([name])
        except OSError as error:  # no network, no such data set, no such file
            raise UserError(f"{name}: its data set cannot be loaded: {error}") from None

    arguments = {"dtype": options.dtype, "add_bos_token": options.bos}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(folder), device=device, batch_size=options.batch_size, **arguments)
    files = []
    for name in names:
        results = lm_eval.simple_evaluate(
            model=model,
            model_args=arguments | {"pretrained": options.model},
            tasks=[name],
            num_fewshot=FEW_SHOT.get(name),
            task_manager=manager,
            batch_size=options.batch_size,
            limit=options.limit,
            log_samples=False,
        )
        if results is not None:  # only rank 0 has them
            results["model_name"] = options.model
            files.append(output / f"results_{name}.json")
            text = json.dumps(results, indent=2, default=handle_non_serializable)
            write_whole(files[-1], text, durable=True)
    if files:
        report_lm_eval(files, options.json)
        emit(f"\nThe results are in {output}; `score lm_eval {output}` shows them again.")


def task_names(tasks: str, known: Iterable[str]) -> list[str]:
    """The names in --tasks. Raises UserError for one that the harness does not know."""
    if tasks == "openllm":
        return list(FEW_SHOT)
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",")))
    for name in set(names) - set(known):
        nearest = difflib.get_close_matches(name, list(known), n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise UserError(f"--tasks: there is no task {name!r}{hint}; --tasks-dir adds your own")
    return names


def check_not_measured(output: Path, names: Sequence[str]) -> None:
    """Raise UserError if `output` holds results of one of the tasks."""
    for found in read_results(sorted(output.glob("results*.json")))[1]:
        if found.task in names:
            raise UserError(
                f"{found.task}: {found.file} holds its results, which are not replaced; give "
                "another --out, move that file away, or name the other tasks in --tasks"
            )
