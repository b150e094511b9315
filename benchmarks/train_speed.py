"""Training speed side by side: train.py and TRL's DPOTrainer, each with its best settings.

    pip install -e . && pip install -r benchmarks/requirements.txt
    python -m benchmarks.train_speed --sweep --json sweep.json    # finds the best settings, slowly
    python -m benchmarks.train_speed                              # one CUDA GPU: model A, uf
    python -m benchmarks.train_speed --model B --profile longprompt
    python -m benchmarks.train_speed --model toy --pairs FILE --tokenizer MODEL     # on a CPU

Both train the same random Mistral from the same weights on the same pairs with the same optimiser:
`A` has 8 layers of Mistral-7B's width, `B` all 32, `toy` 4 layers of width 256 (and `tiny`, of the
tests, 2 of 64). Tokens are uniform random, lengths those of a profile (benchmarks/roofline.py, seed
0), or both come from real text. Every run is a process of its own. First comes parity: two
optimiser steps on the same pairs in the same order, in which every sequence's log-prob, the loss
and the gradient norm must agree; where they do not, no ratio is printed. Then the runs alternate,
TRL first, `--repeats` times.

What is timed is whole optimiser steps, from the end of one to the end of the next: data, sums over
ranks, clipping, update and logging. The first `--warm` steps are not counted. Each side sees the
same pairs in the steps that are timed. notus is train.py's `main`: tokens are handed to it ready,
as to TRL, and nothing is saved. The pass that computes the reference's log-probs is timed apart.

TRL gets what it is fastest with: reference log-probs computed beforehand, no gradient
checkpointing unless memory asks for it, and pairs grouped by length over all steps at once, which
is at least as good as its own sampler's groups of 50 steps. It pads (`padding_free` does nothing in
1.16) and has no prefix sharing. `--trl` and `--notus` add settings of one side: arguments of
DPOConfig, and train.py's overrides.

    pairs/s, real tok/s     pairs and tokens (2 P + C + R) of the timed steps by their duration
    CPU pairs/s             by the processor time the process used instead: on a busy machine
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
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

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
from notus.config import Source
from notus.data.packing import slots_of
from notus.data.preferences import load_preferences
from notus.data.tokenization import TokenizedPairs, tokenize_pairs
from notus.data.tokenizer import load_tokenizer, sentencepiece_backend
from notus.engine.flops import model_flops, peak_flops, peak_memory_bytes
from notus.errors import UserError
from notus.model.hf_config import ModelShape
from notus.model.mistral import MistralForCausalLM

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "liger-kernel", "numpy")
PARITY_STEPS = 2
# Relative differences between the two at parity: of one sequence's log-prob, of loss and norm.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 1e-2)}
TINY = model_shape(layers=2, hidden=64, inner=192, heads=4, vocabulary=512)
SHAPES = MODELS | {"tiny": TINY}
FIRST_TOKEN = 3  # random tokens begin here: after padding and the ends of sequences

# Renders as Zephyr's does, for a tokenizer that has no template.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

Settings = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What both sides train: see the options of the command line.

    steps: warm and timed ones together.
    """

    model: str
    steps: int
    warm: int
    pairs_per_step: int
    dtype: str
    optimizer: str
    learning_rate: float


# ------------------------------------------------------------------------------- what is trained


def write_policy(folder: Path, shape: ModelShape, dtype: torch.dtype) -> None:
    """A random model as a Hugging Face folder, one file per block, with a tokenizer of few words.

    Weights are normal with deviation 0.02, as transformers initialises them; norms are 1.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        meta = MistralForCausalLM(shape).state_dict()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(SEED)

    def value(name: str) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(meta[name].shape, dtype=dtype)
        drawn = torch.empty(meta[name].shape, dtype=dtype, device=device)
        return drawn.normal_(0.0, 0.02, generator=generator).cpu()

    files: dict[str, list[str]] = {}
    for name in meta:
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in files.items():
        save_file({name: value(name) for name in names}, folder / file, metadata={"format": "pt"})
    index = {name: file for file, names in files.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    MistralConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        rms_norm_eps=shape.rms_norm_eps,
        sliding_window=shape.sliding_window,
        tie_word_embeddings=False,
        pad_token_id=None,
        architectures=["MistralForCausalLM"],
    ).save_pretrained(folder)
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


class Clock:
    """When each optimiser step ended: wall clock and this process's processor time, in seconds."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))


