"""One run of the speed benchmark, a process of its own: train.py, or TRL's DPOTrainer.

python -m benchmarks.speed_runs TASK        # a file of benchmarks/train_speed.py
"""

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.roofline import (
    MAX_LENGTH,
    Processed,
    hardware_flops,
    measure_rates,
    packed,
    padded,
)
from benchmarks.speed_case import PARITY_STEPS, SHAPES, Case, grouped_order, read_pairs
from benchmarks.trace import summarize_trace
from notus.data.packing import slots_of
from notus.data.tokenization import TokenizedPairs
from notus.engine.flops import model_flops, peak_flops, peak_memory_bytes
from notus.errors import UserError
from notus.files import write_json

Settings = dict[str, Any]


def clock() -> tuple[float, float]:
    """Wall clock and this process's processor time, in seconds."""
    return time.perf_counter(), time.process_time()


def timed(function: Callable[..., Any], found: dict[str, Any]) -> Callable[..., Any]:
    """A function that notes down how long it takes, as that of the reference pass."""

    def call(*arguments: Any) -> Any:
        began = clock()
        result = function(*arguments)
        wall, processor = (now - then for now, then in zip(clock(), began, strict=True))
        found.update(reference_seconds=wall, reference_cpu_seconds=processor)
        return result

    return call


def notus_overrides(case: Case, settings: Settings, work: Path) -> list[str]:
    """train.py's command line after the configuration file."""
    values = {
        "model.policy": str(work / "policy"),
        "model.compute_dtype": case.dtype,
        "data.train": [{"path": str(work / "rows.jsonl")}],
        "data.shuffle": False,
        "optimizer.name": case.optimizer,
        "optimizer.learning_rate": case.learning_rate,
        "schedule.name": "constant",
        "schedule.warmup_ratio": 0.0,
        "train.pairs_per_step": case.pairs_per_step,
        "train.max_steps": case.steps,
        "checkpoint.every": None,
        "output_dir": str(work / "notus"),
    }
    return [f"{key}={json.dumps(value)}" for key, value in (values | settings).items()]


def run_notus(case: Case, settings: Settings, work: Path, trace: bool) -> dict[str, Any]:
    """Train with train.py's own `main`; what it took, and what it logged.

    trace: profile the third step, which is not timed.
    """
    import train
    from notus import build, start
    from notus.engine.log import MetricsLog

    pairs = read_pairs(work / "pairs.safetensors")
    marks, found = [], {}
    loop, write = train.train, MetricsLog.write
    saver = MagicMock()  # nothing is saved
    saver.return_value.__exit__.return_value = saver.return_value.wait.return_value = None

    def timed_write(log: MetricsLog, step: int, metrics: Mapping[str, float]) -> None:
        write(log, step, metrics)
        marks.append(clock())  # step 0 too, before the first one begins

    def train_and_stop(run: Any, *others: Any) -> bool:
        if case.steps == PARITY_STEPS:
            scored = train.score(run.policy, run.pairs, range(case.pairs_per_step), run.rows)
            flat = scored.double().cpu()
            counts = torch.from_numpy(pairs.lengths[: case.pairs_per_step, 1:].reshape(-1))
            found["log_probs"] = torch.segment_reduce(flat, "sum", lengths=counts).tolist()
        divisions = [run.plan.division(run.plan.pairs_of(step)) for step in range(case.steps)]
        found["rows"] = [[len(d.bins), d.slots] for d in divisions]
        loop(run, *others)
        return False  # as a signal would end it: nothing is exported

    # Rows that only name the pairs: what they become is given.
    rows = [
        {"prompt": f"{i} ?", "chosen": f"{i} !", "rejected": f"{i} ."} for i in range(len(pairs))
    ]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = SimpleNamespace(pairs=pairs, kept=[SimpleNamespace(where="")] * len(pairs), counts={})
    replaced = (
        (build, "load_data", lambda *arguments: {"train": data}),
        (build, "build_references", timed(build.build_references, found)),
        (train, "train", train_and_stop),
        (MetricsLog, "write", timed_write),
        (start, "Saver", saver),
        (start, "hash_weights", lambda path, folder: {"path": path, "sha256": "random"}),
    )
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(patch.object(module, name, value))
        (work / "config.json").write_text("{}")
        words = [str(work / "config.json"), *notus_overrides(case, settings, work)]
        code = train.main(words + ["--profile", "1"] * trace)
    if code != 0:
        raise UserError(f"train.py ended with code {code}")
    lines = (work / "notus" / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "loss" in line]
    if trace:
        found["trace"] = summarize_trace(work / "notus/profile/trace-0.json.gz")
    slots = sum(rows * slots for rows, slots in found["rows"][case.warm :])
    return found | {
        "marks": marks,
        "processed": asdict(packed(pairs.lengths[case.warm * case.pairs_per_step :], slots)),
        "loss": [line["loss"] for line in logged],
        "grad_norm": [line["grad_norm"] for line in logged],
    }


