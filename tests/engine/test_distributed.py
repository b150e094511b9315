"""Ranks and memory, as far as one process can show them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.memory import load_of, microbatch, model_shape
from notus.data.packing import Microbatch
from notus.engine.distributed import Ranks, accumulate, shard_model
from notus.model.mistral import MistralForCausalLM
from notus.objective.logprobs import token_log_probs

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rank", "printed"), [(0, "once\n"), (1, "")])
def test_only_the_first_rank_prints(rank, printed, capsys):
    Ranks(rank, 2, CPU).say("once")
    assert capsys.readouterr().out == printed


LATE_THREAD = """
import threading, time
from notus.engine import distributed

def let_go():
    time.sleep(0.1)
    print("let go", flush=True)

distributed.SECONDS_AT_EXIT *= 10  # this thread itself may come late
distributed.start("cpu")
threading.Thread(target=let_go, daemon=True).start()
distributed.stop()
"""


def test_a_late_thread_still_finds_python_at_the_end():
    """One of gloo's can be late; without the wait the process would be gone."""
    done = subprocess.run(
        [sys.executable, "-c", LATE_THREAD],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "let go\n"), done.stderr


SHAPE = model_shape(layers=2, hidden=64, inner=192, heads=4, vocabulary=97)


class CopiedBytes(TorchDispatchMode):
    """Bytes that copies, casts and sums read and write in tensors of one of the `sizes`."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.bytes = sizes, 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.__name__
        touched = []
        if name.startswith("chunk_cat"):
            touched = [*arguments[0], options["out"]]
        elif name.startswith("copy_"):
            touched = arguments[:2]
        elif name.startswith(("_to_copy", "div")):
            touched = [arguments[0], result]
        elif name.startswith("add_"):
            touched = [arguments[0], *arguments[:2]]
        self.bytes += sum(t.numel() * t.element_size() for t in touched if t.numel() in self.sizes)
        return result


def bfloat16_model() -> MistralForCausalLM:
    """A model on one rank as train.py has it, and the same weights each time."""
    with torch.device("meta"):
        model = MistralForCausalLM(SHAPE, "plain", "dense")
    shard_model(
        model,
        init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)),
        CPU,
        compute_dtype=torch.bfloat16,
        activation_checkpointing="full",
        compile_blocks=False,
        cpu_offload=False,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local()
            local.copy_(0.05 * torch.randn(local.shape, generator=generator))
    return model


def different_rows(count: int) -> list[Microbatch]:
    """Rows of 12 slots, whose activations are smaller than any weight matrix."""
    row = microbatch(load_of(SHAPE, 1, 12, "cpu"))
    return [replace(row, tokens=row.tokens.roll(shift)) for shift in range(count)]


@pytest.mark.parametrize(("kept", "gathering"), [(False, 3 * 20), (True, 10)])
def test_one_rank_copies_little(group, kept, gathering):
    """Bytes copied for each parameter of a block, in a step of three microbatches.

    To gather, a cast and a copy, takes 10 bytes: in each forward and backward pass, or once. The
    first gradient is cast to float32 (6), two are added to it (10 each), and the sum is laid side
    by side and copied (8 each). When every microbatch was reduced, and divided by 1, it was 150.
    """
    model, rows = bfloat16_model(), different_rows(3)
    blocks = [[p.numel() for p in block.parameters()] for block in model.model.layers]
    matrices = {size for size in blocks[0] if size > SHAPE.hidden_size}
    with CopiedBytes(matrices | {sum(blocks[0])}) as copied:
        for row in accumulate(model, rows, 3, kept):
            token_log_probs(model, row).sum().backward()
    each = copied.bytes / sum(map(sum, blocks))
    assert each == pytest.approx(gathering + 6 + 2 * 10 + 2 * 8, rel=0.01)  # norms are small


@pytest.mark.parametrize("kept", [False, True])
def test_one_rank_adds_gradients_up_in_float32(group, kept):
    """To the bit the sum of those of the microbatches, each reduced by itself."""
    model, rows = bfloat16_model(), different_rows(3)
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for row in rows:
        for same in accumulate(model, [row], 1, kept):
            token_log_probs(model, same).sum().backward()
        sums = [total + p.grad for total, p in zip(sums, model.parameters(), strict=True)]
        model.zero_grad()
    for row in accumulate(model, rows, 3, kept):
        token_log_probs(model, row).sum().backward()
    for total, parameter in zip(sums, model.parameters(), strict=True):
        assert torch.equal(total.to_local(), parameter.grad.to_local())
    assert any(total.to_local().any() for total in sums)
