from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.memory import MISTRAL_7B, load_of, measured_peak, model_shape
from notus.dryrun.estimate import usable
from notus.dryrun.memory import (
    TRITON_CHUNK_ROWS,
    Adapters,
    ParameterCounts,
    block_bytes,
    memory_budget,
    parameter_counts,
    unit_sizes,
)
from notus.engine.distributed import _recomputed
from notus.engine.flops import gpu_named
from notus.errors import UserError
from notus.model import mistral as decoder
from notus.model.lora import LoraSettings, add_adapters
from notus.model.mistral import Block, rope_tables

PARAMETERS = 7_241_732_096
BLOCK = 218_112_000
SMALL = model_shape(layers=4, hidden=256, inner=896, heads=8, vocabulary=512)
SLOTS = 256


@pytest.mark.parametrize(
    ("mode", "width", "ranks", "optimizer", "keep_gathered"),
    [
        ("none", 2, 8, "adamw", False),
        ("none", 4, 1, "rmsprop", False),
        ("selective", 4, 8, "adamw", False),
        ("selective", 2, 1, "adamw", False),
        ("full", 2, 8, "adamw", False),
        ("full", 4, 8, "rmsprop", True),
    ],
)
def test_prediction_equals_what_the_allocator_gave(mode, width, ranks, optimizer, keep_gathered):
    """Within 20 %: two real optimiser steps, activations several times the weights."""
    load = load_of(
        SMALL,
        ranks,
        SLOTS,
        "cpu",
        activation_checkpointing=mode,
        compute_width=width,
        optimizer=optimizer,
        keep_gathered=keep_gathered,
    )
    assert memory_budget(load).peak == pytest.approx(measured_peak(load), rel=0.2)


ATTENTION = LoraSettings(rank=8, alpha=16)


@pytest.mark.parametrize(
    ("mode", "lora"),
    [
        ("none", None),
        ("selective", None),
        ("full", None),
        ("none", ATTENTION),
        ("none", replace(ATTENTION, target_modules="all-linear")),
        ("none", replace(ATTENTION, target_modules="all-linear", dropout=0.1)),
        ("none", replace(ATTENTION, target_modules=("q_proj", "down_proj"))),
        ("selective", replace(ATTENTION, target_modules="all-linear", dropout=0.1)),
    ],
)
def test_compiled_blocks_keep_what_is_predicted(mode, lora):
    """What the compiler's partitioner saves for the backward pass of one bfloat16 block."""
    assert kept_bytes(mode, lora, compiled=True) == predicted_bytes(mode, lora, compiled=True)


@pytest.mark.parametrize("targets", [ATTENTION.target_modules, "all-linear", ("up_proj",)])
def test_eager_blocks_keep_what_is_predicted(targets):
    lora = replace(ATTENTION, target_modules=targets)
    assert kept_bytes("none", lora, compiled=False) == predicted_bytes("none", lora, compiled=False)


@pytest.mark.parametrize(("lora", "compiled"), [(None, False), (ATTENTION, False), (None, True)])
def test_norms_of_queries_and_keys_keep_what_is_predicted(lora, compiled, monkeypatch):
    normed = replace(ONE_BLOCK, qk_norm=True, qkv_bias=True)
    monkeypatch.setitem(globals(), "ONE_BLOCK", normed)
    assert kept_bytes("none", lora, compiled) == predicted_bytes("none", lora, compiled)


ONE_BLOCK = model_shape(layers=1, hidden=128, inner=448, heads=4, vocabulary=8)


def predicted_bytes(mode, lora, compiled):
    """The formula's bytes for each slot of ONE_BLOCK."""
    adapters = parameter_counts(ONE_BLOCK, lora).adapters
    return block_bytes(ONE_BLOCK, 2, mode, compiled, adapters)[0]