class NotSaved:
    """In place of checkpoint.Saver: a benchmark leaves no checkpoints."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> "NotSaved":
        return self

    def __exit__(self, *raised: Any) -> None:
        pass

    def save(self, *arguments: Any) -> None:
        pass

    def wait(self) -> None:
        pass


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


def run_notus(case: Case, settings: Settings, work: Path) -> dict[str, Any]:
    """Train with train.py's own `main`; what it took, and what it logged."""
    import train
    from notus import build, start
    from notus.engine.log import MetricsLog

    pairs = read_pairs(work / "pairs.safetensors")
    clock, found = Clock(), {}
    loop, reference, write = train.train, build.build_references, MetricsLog.write

    def timed_write(log: MetricsLog, step: int, metrics: Mapping[str, float]) -> None:
        write(log, step, metrics)
        clock.mark()  # step 0 too, before the first one begins

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

    def timed_reference(*arguments: Any) -> Any:
        began = time.perf_counter(), time.process_time()
        result = reference(*arguments)
        found["reference_seconds"] = time.perf_counter() - began[0]
        found["reference_cpu_seconds"] = time.process_time() - began[1]
        return result

    # Rows that only name the pairs: what they become is given.
    rows = [
        {"prompt": f"{i} ?", "chosen": f"{i} !", "rejected": f"{i} ."} for i in range(len(pairs))
    ]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [SimpleNamespace(where="")] * len(pairs)
    data = SimpleNamespace(pairs=pairs, kept=kept, counts={})
    replaced = (
        (build, "load_data", lambda *arguments: {"train": data}),
        (build, "build_references", timed_reference),
        (train, "train", train_and_stop),
        (MetricsLog, "write", timed_write),
        (start, "Saver", NotSaved),
    )
    with ExitStack() as stack:
        for module, name, value in replaced:
            stack.enter_context(patch.object(module, name, value))
        (work / "config.json").write_text("{}")
        code = train.main([str(work / "config.json"), *notus_overrides(case, settings, work)])
    if code != 0:
        raise UserError(f"train.py ended with code {code}")
    lines = (work / "notus" / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "loss" in line]
    slots = sum(rows * slots for rows, slots in found["rows"][case.warm :])
    timed = pairs.lengths[case.warm * case.pairs_per_step :]
    return found | {
        "marks": clock.marks,
        "processed": asdict(packed(timed, slots)),
        "loss": [line["loss"] for line in logged],
        "grad_norm": [line["grad_norm"] for line in logged],
    }


def run_trl(case: Case, settings: Settings, work: Path) -> dict[str, Any]:
    """Train with DPOTrainer; settings: "grouped", "weights" (a dtype), else DPOConfig's."""
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
    clock, batches, found = Clock(), [], {}

    class TimedTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *others: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            began = time.perf_counter(), time.process_time()
            result = super()._precompute_ref_logps(*arguments)
            found["reference_seconds"] = time.perf_counter() - began[0]
            found["reference_cpu_seconds"] = time.process_time() - began[1]
            return result

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            batches.append(list(inputs["input_ids"].shape))
            return super()._compute_loss(model, inputs, return_outputs)

    class Marks(TrainerCallback):
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            clock.mark()

        def on_log(self, *arguments: Any, **options: Any) -> None:
            if len(clock.marks) <= case.steps:  # not the summary at the end
                clock.mark()

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
        "marks": clock.marks,
        "processed": asdict(padded(batches[case.warm * per_step :], scored)),
        "loss": [entry["loss"] for entry in logged],
        "grad_norm": [entry["grad_norm"] for entry in logged],
        "arguments": {key: value for key, value in (arguments | settings).items()},
    }


