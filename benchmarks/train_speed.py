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
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.head import environment
from benchmarks.roofline import PROFILES, SEED
from benchmarks.speed_case import (
    PARITY_STEPS,
    SHAPES,
    Case,
    random_pairs,
    real_pairs,
    write_pairs,
    write_policy,
)
from benchmarks.speed_runs import RUNNERS, Settings
from notus.data.tokenization import TokenizedPairs
from notus.dryrun.memory import OPTIMIZER_STATES
from notus.errors import UserError
from notus.files import write_json
from notus.model.mistral import count_parameters
from notus.tables import text_table

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "liger-kernel", "numpy")
# Relative differences at parity. The norm in bfloat16: notus rounds the gradients of every
# microbatch to bfloat16, TRL sums float32 gradients under autocast.
TOLERANCES = {
    "float32": {"log_probs": 1e-4, "loss": 1e-3, "grad_norm": 1e-3},
    "bfloat16": {"log_probs": 2e-2, "loss": 1e-2, "grad_norm": 3e-2},
}


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
    command = [sys.executable, "-m", "benchmarks.speed_runs", str(task)]
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
