"""Training speed of train.py next to TRL's DPOTrainer, each with its best settings.

    pip install -e . && pip install -r benchmarks/requirements.txt
    python -m benchmarks.train_speed --repeats 0 --json parity.json     # one CUDA GPU: model A, uf
    python -m benchmarks.train_speed --parity parity.json               # in another ten minutes
    python -m benchmarks.train_speed --sides notus --trace              # where the time goes
    python -m benchmarks.train_speed --sweep --json sweep.json          # the best settings, slowly
    python -m benchmarks.train_speed --model toy --pairs FILE --tokenizer MODEL     # on a CPU

Both train the same random Mistral from the same weights on the same pairs with the same optimiser:
`A` has 8 layers of Mistral-7B's width, `B` all 32, `toy` 4 layers of width 256 (and `tiny`, of the
tests, 2 of 64). Tokens are uniform random, lengths those of a profile (benchmarks/roofline.py, seed
0), or both come from real text (rows of plain text need `--format turns`). Every run is a process
of its own. Parity comes first: two optimiser steps on the same pairs in the same order, in which
every sequence's log-prob, the loss and the gradient norm must agree; where they do not, the ratio
is marked as not valid. The runs then alternate, TRL first, `--repeats` times. The report is written
after every run; a failed run leaves all that it printed in a file next to the report.

What is timed is whole optimiser steps, from the end of one to the end of the next: data, sums over
ranks, clipping, update and logging. The first `--warm` steps are not counted. Each side sees the
same pairs in the steps that are timed. notus is train.py's `main`: it is given tokens, as TRL is,
hashes no weights and saves nothing. The pass that computes the reference's log-probs is timed
separately.

TRL gets what it is fastest with: reference log-probs computed beforehand, no gradient
checkpointing unless memory asks for it, and pairs grouped by length over all steps at once, which
is at least as good as its own sampler's groups of 50 steps. It pads (`padding_free` does nothing in
1.16) and has no prefix sharing. `--trl` and `--notus` add settings of one side: arguments of
DPOConfig, and train.py's overrides.

    pairs/s, real tok/s     pairs and tokens (2 P + C + R) of the timed steps by their duration
    CPU                     pairs by the processor time the process used: on a busy machine
                            of several cores the fairer number, as waiting does not count
    MFU                     model FLOPs (every token once, roofline.py) by time and the data sheet's
                            rate, or, where there is none, that of a matrix product timed here
    HFU                     the FLOPs really done: padding, recomputation, the head's second pass
    peak                    max_memory_allocated on CUDA; on the CPU the process's resident memory
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, PreTrainedTokenizerFast

from benchmarks.head import environment
from benchmarks.memory import model_shape
from benchmarks.roofline import (
    MAX_LENGTH,
    MODELS,
    PROFILES,
    SEED,
    Processed,
    hardware_flops,
    measure_rates,
    packed,
    padded,
)
from benchmarks.trace import summarize_trace
from notus.config import Source
from notus.data.packing import slots_of
from notus.data.preferences import load_preferences
from notus.data.tokenization import TokenizedPairs, tokenize_pairs
from notus.data.tokenizer import load_tokenizer, sentencepiece_backend
from notus.demo import CHAT_TEMPLATE
from notus.dryrun.memory import OPTIMIZER_STATES
from notus.engine.flops import model_flops, peak_flops, peak_memory_bytes
from notus.errors import UserError
from notus.files import write_json
from notus.model.hf_config import ModelShape
from notus.model.mistral import MistralForCausalLM, count_parameters
from notus.tables import text_table

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "liger-kernel", "numpy")
PARITY_STEPS = 2
# Relative differences at parity. The norm in bfloat16: notus rounds the gradients of every
# microbatch to bfloat16, TRL sums float32 gradients under autocast.
TOLERANCES = {
    "float32": {"log_probs": 1e-4, "loss": 1e-3, "grad_norm": 1e-3},
    "bfloat16": {"log_probs": 2e-2, "loss": 1e-2, "grad_norm": 3e-2},
}
TINY = model_shape(layers=2, hidden=64, inner=192, heads=4, vocabulary=512)
SHAPES = MODELS | {"tiny": TINY}
FIRST_TOKEN = 3  # random tokens begin here: after padding and the ends of sequences

Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What both sides train. steps: warm and timed ones together."""

    model: str
    steps: int
    warm: int
    pairs_per_step: int
    dtype: str
    optimizer: str
    learning_rate: float


# ------------------------------------------------------------------------------- what is trained


