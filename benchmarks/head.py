"""The head side by side: hidden rows and weight in, log-probs of targets out, forward and backward.

    pip install -e . && pip install -r benchmarks/requirements.txt
    python -m benchmarks.head --json head.json            # one CUDA GPU, a few minutes
    python -m benchmarks.head --usual                     # only the problem of one microbatch at 7B
    python -m benchmarks.head --chunk-rows 4096           # instead of 2,048 rows of logits at once
    python -m benchmarks.head --sweep                     # tile and chunk sizes of the Triton head
    python -m benchmarks.head --toy                       # small, also on a CPU: does it work?

Every method first has to be right, on the very inputs it is timed with: log-probs of all rows,
hidden gradients of some rows and weight gradients of some tokens against float64. Then: median
time, TFLOP/s on the products that the result needs (2 N D V forward, 6 N D V with both gradients,
whatever was computed), and the memory above the inputs at its highest, which includes the results.
Methods:

    matmul         the bare products: the ceiling
    eager          logits, log_softmax and gather in the inputs' dtype, as most trainers do
    eager-float32  the same on logits in float32: the error to stay below (not timed)
    compile        eager under torch.compile
    trl            TRL's chunked log-prob function
    liger          Liger's fused linear cross entropy, a loss for each row
    cce            cut-cross-entropy without gradient filter, which is not exact
    chunked        the library's logits of a chunk and one Triton pass over its rows
    descriptors    notus's kernel with tensor descriptors and flattened loops, from an H100 on
    plain, triton  notus
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from notus.errors import UserError
from notus.files import write_json
from notus.kernels import dispatch
from notus.tables import text_table

Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # [N, D], weight [V, D], targets [N] -> [N]
PASSES = ("forward", "forward+backward")
PROBED = 64  # rows and tokens whose gradients are compared
TRL_VOCABULARY_CHUNK = 32768  # what its trainers pass
PACKAGES = ("torch", "triton", "trl", "liger-kernel", "cut-cross-entropy")


class Case(NamedTuple):
    """One problem: N rows, V tokens, D hidden values, and the spread of the logits."""

    N: int
    V: int
    D: int
    logits: str  # "random", of standard deviation 1.3, or "peaked", four times that


class Inputs(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor


class Truth(NamedTuple):
    """Float64: log-probs [N], gradients of the probed rows and tokens [PROBED, D]."""

    log_probs: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    probes: Tensor  # [2, PROBED]: rows, tokens


GPU_CASES = [
    Case(N, V, 4096, logits)
    for V in (32000, 128256)
    for N in (2048, 9400, 32768)
    for logits in (("random", "peaked") if N == 9400 else ("random",))
]
USUAL_CASE = Case(9400, 32000, 4096, "random")  # one microbatch of Mistral-7B
TOY_CASES = [Case(70, 300, 64, "random"), Case(130, 700, 48, "peaked")]


# ------------------------------------------------------------------------------------ the methods


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1).float()


def eager_float32(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return eager(hidden.float(), weight.float(), targets)


def make_trl(device: torch.device) -> Head:
    from trl.kernels import ChunkedLogProbFunction

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, TRL_VOCABULARY_CHUNK, None, 1.0, ()
        )[0]

    return head


def make_liger(device: torch.device) -> Head:
    if device.type != "cuda":
        raise UserError("its kernels need CUDA")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    return lambda hidden, weight, targets: -loss(weight, hidden, targets)


def make_cce(device: torch.device) -> Head:
    if device.type != "cuda":
        raise UserError("its kernels need CUDA")
    from cut_cross_entropy import linear_cross_entropy

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)

    return head


def make_notus(backend: str, device: torch.device) -> Head:
    dispatch.check_backend(backend, device)
    return lambda hidden, weight, targets: dispatch.linear_log_probs(
        hidden, weight, targets, backend
    )


def make_chunked(device: torch.device) -> Head:
    dispatch.check_backend("triton", device)
    from benchmarks.chunked_head import linear_log_probs

    return linear_log_probs


def make_descriptors(device: torch.device) -> Head:
    dispatch.check_backend("triton", device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise UserError("its copies need a GPU of compute capability 9.0 (H100) or newer")
    from benchmarks.descriptor_head import linear_log_probs

    return linear_log_probs


METHODS: dict[str, Callable[[torch.device], Head]] = {
    "eager": lambda device: eager,
    "eager-float32": lambda device: eager_float32,
    "compile": lambda device: torch.compile(eager, dynamic=False),
    "trl": make_trl,
    "liger": make_liger,
    "cce": make_cce,
    "chunked": make_chunked,
    "descriptors": make_descriptors,
    "plain": partial(make_notus, "plain"),
    "triton": partial(make_notus, "triton"),
}
NOT_TIMED = ("eager-float32",)


# ------------------------------------------------------------------------- inputs and what is true


def make_inputs(case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)
    spread = {"random": 1.28, "peaked": 5.12}[case.logits]

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(std).to(dtype)

    return Inputs(
        hidden=normal(case.N, case.D).requires_grad_(),
        weight=normal(case.V, case.D, std=spread / case.D**0.5).requires_grad_(),
        targets=torch.randint(0, case.V, (case.N,), generator=generator, device=device),
        upstream=torch.randn(case.N, generator=generator, device=device),
    )


@torch.no_grad()
def compute_truth(inputs: Inputs) -> Truth:
    """In float64, a few rows of logits at a time."""
    hidden, weight, targets, upstream = inputs
    N, V = len(hidden), len(weight)
    generator = torch.Generator().manual_seed(0)
    probes = torch.stack([torch.randint(0, n, (PROBED,), generator=generator) for n in (N, V)])
    rows, tokens = probes = probes.to(hidden.device)
    tokens[: PROBED // 2] = targets[rows[: PROBED // 2]]  # tokens that are some row's target too
    wide = weight.double()
    log_probs, grad_weight = [], torch.zeros(PROBED, hidden.shape[1], dtype=torch.float64)
    grad_weight = grad_weight.to(hidden.device)
    for part in torch.arange(N, device=hidden.device).split(1024):
        x = hidden[part].double()
        all_log_probs = (x @ wide.T).log_softmax(-1)
        log_probs.append(all_log_probs.gather(1, targets[part, None]).squeeze(1))
        slope = (targets[part, None] == tokens).double() - all_log_probs[:, tokens].exp()
        grad_weight += (slope * upstream[part, None].double()).T @ x
    probabilities = (hidden[rows].double() @ wide.T).softmax(-1)
    grad_hidden = (wide[targets[rows]] - probabilities @ wide) * upstream[rows, None].double()
    return Truth(torch.cat(log_probs), grad_hidden, grad_weight, probes)


def errors(head: Head, inputs: Inputs, truth: Truth) -> dict[str, float]:
    """Largest absolute error of the log-probs; of the gradients, relative to the largest entry."""
    hidden, weight, targets, upstream = inputs
    log_probs = head(hidden, weight, targets)
    grad_hidden, grad_weight = torch.autograd.grad(log_probs @ upstream, (hidden, weight))
    rows, tokens = truth.probes

    def relative(found: Tensor, true: Tensor) -> float:
        return ((found.double() - true).abs().max() / true.abs().max()).item()

    return {
        "log_prob_error": (log_probs.double() - truth.log_probs).abs().max().item(),
        "grad_hidden_error": relative(grad_hidden[rows], truth.grad_hidden),
        "grad_weight_error": relative(grad_weight[tokens], truth.grad_weight),
    }


# --------------------------------------------------------------------------------------- measuring


def seconds(compute: Callable[[], object], device: torch.device, at_least: float) -> float:
    """Median time of one call; as many calls as `at_least` seconds hold, three at the least."""
    compute()  # compiles, allocates
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least:
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            compute()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            compute()
            times.append(time.perf_counter() - begin)
    return median(times)


def peak_bytes(compute: Callable[[], object], device: torch.device) -> int | None:
    """Highest memory above what was allocated before; None on the CPU."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = compute()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def passes(name: str, head: Head | None, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The forward pass alone, and with both gradients; for "matmul" the bare products of each."""
    hidden, weight, targets, upstream = inputs
    if head is None:
        x, w = hidden.detach(), weight.detach()
        slope = torch.randn(len(x), len(w), device=x.device, dtype=x.dtype)
        return {
            "forward": lambda: x @ w.T,
            "forward+backward": lambda: (x @ w.T, slope @ w, slope.T @ x),
        }

    @torch.no_grad()
    def forward() -> Tensor:
        return head(hidden, weight, targets)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(head(hidden, weight, targets), (hidden, weight), upstream)

    return {"forward": forward, "forward+backward": both}