def kept_bytes(mode, lora, compiled):
    """The bytes of the tensors that autograd really saved in ONE_BLOCK, for each slot."""
    shape, slots = ONE_BLOCK, 64
    torch._dynamo.reset()
    model = decoder.MistralForCausalLM(shape)
    if lora:
        add_adapters(model, lora)
    block = model.model.layers[0].bfloat16().train()
    forward = block.forward
    if mode != "none":
        forward = _recomputed(forward, mode, dropout=lora is not None)
    if compiled:
        forward = torch.compile(forward, backend="aot_eager_decomp_partition")
    rope = rope_tables(shape, torch.arange(slots))
    mask = torch.ones(slots, slots, dtype=torch.bool).tril()
    # Not the block's own: its weights, the tables, and the mask (as numbers, only on the CPU).
    shared = {t.untyped_storage().data_ptr() for t in (*block.parameters(), *rope[:2], mask)}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared and tensor.shape != mask.shape:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    x = torch.randn(slots, shape.hidden_size, dtype=torch.bfloat16).requires_grad_()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(x * 1, rope, mask)
    sizes = [size for size, tensor in kept.values() if tensor.dtype != torch.uint8]  # random state
    return sum(sizes) / slots


def mistral(ranks: int, **settings):
    """Mistral-7B, rows of 8,192 slots, half of them scored, on GPUs."""
    given = {"slots": 8192, "scored": 4096, "scoring_slots": 8192} | settings
    return replace(load_of(MISTRAL_7B, ranks, 8192, "cuda"), **given)


def test_units():
    units = unit_sizes(MISTRAL_7B)
    assert units == (BLOCK, 32_000 * 4096 + 4096, 32_000 * 4096)
    assert unit_sizes(replace(MISTRAL_7B, tie_word_embeddings=True)).head == 0


def q_norm(block):
    block.self_attn.q_norm = torch.nn.RMSNorm(8)


def gateless(block):
    del block.mlp.gate_proj


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (q_norm, "does not know the parameter self_attn.q_norm.weight of a block"),
        (gateless, "expects the parameter mlp.gate_proj.weight of a block"),
    ],
)
def test_an_edited_block_is_noticed(monkeypatch, edit, words):
    class Edited(Block):
        def __init__(self, shape):
            super().__init__(shape)
            edit(self)

    monkeypatch.setattr(decoder, "Block", Edited)
    with pytest.raises(UserError, match=words):
        unit_sizes.__wrapped__(SMALL)  # without its cache


def test_parameter_counts():
    """Rank 8 on queries and values: 8 x (in + out) of each, in 32 blocks."""
    assert parameter_counts(MISTRAL_7B, None) == (PARAMETERS, 0, None)
    lora = LoraSettings(rank=8, alpha=16, target_modules=("q_proj", "v_proj"))
    adapters = 32 * 8 * ((4096 + 4096) + (4096 + 1024))
    found = Adapters(results=8 + 4096 + 8 + 1024, thin=16, norms=1, down=False, dropped=0)
    assert parameter_counts(MISTRAL_7B, lora) == (adapters, PARAMETERS, found)


def test_chunk_of_the_gpu_kernel():
    kernel = pytest.importorskip("notus.kernels.linear_log_probs", exc_type=ImportError)
    assert kernel.CHUNK_ROWS == TRITON_CHUNK_ROWS


def test_logits_follow_the_kernels_that_run():
    """2,048 rows rounded in place and nothing to score; plain, 1,048 and a bfloat16 copy."""
    name = "logits of one chunk of rows"
    for triton, trained, scored in (
        (True, 2048 * 4 * (32_000 + 4096), 0),
        (False, 1048 * (6 * 32_000 + 4 * 4096), 1048 * 4 * 32_000),
    ):
        first, *_, last = memory_budget(mistral(8, triton=triton)).phases.values()
        assert first[name] == trained and last[name] == scored