def run_trl(case: Case, settings: Settings, work: Path, trace: bool) -> dict[str, Any]:
    """Train with DPOTrainer; settings: "grouped", "weights" (a dtype), else DPOConfig's.

    trace: ignored.
    """
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    settings = dict(settings)
    grouped, weights = settings.pop("grouped", True), settings.pop("weights", "float32")
    attention = settings.pop("attn_implementation", "sdpa")
    pairs = read_pairs(work / "pairs.safetensors")
    order = np.arange(len(pairs))
    if grouped and case.steps > PARITY_STEPS:
        order = grouped_order(pairs.lengths, case)
    columns = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for index in order:
        for column, part in zip(columns.values(), pairs.parts(index), strict=True):
            column.append(pairs.tokens[part].tolist())
    marks, batches, found = [], [], {}

    class TimedTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            return timed(super()._precompute_ref_logps, found)(*arguments)

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            batches.append(list(inputs["input_ids"].shape))
            return super()._compute_loss(model, inputs, return_outputs)

    class Marks(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            marks.append(clock())

        def on_log(self, *arguments: Any, **options: Any) -> None:
            if len(marks) <= case.steps:  # not the summary at the end
                marks.append(clock())

    cuda = torch.cuda.is_available()
    microbatch = min(settings.pop("per_device_train_batch_size", 8), case.pairs_per_step)
    optimizers = {"adamw": "adamw_torch_fused" if cuda else "adamw_torch", "rmsprop": "rmsprop"}
    arguments = {
        "output_dir": str(work / "trl"),
        "max_length": MAX_LENGTH,
        "max_steps": case.steps,
        "per_device_train_batch_size": microbatch,
        "gradient_accumulation_steps": case.pairs_per_step // microbatch,
        "train_sampling_strategy": "sequential",
        "precompute_ref_log_probs": True,
        "gradient_checkpointing": False,
        "optim": optimizers[case.optimizer],
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": case.dtype == "bfloat16",
        "use_cpu": not cuda,
        "remove_unused_columns": False,
        "model_init_kwargs": {"dtype": weights, "attn_implementation": attention},
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    trainer = TimedTrainer(
        model=str(work / "policy"),
        args=DPOConfig(**(arguments | settings)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=PreTrainedTokenizerFast.from_pretrained(work / "policy"),
        callbacks=[Marks()],
    )
    trainer.remove_callback(PrinterCallback)
    if case.steps == PARITY_STEPS:
        both = [trainer.train_dataset[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
        rows = zip(*(column[: case.pairs_per_step] for column in both), strict=True)
        found["log_probs"] = [float(value) for row in rows for value in row]
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    per_step = case.pairs_per_step // microbatch
    scored = float(pairs.lengths[case.warm * case.pairs_per_step :, 1:].sum())
    return found | {
        "marks": marks,
        "processed": asdict(padded(batches[case.warm * per_step :], scored)),
        "loss": [entry["loss"] for entry in logged],
        "grad_norm": [entry["grad_norm"] for entry in logged],
        "arguments": arguments | settings,
    }


RUNNERS = {"trl": run_trl, "notus": run_notus}


def summarize(
    case: Case, system: str, settings: Settings, pairs: TokenizedPairs, run: Mapping[str, Any]
) -> dict[str, Any]:
    """Step times and rates over the timed steps, from what a runner returned."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = {"peak_memory_bytes": peak_memory_bytes(device)}  # before anything else is allocated
    if device.type == "cuda":
        peak["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    marks = np.array(run["marks"])[case.warm :]
    wall, processor = np.diff(marks, axis=0).T
    lengths = pairs.lengths[case.warm * case.pairs_per_step :]
    shape, total = SHAPES[case.model], float(wall.sum())
    model = model_flops(shape, lengths)
    hardware = hardware_flops(
        shape,
        Processed(**run["processed"]),
        recomputed_blocks=(
            settings.get("parallel.activation_checkpointing") == "full"
            or settings.get("gradient_checkpointing", False)
        ),
        online_reference=(
            settings.get("reference.log_probs") == "online"
            or not settings.get("precompute_ref_log_probs", True)
        ),
    )
    matmul, sheet = measure_rates(device).matmul, peak_flops(device)
    quarters = statistics.quantiles(wall, n=4) if len(wall) > 1 else [wall[0]] * 3
    return peak | {
        "step_seconds": wall.tolist(),
        "step_cpu_seconds": processor.tolist(),
        "median_seconds": statistics.median(wall),
        "iqr_seconds": quarters[2] - quarters[0],
        "pairs_per_second": len(lengths) / total,
        "cpu_pairs_per_second": len(lengths) / float(processor.sum()),
        "real_tokens_per_second": int(slots_of(lengths, prefix_sharing=False).sum()) / total,
        "processed_tokens_per_second": run["processed"]["slots"] / total,
        "matmul_flops": matmul,
        "mfu": None if sheet is None else model / total / sheet,
        "hfu": None if sheet is None else hardware / total / sheet,
        "mfu_of_matmul": model / total / matmul,
        "hfu_of_matmul": hardware / total / matmul,
    }


def main(task: Path) -> None:
    """One run: read its task, and write the result to the file next to it that ends in .result."""
    asked = json.loads(task.read_text())
    case, side, settings = Case(**asked["case"]), asked["system"], asked["settings"]
    work = task.parent
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run = RUNNERS[side](case, settings, work, asked["trace"])
    pairs = read_pairs(work / "pairs.safetensors")
    result = {"system": side, "settings": settings, "memory_at_start_bytes": began} | run
    write_json(task.with_suffix(".result"), result | summarize(case, side, settings, pairs, run))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