def measure(
    name: str, head: Head | None, case: Case, inputs: Inputs, at_least: float
) -> dict[str, Any]:
    """Time, rate and memory of both passes."""
    device, found = inputs.hidden.device, {}
    for number, (label, compute) in enumerate(passes(name, head, inputs).items()):
        elapsed = seconds(compute, device, at_least)
        flops = (2, 6)[number] * case.N * case.D * case.V
        found[label] = {
            "seconds": elapsed,
            "tflops": flops / elapsed / 1e12,
            "extra_bytes": peak_bytes(compute, device),
        }
    return found


def run_case(
    case: Case, heads: dict[str, Head], device: torch.device, dtype: torch.dtype, at_least: float
) -> list[dict[str, Any]]:
    """One row of results for each method, the bare product first."""
    # Dynamo compiles a function eight times, here with and without gradient for each shape, and
    # then runs it eagerly: "compile" would no longer be what it says.
    torch.compiler.reset()
    inputs = make_inputs(case, device, dtype, seed=time.time_ns() % 2**31)
    truth = compute_truth(inputs)
    common = case._asdict() | {"dtype": str(dtype).removeprefix("torch.")}
    rows = [common | {"method": "matmul"} | measure("matmul", None, case, inputs, at_least)]
    for name, head in heads.items():
        row = common | {"method": name}
        try:
            row |= errors(head, inputs, truth)
            if not is_right(row, truth.log_probs.abs().max().item()):
                row["wrong"] = True
            elif name not in NOT_TIMED:
                row |= measure(name, head, case, inputs, at_least)
        except torch.cuda.OutOfMemoryError:
            row["out_of_memory"] = True
        except Exception as error:  # a peer that does not run here must not end the others' turn
            if name in ("plain", "triton"):
                raise
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        rows.append(row)
    return rows


