"""The memory of one rank while it trains: the largest sum of tensors that exist together.

What is kept for the backward pass follows model/mistral.py line by line; what is gathered when
follows PyTorch's fully_shard: a unit is a transformer block, the head, or the root with the
embedding. tests/dryrun/test_memory.py compares the sum with what the CPU allocator gave,
benchmarks/memory.py with what the GPU's did. All sizes are in bytes.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from notus.errors import UserError
from notus.kernels.reference import CHUNK_LOGITS
from notus.model.hf_config import ModelShape
from notus.model.lora import LoraLinear, LoraSettings, add_adapters
from notus.model.mistral import MistralForCausalLM, count_parameters

MODES = ("none", "selective", "full")  # of activation checkpointing, by what is recomputed
OPTIMIZER_STATES = {"adamw": 2, "rmsprop": 1}  # numbers per trainable parameter
# Of kernels/linear_log_probs.py, which cannot be imported without Triton.
TRITON_CHUNK_ROWS = 2048
FED = ("gate", "up")  # the products that read the second norm, as q, k and v read the first
# The block that `block_bytes` was written for; a bias keeps nothing.
BLOCK_PARAMETERS = {
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in (*FED, "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}
QK_NORMS = {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}  # where shape.qk_norm


class Adapters(NamedTuple):
    """The change of one block's activations by its adapters, in numbers per token."""

    results: int  # of the products with A and with B
    thin: int  # of these, with A: what B multiplies
    norms: int  # results of norms that an A multiplies as they are: at most two
    down: bool  # whether one of them is the last product's, down_proj
    dropped: int  # inputs of which dropout makes a copy for an A


class ParameterCounts(NamedTuple):
    """The policy's parameters, and its adapters, if any."""

    trainable: int  # in float32
    frozen: int  # 0 in full training; with adapters, only these are trained
    adapters: Adapters | None = None


def parameter_counts(shape: ModelShape, lora: LoraSettings | None) -> ParameterCounts:
    """The counts, from the modules. Raises UserError for adapters that the decoder cannot have."""
    base = count_parameters(shape)
    if lora is None:
        return ParameterCounts(trainable=base, frozen=0)
    with torch.device("meta"):
        model = MistralForCausalLM(shape)
        add_adapters(model, lora)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    first = model.model.layers[0].named_modules()
    chosen = {name: module for name, module in first if isinstance(module, LoraLinear)}
    names, plain = " ".join(chosen), not lora.dropout
    norms = plain * sum(any(f"{n}_proj" in names for n in read) for read in ("qkv", FED))
    adapters = Adapters(
        results=sum(lora.rank + module.out_features for module in chosen.values()),
        thin=lora.rank * len(chosen),
        norms=norms,
        down="down_proj" in names,
        dropped=0 if plain else sum(module.in_features for module in chosen.values()),
    )
    return ParameterCounts(trainable, base, adapters)


class UnitSizes(NamedTuple):
    """Parameters that are gathered at once: a block's, the root's own, the head's (0 if tied)."""

    block: int
    root: int
    head: int


@lru_cache
def unit_sizes(shape: ModelShape) -> UnitSizes:
    """The decoder's units, from its modules. Raises UserError for a block of other parameters."""
    with torch.device("meta"):
        model = MistralForCausalLM(shape)
    parameters = dict(model.model.layers[0].named_parameters())
    names = {name for name in parameters if not name.endswith(".bias")}
    known = BLOCK_PARAMETERS | (QK_NORMS if shape.qk_norm else set())
    for name in sorted(names ^ known):
        problem = "expects" if name in known else "does not know"
        raise UserError(
            f"the memory formula {problem} the parameter {name} of a block; edit "
            "block_bytes and BLOCK_PARAMETERS in notus/dryrun/memory.py"
        )
    block = sum(p.numel() for p in parameters.values())
    head = 0 if shape.tie_word_embeddings else model.lm_head.weight.numel()
    return UnitSizes(block, count_parameters(shape) - shape.num_hidden_layers * block - head, head)


@dataclass(frozen=True)
class MemorySettings:
    """All that the memory of one rank depends on. Widths are bytes of one number."""

    shape: ModelShape
    shard: int  # ranks that divide one copy of the parameters
    counts: ParameterCounts
    compute_width: int  # of forward and backward, and of each frozen parameter
    slots: int  # of the longest row trained on
    scored: int  # of these, those that predict a response token
    scoring_slots: int  # of the longest row without gradient (evaluation, reference)
    optimizer: str
    state_width: int  # of the optimiser's numbers per parameter, see OPTIMIZER_STATES
    activation_checkpointing: str
    reference_width: int  # of a resident reference's parameters, 0 without one
    kept_log_probs: int  # float32 reference log-probs on the device
    cpu_offload: bool
    keep_gathered: bool
    compiled: bool  # the blocks
    triton: bool  # the head runs its Triton kernels, not their plain definition
    on_cpu: bool  # attention has a dense [T, T] mask, and the head multiplies in float32


