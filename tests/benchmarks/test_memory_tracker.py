from dataclasses import replace

import pytest
import torch

from benchmarks.memory import load_of, measured_peak, model_shape
from benchmarks.memory_tracker import by_group, tracked
from notus.dryrun.memory import memory_budget

SHAPE = model_shape(layers=2, hidden=64, inner=224, heads=4, vocabulary=128)


def test_tracked_peak_equals_what_the_allocator_gave():
    """Nearly to the byte, where the peak is not inside an operator, whose buffers are not seen."""
    load = load_of(SHAPE, 8, 256, "cpu", activation_checkpointing="none")
    assert sum(tracked(load).values()) == pytest.approx(measured_peak(load), rel=1e-3)


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="fake tensors lack the head's product of mixed types"
)
def test_as_on_cuda():
    """Attention has no mask there, the head multiplies in bfloat16, and the groups add up."""
    shape = replace(SHAPE, vocab_size=32_000)
    load = load_of(shape, 1, 256, "cuda", optimizer="rmsprop", compiled=False, triton=False)
    load = replace(load, scored=128)
    budget, found = memory_budget(load), tracked(load)
    assert sum(found.values()) == pytest.approx(budget.peak, rel=0.1)
    groups = by_group(budget, found).values()
    assert [sum(side) for side in zip(*groups, strict=True)] == [budget.peak, sum(found.values())]