def is_right(found: dict[str, float], largest: float) -> bool:
    """Within what rounding to bfloat16 can explain; a mistake is larger.

    largest: of the sizes of logits and log-probs, which eager rounds to half of 2^-7 of them.
    """
    return (
        found["log_prob_error"] <= 2**-7 * 2 * largest
        and found["grad_hidden_error"] <= 0.05
        and found["grad_weight_error"] <= 0.05
    )


# -------------------------------------------------------------------------------------- the report


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One case: errors, then milliseconds, TFLOP/s, share of the bare product, extra GB."""
    first = rows[0]
    timed = ("ms", "TFLOP/s", "share", "GB")
    header = ["", "log-prob", "d hidden", "d weight", *timed, *(f"+back {name}" for name in timed)]
    lines = []
    for row in rows:
        keys = ("log_prob_error", "grad_hidden_error", "grad_weight_error")
        line = [row["method"], *(f"{row[key]:.1e}" if key in row else None for key in keys)]
        for label in PASSES:
            found = row.get(label)
            if found is None:
                line += [None] * 4
                continue
            memory = found["extra_bytes"]
            share = f"{found['tflops'] / first[label]['tflops']:.0%}"
            line += [found["seconds"] * 1e3, found["tflops"], share]
            line.append(None if memory is None else memory / 1e9)
        reasons = [f"failed: {row['failed']}"] if "failed" in row else []
        reasons += ["WRONG, not timed"] if row.get("wrong") else []
        reasons += ["out of memory"] if row.get("out_of_memory") else []
        lines.append([*line, " ".join(reasons)])
    title = f"N {first['N']:,}  V {first['V']:,}  D {first['D']:,}  {first['dtype']}"
    return f"\n{title}, {first['logits']} logits\n{text_table([*header, ''], lines)}"


def environment(device: torch.device, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
    }
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def open_methods(wanted: Sequence[str], device: torch.device) -> dict[str, Head]:
    """Those that can run here; says which cannot, and why."""
    heads = {}
    for name in wanted:
        try:
            heads[name] = METHODS[name](device)
        except (ImportError, UserError) as error:
            print(f"skipped: {name} ({error})")
    return heads


def sweep(head: Head, case: Case, device: torch.device, at_least: float) -> list[dict[str, Any]]:
    """Forward time by tile, time of both passes by rows per chunk. What does not fit is left out.

    head: "triton", whose tiles and chunks are set from outside.
    """
    from triton.runtime.errors import OutOfResources

    from notus.kernels import linear_log_probs as kernels

    inputs = make_inputs(case, device, torch.bfloat16, seed=0)
    found: list[dict[str, Any]] = []
    usual, choose, usual_rows = kernels.LARGE, kernels._tiles, kernels.CHUNK_ROWS
    for tiles in (
        usual,
        usual._replace(stages=4),
        usual._replace(hidden=32, stages=5),
        usual._replace(hidden=128, stages=2),
        usual._replace(rows=256, vocabulary=128),
        usual._replace(vocabulary=128, stages=4),
        kernels.SMALL,
    ):
        kernels._tiles = lambda hidden, tiles=tiles: tiles
        try:
            elapsed = seconds(passes("triton", head, inputs)["forward"], device, at_least)
        except OutOfResources as error:
            print(f"does not fit  {tiles}: {error}")
            continue
        found.append({"tiles": tiles._asdict(), "forward_seconds": elapsed})
        print(f"{elapsed * 1e3:8.3f} ms  {tiles}")
    kernels._tiles = choose
    for kernels.CHUNK_ROWS in (1024, 2048, 4096, 8192):
        compute = passes("triton", head, inputs)["forward+backward"]
        elapsed, memory = seconds(compute, device, at_least), peak_bytes(compute, device)
        rows = kernels.CHUNK_ROWS
        found.append({"chunk_rows": rows, "seconds": elapsed, "extra_bytes": memory})
        size = "" if memory is None else f"{memory / 1e9:.2f} GB  "
        print(f"{elapsed * 1e3:8.3f} ms  {size}at most {rows} rows a chunk")
    kernels.CHUNK_ROWS = usual_rows
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The linear + log-softmax head, side by side.")
    parser.add_argument("--toy", action="store_true", help="tiny problems, on the CPU if need be")
    parser.add_argument("--usual", action="store_true", help="one problem: a microbatch at 7B")
    chunks = parser.add_mutually_exclusive_group()
    chunks.add_argument("--sweep", action="store_true", help="tile and chunk sizes instead")
    chunks.add_argument(
        "--chunk-rows", type=int, metavar="ROWS", help="logits held at once in a Triton head"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME",
        help=f"any of {', '.join(METHODS)}",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.toy:
        print("error: no CUDA device was found; on a CPU only --toy works", file=sys.stderr)
        return 2

    report: dict[str, Any] = {"environment": environment(device)}
    print(", ".join(f"{name} {value}" for name, value in report["environment"].items()))
    at_least = 0.0 if options.toy else 0.3
    if options.chunk_rows:
        from notus.kernels import linear_log_probs as kernels

        kernels.CHUNK_ROWS = report["chunk_rows"] = options.chunk_rows
    heads = open_methods(["triton"] if options.sweep else options.methods, device)
    if options.sweep:
        if not heads:
            return 2
        case = TOY_CASES[0] if options.toy else USUAL_CASE
        report["sweep"] = sweep(heads["triton"], case, device, at_least)
    else:
        report["results"] = []
        usual = [USUAL_CASE] if options.usual else GPU_CASES
        for case in TOY_CASES if options.toy else usual:
            rows = run_case(case, heads, device, torch.bfloat16, at_least)
            print(table(rows), flush=True)
            report["results"] += rows
    if options.json is not None:
        write_json(options.json, report)
    wrong = [row["method"] for row in report.get("results", []) if row.get("wrong")]
    if "results" in report and (last := report["results"][-1]).keys() >= {"forward"}:
        rates = [rows[0][label]["seconds"] / last[label]["seconds"] for label in PASSES]
        shares = f"forward {rates[0]:.0%}, with backward {rates[1]:.0%}"
        print(f"{last['method']}: {shares} of the matrix products' rate")
    if wrong:
        print(f"error: wrong results from {', '.join(dict.fromkeys(wrong))}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