def hf_config(shape: ModelShape) -> MistralConfig:
    """The shape as transformers' configuration."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "sliding_window")
    same = {name: getattr(shape, name) for name in names}
    return MistralConfig(pad_token_id=None, architectures=["MistralForCausalLM"], **same)


def write_policy(folder: Path, shape: ModelShape, dtype: torch.dtype) -> None:
    """A random model as a Hugging Face folder, with a tokenizer of few words.

    Weights are normal with deviation 0.02, as transformers initialises them; norms are 1.
    """
    folder.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.device("meta"):
        tensors = MistralForCausalLM(shape).state_dict()
    for name, weight in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(weight.shape, dtype=dtype)
        else:
            drawn = torch.empty(weight.shape, dtype=dtype, device=device)
            tensors[name] = drawn.normal_(0.0, 0.02, generator=generator).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hf_config(shape).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def random_pairs(profile: str, count: int, vocabulary: int) -> TokenizedPairs:
    """Pairs of uniform random tokens in the lengths of a profile, from SEED."""
    rng = np.random.default_rng(SEED)
    lengths = PROFILES[profile](count, rng)
    tokens = rng.integers(FIRST_TOKEN, vocabulary, int(lengths.sum())).astype(np.int32)
    return TokenizedPairs(tokens, np.zeros(len(tokens), bool), lengths)


def real_pairs(
    path: str, form: str | None, tokenizer: str, count: int, seed: int
) -> TokenizedPairs:
    """`count` pairs drawn from a preference file, as train.py tokenizes them.

    form: a name from notus/data/formats.py. tokenizer: a folder, or a sentencepiece model, to
    which a chat template is given. Raises UserError where there are too few.
    """
    if Path(tokenizer).is_dir():
        loaded = load_tokenizer(Path(tokenizer))
    else:
        loaded = PreTrainedTokenizerFast(
            tokenizer_object=sentencepiece_backend(Path(tokenizer)),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        )
        loaded.chat_template = CHAT_TEMPLATE
    rows = load_preferences([Source(path=path, format=form)], seed=seed).train
    pairs = tokenize_pairs(
        rows,
        loaded,
        style="clean",
        truncation="pair",
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_LENGTH // 2,
        system_prompt=None,
    ).pairs
    if len(pairs) < count:
        raise UserError(f"--pairs {path}: {len(pairs)} usable pairs, expected at least {count}")
    return pairs.select(np.random.default_rng(seed).permutation(len(pairs))[:count])


def write_pairs(path: Path, pairs: TokenizedPairs) -> None:
    """Tokens and lengths for the processes that train."""
    arrays = {"tokens": pairs.tokens, "lengths": pairs.lengths}
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def read_pairs(path: Path) -> TokenizedPairs:
    """What `write_pairs` wrote."""
    arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    return TokenizedPairs(
        arrays["tokens"], np.zeros(len(arrays["tokens"]), bool), arrays["lengths"]
    )


def grouped_order(lengths: np.ndarray, case: Case) -> np.ndarray:
    """An order in which each step's pairs have similar lengths: int64 [pairs].

    Within the warm steps, and within the timed ones, pairs are sorted by their longer sequence and
    cut into steps, which come in random order. transformers' group_by_length sorts 50 steps at once
    and begins with the longest; in few steps that would measure long pairs alone.
    """
    longer = lengths[:, 0] + lengths[:, 1:].max(1)
    rng = np.random.default_rng(SEED)
    border = case.warm * case.pairs_per_step
    order: list[np.ndarray] = []
    for part in (np.arange(border), np.arange(border, len(lengths))):
        ranked = part[np.argsort(-longer[part], kind="stable")]
        steps = ranked.reshape(-1, case.pairs_per_step)
        order.extend(steps[rng.permutation(len(steps))])
    return np.concatenate(order)


# ------------------------------------------------------------------------------- one measured run


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


def work_on(task: Path) -> None:
    """One run, as a process of its own: reads its task, writes the result beside it."""
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


def start(
    case: Case, side: str, settings: Settings, work: Path, pairs: TokenizedPairs,
    options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    """Run one side in a new process; its result, or {"failed": the last lines that it printed}.

    work: holds the policy. All that a failed run printed is kept next to the report.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"failed-{side}-", dir=work))
    (folder / "policy").symlink_to(work / "policy")
    write_pairs(folder / "pairs.safetensors", pairs.select(range(case.steps * case.pairs_per_step)))
    task, log = folder / "task.json", folder / "log"
    asked = {"case": asdict(case), "system": side, "settings": settings}
    write_json(task, asked | {"trace": options.trace and case.steps > PARITY_STEPS})
    variables = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # One place for all runs, so that the second need not compile again.
    compiled = Path(tempfile.gettempdir(), "notus-inductor")
    variables.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    if not torch.cuda.is_available():
        threads = str(options.threads)
        variables |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-m", "benchmarks.train_speed", "--task", str(task)]
    with log.open("wb") as handle:
        done = subprocess.run(
            command, cwd=REPOSITORY, env=variables, stdout=handle, stderr=subprocess.STDOUT
        )
    if done.returncode == 0:
        return json.loads(task.with_suffix(".result").read_text())
    kept = options.json.with_name(f"{options.json.stem}.{folder.name}.txt")
    shutil.copy(log, kept)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    words = "\n".join([*said[-3:], f"all that it printed: {kept}"])
    return {"system": side, "settings": settings, "failed": words}


