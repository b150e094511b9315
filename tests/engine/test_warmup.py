"""The row before the first step, on the CPU."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.memory import load_of, microbatch, model_shape
from conftest import random_pairs
from notus.data.packing import Rows, slots_of
from notus.data.planning import Plan
from notus.dryrun.estimate import count_rows
from notus.engine import warmup
from notus.engine.distributed import Ranks, shard_model
from notus.errors import UserError
from notus.model.mistral import MistralForCausalLM

CPU = torch.device("cpu")
SHAPE = model_shape(layers=2, hidden=32, inner=64, heads=4, vocabulary=61)


@pytest.fixture
def model(group):
    with torch.device("meta"):
        model = MistralForCausalLM(SHAPE, "plain", "dense")
    shard_model(
        model,
        init_device_mesh("cpu", (1,), mesh_dim_names=("shard",)),
        CPU,
        compute_dtype=torch.float32,
        activation_checkpointing="none",
        compile_blocks=False,
        cpu_offload=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().normal_(std=0.02)
    return model.eval()


@pytest.mark.parametrize("keep_gathered", [False, True])
def test_nothing_remains(model, keep_gathered, monkeypatch):
    """Two passes with gradient; weights, gradients, mode and sharding are as before."""
    passes = []
    score = warmup.token_log_probs

    def recorded(*arguments):
        passes.append((torch.is_grad_enabled(), model.training))
        return score(*arguments)

    monkeypatch.setattr(warmup, "token_log_probs", recorded)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    batch = microbatch(load_of(SHAPE, 1, 64, "cpu"))
    warmup.warm_up(model, batch, Ranks(0, 1, CPU), keep_gathered)
    assert passes == [(True, True)] * 2 and not model.training
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.to_local(), old) and parameter.grad is None


def test_too_little_memory_is_a_user_error(model, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")

    monkeypatch.setattr(warmup, "token_log_probs", full)
    batch = microbatch(load_of(SHAPE, 1, 64, "cpu"))
    words = "row of 64 slots .* Tried to allocate 2 GiB. Lower data.tokens_per_microbatch"
    with pytest.raises(UserError, match=words):
        warmup.warm_up(model, batch, Ranks(0, 2, CPU), False)
    with pytest.raises(torch.OutOfMemoryError):  # is printed with its traceback
        warmup.warm_up(model, batch, Ranks(1, 2, CPU), False)


@pytest.mark.parametrize("shorter", [False, True])
def test_the_longest_row(shorter):
    """As long as any row of the run, with the pairs of the fullest such row."""
    pairs = random_pairs(40)
    counts = slots_of(pairs.lengths, True)
    budget = int(counts.sum()) if shorter else -(-int(counts.max()) // 128) * 128
    plan = Plan(counts, 9, 2, None, 0, True, ranks=2, budget=budget)
    row = warmup.longest_row(plan, pairs, Rows(budget, True, CPU))
    divisions = [plan.division(plan.pairs_of(step)) for step in range(plan.steps)]
    assert len(row.tokens) == count_rows(plan, pairs, map(plan.pairs_of, range(plan.steps))).slots
    assert (len(row.tokens) < budget) == shorter
    longest = next(each for each in divisions if each.slots == len(row.tokens))
    loads = {tuple(b): int(counts[b].sum()) for bins in longest.bins for b in bins}
    assert loads[tuple(row.pairs.tolist())] == max(loads.values())