class MemoryBudget(NamedTuple):
    """The memory of one rank, as names and bytes."""

    resident: dict[str, int]  # held all the time
    phases: dict[str, dict[str, int]]  # held in addition in the moments that can be the fullest
    host: int  # what CPU offload moves to the memory of the machine, for this rank

    @property
    def fullest(self) -> str:
        """The phase with the most bytes."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return sum(self.resident.values()) + sum(self.phases[self.fullest].values())


def block_bytes(
    shape: ModelShape, width: int, mode: str, compiled: bool, adapters: Adapters | None = None
) -> tuple[int, int]:
    """Bytes per token slot that a block keeps for its backward pass, and what that pass adds.

    mode: of activation checkpointing; width: bytes of the compute dtype; adapters: None in full
    training. "none" keeps: of a norm, its input in float32, that scaled, and its result (compiled,
    only input and result, in the compute dtype); of attention, its rotated queries and keys,
    values, output and float32 log-sum-exp, and the rounded rotary tables; of the feed-forward part
    gate, silu(gate) (recomputed if compiled), up and their product. Under adapters the scaled
    inputs go, since only the norms' frozen weights use them, and so do results of norms and the
    product unless an adapter multiplies them; of each adapter its thin product stays, and with
    dropout its input after that and a mask of one byte for each number. "selective": the input and
    the results of matrix products and of attention. "full": the input. The pass adds what is
    recomputed, and gradients: of the product, of silu(gate) and of up at once, when the product
    itself is no longer needed, and of the residual stream.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    log_sum_exp = 4 * shape.num_attention_heads
    scaled = 0 if compiled or adapters else width
    results = adapters.norms if adapters else 2  # of norms
    # In float32 the float32 input is the residual stream itself, and the tables need no rounding.
    norms = 2 * ((width if compiled else 4) + scaled) * hidden + results * width * hidden + 2 * 4
    if shape.qk_norm:  # its result is rotated, which keeps nothing
        norms += ((width if compiled else 4) + scaled) * (queries + keys)
        norms += 4 * (shape.num_attention_heads + shape.num_key_value_heads)
    tables = (2 if compiled else 4) * width * shape.head_dim if width < 4 else 0
    attention = width * (2 * queries + 2 * keys) + tables + log_sum_exp
    product = adapters is None or (adapters.down and not adapters.dropped)
    everything = norms + attention + ((2 if compiled else 3) + product) * width * inner
    if adapters:
        everything += width * adapters.thin + (width + 1) * adapters.dropped
    gradients = width * (2 * inner + 2 * hidden)
    if mode == "none":
        return everything, gradients
    if mode == "full":
        return width * hidden, everything + gradients
    assert mode == "selective", mode
    # The feed-forward part's result is kept too, but a compiler sees that nothing reads it.
    kept = (2 if compiled else 3) * hidden + 2 * queries + 2 * keys + 2 * inner
    if adapters:
        kept += adapters.results - (hidden if compiled and adapters.down else 0)
    present = width * (2 * inner + queries + keys)  # gate, up, values and attention's output
    return width * kept + log_sum_exp, everything - present + gradients


def _block_activations(settings: MemorySettings) -> tuple[int, int]:
    """One block's activations: kept for its backward pass, and needed by that pass."""
    mode, width, slots = settings.activation_checkpointing, settings.compute_width, settings.slots
    adapters = settings.counts.adapters
    kept, at_work = block_bytes(settings.shape, width, mode, settings.compiled, adapters)
    if settings.on_cpu and mode == "none":  # attention keeps the mask as numbers, in every block
        kept += width * slots
    elif settings.on_cpu:
        at_work += width * slots
    return kept * slots, at_work * slots


def _gathered(settings: MemorySettings, units: UnitSizes) -> tuple[dict[str, int], ...]:
    """The bytes gathered for a block, for the head, and while gradients are reduced.

    A unit goes through a buffer, and the next one's buffer fills meanwhile.
    """
    width, (trainable, frozen, _) = settings.compute_width, settings.counts
    if settings.keep_gathered:
        return ({"gathered model, kept for the step": width * (frozen + trainable)},) * 3
    buffer = 0 if settings.shard == 1 else width * units.block
    root = {"gathered embedding": width * units.root}
    return (
        root | {"gathered block and the prefetched one": width * units.block + buffer},
        root | {"gathered head and the prefetched block": width * units.head + buffer},
        root | {"prefetched block": buffer},
    )