# ---------------------------------------------------------------------------------- the comparison


def compare_start(ours: Mapping[str, Any], theirs: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Parity of two runs over the same steps: the worst relative differences, and the verdict."""
    worst: dict[str, Any] = {}
    for name in TOLERANCES[dtype]:
        both = np.array([ours[name], theirs[name]])
        worst[name] = float((np.abs(both[0] - both[1]) / np.abs(both).max(0)).max())
    return worst | {"holds": all(worst[name] <= most for name, most in TOLERANCES[dtype].items())}


def read_parity(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of parity from an earlier report. Raises UserError if its case is another."""
    earlier = json.loads(path.read_text())
    for name, value in expected.items():
        found = (earlier["case"] | earlier)[name]
        if found != value:
            raise UserError(f"--parity {path}: {name}: found {found}, expected {value}")
    if earlier["parity"] is None:
        raise UserError(f"--parity {path}: it holds no parity of two sides")
    return {name: earlier[name] for name in ("parity", "starts")}


def check_memory(case: Case, state_dtype: str, available: int) -> None:
    """Raise UserError if float32 weights, their gradients and the optimiser's state do not fit."""
    width = 2 if state_dtype == "bfloat16" else 4
    count = count_parameters(SHAPES[case.model])
    needed = (8 + width * OPTIMIZER_STATES[case.optimizer]) * count
    if needed > available:
        raise UserError(
            f"--model {case.model} with {case.optimizer}: weights, gradients and optimiser state "
            f"take {needed:,} bytes before any activation, the GPU has {available:,}"
        )


def best(results: Sequence[Mapping[str, Any]], side: str) -> Mapping[str, Any] | None:
    """The fastest run of one side: on CUDA by the clock, on the CPU by processor time."""
    rate = "pairs_per_second" if torch.cuda.is_available() else "cpu_pairs_per_second"
    runs = [run for run in results if run["system"] == side and "failed" not in run]
    return max(runs, key=lambda run: run[rate], default=None)


def ratios(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """notus by TRL, medians over the repeats."""
    found = {}
    for name in ("pairs_per_second", "cpu_pairs_per_second", "peak_memory_bytes"):
        sides = [
            [run[name] for run in results if run["system"] == side and "failed" not in run]
            for side in ("notus", "trl")
        ]
        if all(sides):
            ours, theirs = map(statistics.median, sides)
            found[name] = ours / theirs
    return found


# What each side gets where there was no sweep: the best of the sweeps in RESULTS.md.
WHOLE = {
    "trl": "per_device_train_batch_size=8 gradient_checkpointing=true",
    "notus": "parallel.activation_checkpointing=selective",
}
PART = {
    "trl": "per_device_train_batch_size=8",
    "notus": "parallel.activation_checkpointing=none",
}
SMALL = {
    "trl": "per_device_train_batch_size=2",
    "notus": "parallel.activation_checkpointing=none data.tokens_per_microbatch=8192",
}
KNOWN = {"A": PART, "B": WHOLE, "toy": SMALL, "tiny": SMALL}
TRL_DEFAULTS = "grouped=false gradient_checkpointing=true precompute_ref_log_probs=false"
# What a sweep tries on top of that: settings that may be the best, and TRL's defaults.
SWEEP_SMALL = {
    "trl": [*(f"per_device_train_batch_size={count}" for count in (1, 2, 4)), TRL_DEFAULTS],
    "notus": [f"data.tokens_per_microbatch={slots}" for slots in (2048, 4096, 8192)],
}
SWEEP = {
    "trl": [
        *(f"per_device_train_batch_size={count}" for count in (4, 8, 16, 32)),
        "gradient_checkpointing=true",
        "attn_implementation=flex_attention",
        "torch_compile=true",
        "use_liger_kernel=true",
        "weights=bfloat16",
        TRL_DEFAULTS,
    ],
    "notus": [
        *(
            f"parallel.activation_checkpointing={mode} data.tokens_per_microbatch={slots}"
            for mode in ("none", "selective")
            for slots in (8192, 16384)
        ),
        "parallel.attention=varlen",
        "parallel.activation_checkpointing=none parallel.keep_gathered=true",
    ],
}


def settings_in(words: str) -> Settings:
    """Settings from words, each key=value."""
    return dict(map(assignment, words.split()))


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run that did not fail."""
    header = "side|step s|IQR|pairs/s|CPU|real tok/s|processed|MFU|HFU|peak GiB|ref s|settings"
    rows = []
    for run in (run for run in results if "failed" not in run):
        names = ("median_seconds", "iqr_seconds", "pairs_per_second", "cpu_pairs_per_second")
        rates = ("real_tokens_per_second", "processed_tokens_per_second")
        row = [run["system"], *(run[name] for name in names), *(round(run[name]) for name in rates)]
        row += [run[f] if run[f] is not None else run[f"{f}_of_matmul"] for f in ("mfu", "hfu")]
        row += [run["peak_memory_bytes"] / 2**30, run.get("reference_seconds")]
        rows.append([*row, " ".join(f"{key}={value}" for key, value in run["settings"].items())])
    return text_table(header.split("|"), rows)


def assignment(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value being JSON or else a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"found {text}, expected KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(SHAPES), default="A" if cuda else "toy")
    parser.add_argument("--sides", choices=[*RUNNERS, "both"], help="default: both, if TRL is here")
    parser.add_argument("--profile", choices=list(PROFILES), default="uf")
    parser.add_argument("--pairs", help="a preference file, instead of a profile")
    parser.add_argument("--format", help="of --pairs, as data.train[].format; default: detected")
    parser.add_argument("--tokenizer", help="for --pairs: a folder or a sentencepiece model")
    parser.add_argument("--pairs-per-step", type=int, default=64 if cuda else 8)
    parser.add_argument("--warm", type=int, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, help="steps that are timed")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side; 0: parity only")
    parser.add_argument("--parity", type=Path, help="an earlier report to take parity from")
    parser.add_argument("--trace", action="store_true", help="profile a warm step of notus")
    parser.add_argument("--sweep", action="store_true", help="look for each side's best settings")
    parser.add_argument("--optimizer", choices=["adamw", "rmsprop"], help="default: B rmsprop")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=1, help="of each process, on a CPU")
    parser.add_argument("--trl", nargs="+", type=assignment, default=[], metavar="KEY=VALUE")
    parser.add_argument("--notus", nargs="+", type=assignment, default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, default=Path("train_speed.json"), help="the report")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    whole = options.model == "B"
    if options.sides is None:
        options.sides = "notus" if find_spec("trl") is None else "both"
    if options.warm is None:
        options.warm = 5 if options.trace else (3 if whole else 5) if cuda else 1
    if options.steps is None:
        options.steps = (6 if whole else 15) if cuda else 4
    if (options.pairs is None) != (options.tokenizer is None):
        parser.error("--pairs and --tokenizer: found one of them, expected both or neither")
    if options.trace and options.warm < 4:
        parser.error(f"--trace takes the third step: found --warm {options.warm}, expected 4")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.task is not None:
        work_on(options.task)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    case = Case(
        model=options.model,
        steps=options.warm + options.steps,
        warm=options.warm,
        pairs_per_step=options.pairs_per_step,
        dtype="bfloat16" if cuda else "float32",
        optimizer=options.optimizer or ("rmsprop" if options.model == "B" else "adamw"),
        learning_rate=options.learning_rate,
    )
    given = {"trl": dict(options.trl), "notus": dict(options.notus)}
    data = options.pairs or options.profile
    report: dict[str, Any] = {
        "environment": environment(device, PACKAGES),
        "threads": None if cuda else options.threads,
        "case": asdict(case),
        "data": data,
        "seed": SEED,
        "shape": asdict(SHAPES[case.model]),
        "parity": None,
        "sweep": [],
        "starts": {},
        "results": [],
        "ratios": {},
    }
    if options.parity is not None:
        same = ("model", "pairs_per_step", "dtype", "optimizer", "learning_rate")
        expected = {name: report["case"][name] for name in same} | {"data": data}
        report |= read_parity(options.parity, expected)
    if cuda:
        state_dtype = given["notus"].get("optimizer.state_dtype", "float32")
        check_memory(case, state_dtype, torch.cuda.get_device_properties(0).total_memory)
    shape, count = SHAPES[case.model], max(case.steps, PARITY_STEPS) * case.pairs_per_step
    if options.pairs is None:
        pairs = random_pairs(options.profile, count, shape.vocab_size)
    else:
        pairs = real_pairs(options.pairs, options.format, options.tokenizer, count, SEED)
        if pairs.tokens.max() >= shape.vocab_size:
            raise UserError(
                f"--tokenizer {options.tokenizer}: found the token {pairs.tokens.max():,}, "
                f"expected ids below {shape.vocab_size:,}, as --model {options.model} has"
            )
    with tempfile.TemporaryDirectory() as folder:
        weights = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
        write_policy(Path(folder, "policy"), shape, weights)

        def run(case: Case, side: str, settings: Settings) -> dict[str, Any]:
            result = start(case, side, settings, Path(folder), pairs, options)
            print(result.get("failed") or table([result]), flush=True)
            return result

        for _ in measure(case, options, given, run, report):
            write_json(options.json, report)  # the machine may be taken away
    write_json(options.json, report)
    print(f"\n{report['environment']}\n{case}, {data}\n")
    if report["sweep"]:
        print(f"sweep\n{table(report['sweep'])}\n")
    print(table(report["results"]))
    return verdict(report, options.sides == "both")


def measure(
    case: Case,
    options: argparse.Namespace,
    given: Mapping[str, Settings],
    run: Callable[[Case, str, Settings], dict[str, Any]],
    report: dict[str, Any],
) -> Iterator[None]:
    """All runs, of which the report is told; yields after each. given: settings of each side."""
    sides = list(RUNNERS) if options.sides == "both" else [options.sides]
    known = KNOWN[case.model]
    chosen = {side: settings_in(known[side]) for side in sides}
    if options.sweep:
        for side in sides:
            for words in (SWEEP_SMALL if known is SMALL else SWEEP)[side]:
                settings = chosen[side] | settings_in(words) | given[side]
                report["sweep"].append(run(case, side, settings))
                yield
        for side in sides:
            if (winner := best(report["sweep"], side)) is not None:
                chosen[side] = dict(winner["settings"])
    chosen = {side: chosen[side] | given[side] for side in sides}
    if len(sides) == 2 and options.parity is None:
        two_steps = replace(case, steps=PARITY_STEPS, warm=0)
        starts = report["starts"]
        for side in sides:
            starts[side] = run(two_steps, side, chosen[side])
            yield
        if not any("failed" in start for start in starts.values()):
            report["parity"] = compare_start(starts["notus"], starts["trl"], case.dtype)
    for _ in range(options.repeats):
        for side in sides:
            report["results"].append(run(case, side, chosen[side]))
            report["ratios"] = ratios(report["results"])
            yield


def verdict(report: Mapping[str, Any], compared: bool) -> int:
    """Print parity and ratios; the exit code, 1 if a run failed or parity does not hold."""
    failed = any("failed" in run for run in (*report["starts"].values(), *report["results"]))
    for run in (run for run in report["results"] if "failed" not in run):
        mfu = run["mfu"] if run["mfu"] is not None else run["mfu_of_matmul"]
        traced = f"; traced: a step of {run['trace']['words']}" if "trace" in run else ""
        print(f"{run['system']}: {run['pairs_per_second']:.3g} pairs/s, MFU {mfu:.1%}{traced}")
    if not compared:
        return int(failed)
    parity, found = report["parity"], report["ratios"]
    held = "parity unknown: a run failed"
    if parity is not None:
        worst = ", ".join(f"{name} {parity[name]:.1e}" for name in TOLERANCES["float32"])
        held = f"parity {'holds' if parity['holds'] else 'DOES NOT HOLD'} ({worst})"
    words = "no ratio"
    if found:
        words = (
            f"notus / TRL: {found['pairs_per_second']:.2f} x pairs/s, "
            f"{found['cpu_pairs_per_second']:.2f} x per processor second, "
            f"{found['peak_memory_bytes']:.2f} x peak memory"
        )
    valid = parity is not None and parity["holds"]
    print(f"{words}; {held}" if valid or not found else f"NOT VALID: {words}; {held}")
    return int(failed or not valid)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