RUNNERS: dict[str, Callable[[Case, Settings, Path], dict[str, Any]]] = {
    "notus": run_notus,
    "trl": run_trl,
}


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
    case, system, settings = Case(**asked["case"]), asked["system"], asked["settings"]
    work = task.parent
    if not torch.cuda.is_available():
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run = RUNNERS[system](case, settings, work)
    pairs = read_pairs(work / "pairs.safetensors")
    result = {"system": system, "settings": settings, "memory_at_start_bytes": began} | run
    result |= summarize(case, system, settings, pairs, run)
    task.with_suffix(".result").write_text(json.dumps(result))


def start(
    case: Case, system: str, settings: Settings, work: Path, pairs: TokenizedPairs, threads: int
) -> dict[str, Any]:
    """Run one side in a new process; its result, or {"failed": the last line of what it said}."""
    folder = Path(tempfile.mkdtemp(dir=work))
    (folder / "policy").symlink_to(work / "policy")
    write_pairs(folder / "pairs.safetensors", pairs.select(range(case.steps * case.pairs_per_step)))
    task = folder / "task.json"
    task.write_text(json.dumps({"case": asdict(case), "system": system, "settings": settings}))
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if not torch.cuda.is_available():
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_speed", "--task", str(task)],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"system": system, "settings": settings, "failed": "\n".join(said[-3:])}
    return json.loads(task.with_suffix(".result").read_text())


# ---------------------------------------------------------------------------------- the comparison