def test_budget_of_mistral_7b_on_eight_gpus_by_hand():
    """RMSprop and full checkpointing, as for Notus; every line from the architecture's numbers."""
    budget = memory_budget(mistral(8, optimizer="rmsprop"))
    lines = budget.resident | budget.phases[budget.fullest]
    norms, attention = 2 * 2 * 2 * 4096 + 8, 2 * (2 * 4096 + 2 * 1024) + 2 * 2 * 128 + 4 * 32
    block = norms + attention + 3 * 2 * 14_336
    assert lines == {
        "parameters": 4 * PARAMETERS // 8,
        "rmsprop state": 4 * PARAMETERS // 8,
        "reference log-probs (float32)": 0,
        "microbatch and rotary tables": 8192 * (32 + 8 * 128),
        "reference model": 0,
        "gradients (float32)": 4 * PARAMETERS // 8,
        "activations of 32 blocks (full checkpointing)": 32 * 8192 * 4096 * 2,
        "recomputed activations and gradients, of one block": 8192
        * (block + 2 * (2 * 14_336 + 2 * 4096)),
        "gathered embedding": 2 * (32_000 * 4096 + 4096),
        "gathered block and the prefetched one": 2 * 2 * BLOCK,
        "gradient of the last product's weight": 2 * 4096 * 14_336,
        "float32 gradients being reduced": 4 * BLOCK,
    }
    assert budget.fullest == "backward pass of a block"
    assert budget.peak == sum(lines.values())
    assert budget.host == 0


def test_budget_of_adapters_and_of_a_resident_reference():
    """A frozen bfloat16 base with float32 adapters: only these have gradients and state."""
    adapters = 41_943_040
    load = mistral(8, counts=ParameterCounts(adapters, PARAMETERS), optimizer="adamw")
    budget = memory_budget(load)
    lines = budget.resident | budget.phases["backward pass of a block"]
    assert lines["parameters"] == (2 * PARAMETERS + 4 * adapters) // 8
    assert lines["adamw state"] == 8 * adapters // 8
    assert lines["gradients (float32)"] == 4 * adapters // 8
    assert lines["gradient of the last product's weight"] == 2 * adapters // 32
    assert budget.phases["backward pass of the head"]["gradient of the head"] == 0
    assert lines["reference model"] == 0  # the base without its adapters
    online = memory_budget(mistral(8, reference_width=2)).resident
    assert online["reference model"] == 2 * PARAMETERS // 8


def test_budget_of_offloading():
    budget = memory_budget(mistral(8, cpu_offload=True))
    assert budget.host == 4 * PARAMETERS // 8 * 4  # weights, gradients and two moments
    assert budget.peak < memory_budget(mistral(8)).peak - 3 * 4 * PARAMETERS // 8


# What does not depend on the number of ranks while a block runs backward, in bytes: by hand, the
# sum of the undivided lines above; and bytes per parameter that are divided.
UNDIVIDED = 6_349_545_472 - 2 * (BLOCK - 4096 * 14_336)


@pytest.mark.parametrize(
    ("gpu", "settings", "divided", "ranks"),
    [
        ("a100-40gb", {"optimizer": "rmsprop"}, 12, 4),
        ("a100-40gb", {"optimizer": "adamw"}, 16, 4),
        ("a100-40gb", {"optimizer": "adamw", "reference_width": 2}, 18, 8),
        ("a100-80gb", {"optimizer": "adamw"}, 16, 2),
        ("h100", {"optimizer": "rmsprop"}, 12, 2),
        ("rtx-4090", {"optimizer": "adamw", "state_width": 2}, 12, 8),
        ("rtx-4090", {"optimizer": "adamw"}, 16, 8),
        ("rtx-4090", {"optimizer": "adamw", "reference_width": 4}, 20, 16),
    ],
)
def test_the_verdict_flips_at_the_right_number_of_gpus(gpu, settings, divided, ranks):
    limit = usable(gpu_named(gpu))
    needed = divided * PARAMETERS / (limit - UNDIVIDED)
    assert ranks / 2 < needed <= ranks  # the table, recomputed
    peak = UNDIVIDED + divided * PARAMETERS / ranks
    assert memory_budget(mistral(ranks, **settings)).peak == pytest.approx(peak, rel=1e-9)
    fits = [n for n in (1, 2, 4, 8, 16) if memory_budget(mistral(n, **settings)).peak <= limit]
    assert fits == [n for n in (1, 2, 4, 8, 16) if n >= ranks]


def test_one_h200_holds_adamw_on_mistral_7b():
    """16 bytes per parameter, 115.9 GB; without checkpointing 36.7 GB of activations more."""
    limit = usable(gpu_named("h200"))
    assert memory_budget(mistral(1)).peak <= limit
    assert memory_budget(mistral(1, activation_checkpointing="none")).peak > limit