def _reduction(settings: MemorySettings, parameters: int) -> dict[str, int]:
    """The gradients, which one rank no longer needs then, their float32 copy and its share."""
    width = settings.compute_width if settings.shard > 1 else 0
    share = 4 * parameters // settings.shard
    return {"float32 gradients being reduced": (width + 4) * parameters + share}


def _head(settings: MemorySettings) -> tuple[int, int, int]:
    """The head's chunk of rows with a gradient, the same without one, and the weight's gradient.

    The head goes through its rows in chunks, and adds up its gradient in float32. Of its operands a
    GPU rounds the logits' gradient (Triton in place) and the CPU widens the weight.
    """
    width, triton, on_cpu = settings.compute_width, settings.triton, settings.on_cpu
    hidden, words = settings.shape.hidden_size, settings.shape.vocab_size
    most_rows = TRITON_CHUNK_ROWS if triton else max(1, CHUNK_LOGITS // words)
    rows = min(settings.scored, most_rows)
    widened = 4 * words * hidden if on_cpu and width < 4 else 0
    rounded = 0 if triton or on_cpu or width == 4 else width * words * rows
    logits = 4 * words * rows + widened
    gradient = 4 * words * hidden + (width * words * hidden if width < 4 else 0)
    return (
        logits + rounded + 4 * hidden * rows,
        0 if triton else logits,  # fused without gradient
        0 if settings.counts.frozen else gradient,
    )


def memory_budget(settings: MemorySettings) -> MemoryBudget:
    """The memory of one rank at the fullest moments of a step.

    The moments: the head's backward pass, with all blocks' activations; the last block's, in its
    feed-forward part and when all its gradients are there; the reduction of a block's gradients;
    that of the embedding's; the optimiser's step; and scoring without gradient.
    """
    shape, width, slots = settings.shape, settings.compute_width, settings.slots
    shard, mode = settings.shard, settings.activation_checkpointing
    layers, hidden, inner = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    trainable, frozen, _ = settings.counts
    states = settings.state_width * OPTIMIZER_STATES[settings.optimizer] * trainable // shard
    resident = {
        "parameters": (4 * trainable + width * frozen) // shard,
        f"{settings.optimizer} state": states,
        "reference model": settings.reference_width * (frozen or trainable) // shard,
    }
    gradients = {"gradients (float32)": 4 * trainable // shard}
    host = 0
    if settings.cpu_offload:
        host = sum(resident.values()) + sum(gradients.values())
        resident, gradients = {}, {}
    resident["reference log-probs (float32)"] = 4 * settings.kept_log_probs
    # int64 tokens and rows, the layout, two float32 tables, and on the CPU the mask
    per_slot = 32 + 8 * shape.head_dim + (slots if settings.on_cpu else 0)
    resident["microbatch and rotary tables"] = slots * per_slot

    units = trained = unit_sizes(shape)
    if frozen:  # adapters are in the blocks, and nothing else is trained
        trained = UnitSizes(trainable // layers, 0, 0)
        units = units._replace(block=units.block + trained.block)
    at_block, at_head, at_reduction = _gathered(settings, units)
    kept, at_work = _block_activations(settings)
    trained_logits, scored_logits, head_gradient = _head(settings)
    name = f"activations of {layers} blocks ({mode} checkpointing)"
    activations, other_activations = {name: layers * kept}, {name: (layers - 1) * kept}
    recomputed = "" if mode == "none" else "recomputed activations and "
    # Those of the unit before: their reduction may not have ended.
    in_flight = {"float32 gradients being reduced": 4 * max(trained.block, trained.head)}
    phases = {
        "backward pass of the head": {
            **gradients,
            **activations,
            "hidden states of scored tokens": settings.scored * hidden * (4 + 4 * width),
            **at_head,
            "logits of one chunk of rows": trained_logits,
            "gradient of the head": head_gradient,
        },
        "backward pass of a block": {
            **gradients,
            **activations,
            f"{recomputed}gradients, of one block": at_work,
            **at_block,
            "gradient of the last product's weight": width * min(trained.block, hidden * inner),
            **in_flight,
        },
        "end of a block's backward pass": {
            **gradients,
            **other_activations,
            "activations of the first norm": (4 + 4 * width) * hidden * slots,
            **at_block,
            "gradients of a block's parameters": width * trained.block,
            **in_flight,
        },
        "reduction of a block's gradients": {
            **gradients,
            **other_activations,
            **at_reduction,
            **_reduction(settings, trained.block),
        },
        "reduction of the embedding's gradients": {
            **gradients,
            **_reduction(settings, trained.root),
        },
        "optimiser step": gradients,
        "scoring without gradient": {
            **at_block,
            "activations of one block": 3 * width * (inner + hidden) * settings.scoring_slots,
            "logits of one chunk of rows": scored_logits,
        },
    }
    return MemoryBudget(resident, phases, host)