def compare_start(ours: Mapping[str, Any], theirs: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Parity of two runs over the same steps: the worst relative differences, and the verdict."""
    worst: dict[str, Any] = {}
    for name in ("log_probs", "loss", "grad_norm"):
        both = np.array([ours[name], theirs[name]])
        worst[name] = float((np.abs(both[0] - both[1]) / np.abs(both).max(0)).max())
    sequences, others = TOLERANCES[dtype]
    worst["holds"] = worst["log_probs"] <= sequences and all(
        worst[name] <= others for name in ("loss", "grad_norm")
    )
    return worst


def best(results: Sequence[Mapping[str, Any]], system: str) -> Mapping[str, Any] | None:
    """The fastest run of one side: on CUDA by the clock, on the CPU by processor time."""
    rate = "pairs_per_second" if torch.cuda.is_available() else "cpu_pairs_per_second"
    runs = [run for run in results if run["system"] == system and "failed" not in run]
    return max(runs, key=lambda run: run[rate], default=None)


def pooled(results: Sequence[Mapping[str, Any]], system: str, name: str) -> float | None:
    """The median of a value over all repeats of one side."""
    values = [run[name] for run in results if run["system"] == system and "failed" not in run]
    return statistics.median(values) if values else None


def ratios(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Ours by TRL's, medians over the repeats."""
    names = ("pairs_per_second", "cpu_pairs_per_second", "peak_memory_bytes")
    found = {name: [pooled(results, side, name) for side in ("notus", "trl")] for name in names}
    return {name: ours / theirs for name, (ours, theirs) in found.items() if ours and theirs}


def sweep_points(model: str) -> list[tuple[str, Settings]]:
    """Settings of both sides that may be the best, and TRL's defaults."""
    size = "per_device_train_batch_size"
    defaults = {
        "grouped": False,
        "gradient_checkpointing": True,
        "precompute_ref_log_probs": False,
    }
    if model in ("toy", "tiny"):
        points = [*(("trl", {size: count}) for count in (1, 2, 4)), ("trl", defaults)]
        return points + [
            ("notus", {"data.tokens_per_microbatch": tokens}) for tokens in (2048, 4096, 8192)
        ]
    return [
        *(("trl", {size: count}) for count in (4, 8, 16, 32)),
        ("trl", {size: 8, "gradient_checkpointing": True}),
        ("trl", {size: 8, "attn_implementation": "flex_attention"}),
        ("trl", {size: 8, "torch_compile": True}),
        ("trl", {size: 8, "use_liger_kernel": True}),
        ("trl", {size: 8, "weights": "bfloat16"}),
        ("trl", defaults),
        *(
            (
                "notus",
                {"parallel.activation_checkpointing": mode, "data.tokens_per_microbatch": tokens},
            )
            for mode in ("none", "selective")
            for tokens in (8192, 16384)
        ),
        ("notus", {"parallel.attention": "varlen"}),
        (
            "notus",
            {"parallel.activation_checkpointing": "none", "parallel.keep_gathered": True},
        ),
    ]


def best_known(model: str) -> dict[str, Settings]:
    """Each side's settings where there was no sweep: those of the sweeps in RESULTS.md."""
    if model in ("toy", "tiny"):
        return {
            "trl": {"per_device_train_batch_size": 2},
            "notus": {
                "data.tokens_per_microbatch": 8192,
                "parallel.activation_checkpointing": "none",
            },
        }
    whole = model == "B"
    return {
        "trl": {"per_device_train_batch_size": 8, "gradient_checkpointing": whole},
        "notus": {"parallel.activation_checkpointing": "selective" if whole else "none"},
    }


def gpu_clock() -> str | None:
    """The GPU's clocks, temperature and power now, as nvidia-smi gives them."""
    if not torch.cuda.is_available():
        return None
    query = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() if done.returncode == 0 else None


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line for each run."""
    lines = [
        f"{'':<6}{'step s':>8}{'IQR':>7}{'pairs/s':>9}{'CPU':>8}{'real tok/s':>11}"
        f"{'processed':>10}{'MFU':>6}{'HFU':>6}{'peak GiB':>9}{'ref s':>7}  settings"
    ]
    for run in results:
        settings = " ".join(f"{key}={value}" for key, value in run["settings"].items())
        if "failed" in run:
            lines.append(f"{run['system']:<6} failed: {run['failed'].splitlines()[-1]}  {settings}")
            continue
        mfu, hfu = (run[f] if run[f] is not None else run[f"{f}_of_matmul"] for f in ("mfu", "hfu"))
        lines.append(
            f"{run['system']:<6}{run['median_seconds']:>8.3g}{run['iqr_seconds']:>7.2g}"
            f"{run['pairs_per_second']:>9.3g}{run['cpu_pairs_per_second']:>8.3g}"
            f"{run['real_tokens_per_second']:>11,.0f}{run['processed_tokens_per_second']:>10,.0f}"
            f"{mfu:>6.0%}{hfu:>6.0%}{run['peak_memory_bytes'] / 2**30:>9.2f}"
            f"{run.get('reference_seconds', 0.0):>7.1f}  {settings}"
        )
    return "\n".join(lines)


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
    parser.add_argument("--profile", choices=list(PROFILES), default="uf")
    parser.add_argument("--pairs", help="a preference file, instead of a profile")
    parser.add_argument("--format", help="of --pairs, as data.train[].format; default: detected")
    parser.add_argument("--tokenizer", help="for --pairs: a folder or a sentencepiece model")
    parser.add_argument("--pairs-per-step", type=int, default=64 if cuda else 8)
    parser.add_argument("--warm", type=int, help="steps before those that are timed")
    parser.add_argument("--steps", type=int, help="steps that are timed")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side")
    parser.add_argument("--sweep", action="store_true", help="look for each side's best settings")
    parser.add_argument("--optimizer", choices=["adamw", "rmsprop"], help="default: B rmsprop")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--threads", type=int, default=1, help="of each process, on a CPU")
    parser.add_argument("--trl", nargs="+", type=assignment, default=[], metavar="KEY=VALUE")
    parser.add_argument("--notus", nargs="+", type=assignment, default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write every value here")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.task is not None:
        work_on(options.task)
        return 0
    if (options.pairs is None) != (options.tokenizer is None):
        raise UserError("--pairs and --tokenizer: found one of them, expected both or neither")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    warm, steps = options.warm, options.steps
    if warm is None:
        warm = (3 if options.model == "B" else 5) if cuda else 1
    if steps is None:
        steps = (6 if options.model == "B" else 15) if cuda else 4
    case = Case(
        model=options.model,
        steps=warm + steps,
        warm=warm,
        pairs_per_step=options.pairs_per_step,
        dtype="bfloat16" if cuda else "float32",
        optimizer=options.optimizer or ("rmsprop" if options.model == "B" else "adamw"),
        learning_rate=options.learning_rate,
    )
    parity_case = Case(**asdict(case) | {"steps": PARITY_STEPS, "warm": 0})
    sides = ["notus"] if find_spec("trl") is None else ["trl", "notus"]
    shape, count = SHAPES[case.model], max(case.steps, PARITY_STEPS) * case.pairs_per_step
    if options.pairs is None:
        pairs = random_pairs(options.profile, count, shape.vocab_size)
    else:
        pairs = real_pairs(options.pairs, options.format, options.tokenizer, count, SEED)
        assert pairs.tokens.max() < shape.vocab_size, "a tokenizer larger than the model"

    chosen = best_known(case.model)
    given = {"trl": dict(options.trl), "notus": dict(options.notus)}
    parity, swept, results = None, [], []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        weights = torch.bfloat16 if case.dtype == "bfloat16" else torch.float32
        write_policy(work / "policy", shape, weights)

        def measure(what: Case, side: str, settings: Settings) -> dict[str, Any]:
            run = start(what, side, settings, work, pairs, options.threads)
            print(run.get("failed") or table([run]), flush=True)  # the machine may be taken away
            return run

        if options.sweep:
            for side, settings in sweep_points(case.model):
                if side in sides:
                    merged = chosen[side] | settings | given[side]
                    swept.append(measure(case, side, merged))
            for side in sides:
                winner = best(swept, side)
                if winner is not None:
                    chosen[side] = dict(winner["settings"])
        chosen = {side: chosen[side] | given[side] for side in sides}
        starts = {side: measure(parity_case, side, chosen[side]) for side in sides}
        if len(sides) == 2 and not any("failed" in run for run in starts.values()):
            parity = compare_start(starts["notus"], starts["trl"], case.dtype)
        for _ in range(options.repeats):
            results += [measure(case, side, chosen[side]) for side in sides]

    report = {
        "environment": environment(device, PACKAGES),
        "threads": None if cuda else options.threads,
        "gpu_at_end": gpu_clock(),
        "case": asdict(case),
        "data": options.pairs or options.profile,
        "seed": SEED,
        "shape": asdict(shape),
        "parity": parity,
        "sweep": swept,
        "starts": starts,
        "results": results,
        "ratios": ratios(results) if parity and parity["holds"] else None,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if swept:
        print(f"\nsweep\n{table(swept)}")
    print(f"\n{report['environment']}\n{case}, {report['data']}\n\n{table(results)}")
    return verdict(report, sides)


def verdict(report: Mapping[str, Any], sides: Sequence[str]) -> int:
    """Print parity and ratios; the exit code, 1 if a run failed or parity does not hold."""
    failed = any("failed" in run for run in (*report["starts"].values(), *report["results"]))
    parity = report["parity"]
    if len(sides) < 2:
        print("TRL is not installed: nothing to compare with")
        return int(failed)
    if parity is None:
        print("parity: a run failed, no ratio")
        return 1
    differences = ", ".join(f"{name} {parity[name]:.1e}" for name in list(parity)[:3])
    print(f"parity over {PARITY_STEPS} steps: {differences}")
    if not parity["holds"]:
        print("parity does not hold: no ratio")
        return 1
    found = report["ratios"]
    if "pairs_per_second" in found:
        print(
            f"notus / TRL: {found['pairs_per_second']:.2f} x pairs/s, "
            f"{found['cpu_pairs_per_second']:.2f} x per processor second, "
            f"{found['peak_memory_bytes']:.2f} x peak memory"
        )
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
