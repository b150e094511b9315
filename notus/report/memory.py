"""The memory of one rank while it trains: the largest sum of tensors that are alive together.

Computed from the decoder's shape and the length of a row. What is kept for the backward pass
follows model/mistral.py line by line; what is gathered when follows PyTorch's fully_shard
(torch/distributed/fsdp/_fully_shard): a unit is a transformer block, the head, or the root with the
embedding. tests/report/test_memory.py compares the sum with what the allocator really gave,
benchmarks/memory.py does so on a GPU. All sizes are in bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from notus.kernels.reference import CHUNK_LOGITS
from notus.model.lora import LoraSettings, add_adapters
from notus.model.mistral import MistralForCausalLM, ModelShape

MODES = ("none", "selective", "full")  # of activation checkpointing, by what is recomputed
OPTIMIZER_STATES = {"adamw": 2, "rmsprop": 1}  # numbers per trainable parameter
# Of kernels/linear_log_probs.py, which cannot be imported without Triton.
TRITON_CHUNK_ROWS = 2048


class Counts(NamedTuple):
    """Parameters of the whole policy, and what its adapters, if any, add to a block.

    trainable: in float32. frozen: 0 in full training; with adapters, these alone are trained.
    adapter_results: numbers per token that the products of one block's adapters give.
    """

    trainable: int
    frozen: int
    adapter_results: int


def parameter_counts(shape: ModelShape, lora: LoraSettings | None) -> Counts:
    """Counted in the modules. Raises UserError for adapters that the decoder cannot have."""
    with torch.device("meta"):
        model = MistralForCausalLM(shape)
        if lora is not None:
            add_adapters(model, lora)
    trainable = [p for p in model.parameters() if p.requires_grad]
    adapters = model.model.layers[0].parameters() if lora is not None else ()
    return Counts(
        trainable=_count(trainable),
        frozen=_count(model.parameters()) - _count(trainable),
        adapter_results=sum(len(p) for p in adapters if p.requires_grad),
    )


class Units(NamedTuple):
    """Parameters of what is gathered at once: one block, the root's own, the head (0 if tied)."""

    block: int
    root: int
    head: int


@lru_cache
def units_of(shape: ModelShape) -> Units:
    """The decoder's units, counted in the modules themselves."""
    with torch.device("meta"):
        model = MistralForCausalLM(shape)
    block = _count(model.model.layers[0].parameters())
    head = 0 if shape.tie_word_embeddings else _count(model.lm_head.parameters())
    everything = _count(model.parameters())
    return Units(block, everything - shape.num_hidden_layers * block - head, head)


def _count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class Load:
    """What the memory of one rank depends on.

    shard: ranks that divide one copy of the parameters. counts: see Counts; frozen_width: bytes of
    each frozen one. compute_width: bytes of the type of forward and backward. slots: length of the
    longest row trained on, of which `scored` predict a response token; scoring_slots: of the
    longest row without gradient (evaluation, reference). state_width: bytes of each of the
    optimiser's numbers per parameter, see OPTIMIZER_STATES. reference_width: bytes per parameter of
    a resident reference, 0 without one. kept_log_probs: float32 reference log-probs on the device.
    compiled: blocks are; triton: the head runs its Triton kernels, not their plain definition;
    on_cpu: attention takes the "dense" backend's [T, T] mask, and the head multiplies in float32.
    """

    shape: ModelShape
    shard: int
    counts: Counts
    frozen_width: int
    compute_width: int
    slots: int
    scored: int
    scoring_slots: int
    optimizer: str
    state_width: int
    activation_checkpointing: str
    reference_width: int
    kept_log_probs: int
    cpu_offload: bool
    keep_gathered: bool
    compiled: bool
    triton: bool
    on_cpu: bool


class Line(NamedTuple):
    """One entry of the budget: bytes on one rank."""

    name: str
    size: int


class Phase(NamedTuple):
    """What is alive at one moment of a step beside what always is."""

    name: str
    lines: tuple[Line, ...]

    @property
    def size(self) -> int:
        return sum(line.size for line in self.lines)


class Budget(NamedTuple):
    """The memory of one rank, in bytes.

    resident: held all the time. phases: the moments that can be the fullest. host: what CPU offload
    moves to the memory of the machine, for this rank.
    """

    resident: tuple[Line, ...]
    phases: tuple[Phase, ...]
    host: int

    @property
    def fullest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.size)

    @property
    def peak(self) -> int:
        return sum(line.size for line in self.resident) + self.fullest.size


def block_bytes_kept(shape: ModelShape, width: int, mode: str, compiled: bool) -> int:
    """Bytes that one block keeps for its backward pass, per token slot.

    mode: of activation checkpointing; width: bytes of the compute dtype. "none": a norm keeps its
    input in float32, that scaled, and its result (compiled, only input and result, in the compute
    dtype); attention its rotated queries and keys, values, output and float32 log-sum-exp, and the
    rounded rotary tables; the feed-forward part gate, silu(gate) (recomputed if compiled), up and
    their product. "selective": the input and the results of matrix products and of attention.
    "full": the input.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    log_sum_exp = 4 * shape.num_attention_heads
    if mode == "full":
        return width * hidden
    if mode == "selective":
        # The feed-forward part's result is kept too, but a compiler sees that nothing reads it.
        results = (1 if compiled else 2) * hidden + 2 * queries + 2 * keys + 2 * inner
        return width * (hidden + results) + log_sum_exp
    assert mode == "none", mode
    # In float32 the float32 input is the residual stream itself, and the tables need no rounding.
    norms = 2 * (2 * width if compiled else 4 + 2 * width) * hidden + 2 * 4
    tables = (2 if compiled else 4) * width * shape.head_dim if width < 4 else 0
    attention = width * (2 * queries + 2 * keys) + tables + log_sum_exp
    return norms + attention + (3 if compiled else 4) * width * inner


def block_bytes_at_work(shape: ModelShape, width: int, mode: str, compiled: bool) -> int:
    """Bytes per token slot that a block's backward pass needs beyond `block_bytes_kept`.

    What is recomputed, and the gradients: of the product, of silu(gate) and of up at once, when the
    product itself is no longer needed, and of the residual stream.
    """
    inner, hidden = shape.intermediate_size, shape.hidden_size
    gradients = width * (2 * inner + 2 * hidden)
    if mode == "none":
        return gradients
    recomputed = block_bytes_kept(shape, width, "none", compiled)
    if mode == "selective":  # gate, up, values and attention's output are there already
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        recomputed -= width * (2 * inner + queries + keys)
    return recomputed + gradients


def memory_budget(load: Load) -> Budget:
    """What one rank holds at the fullest moments of a step.

    The moments: the head's backward pass, with all blocks' activations; the last block's, in its
    feed-forward part and when all its gradients are there; the reduction of a block's gradients;
    that of the embedding's; the optimiser's step; and scoring without gradient.
    """
    shape, width, slots = load.shape, load.compute_width, load.slots
    layers, hidden = shape.num_hidden_layers, shape.hidden_size
    vocabulary = shape.vocab_size * hidden
    trainable, frozen, adapter_results = load.counts
    shards, alone = load.shard, load.shard == 1
    units = trained = units_of(shape)
    if frozen:  # adapters sit in the blocks, and nothing else is trained
        trained = Units(trainable // layers, 0, 0)
        units = units._replace(block=units.block + trained.block)

    # Held all the time
    whole = frozen or trainable
    states = load.state_width * OPTIMIZER_STATES[load.optimizer] * trainable
    weights = Line("parameters", (4 * trainable + load.frozen_width * frozen) // shards)
    state = Line(f"{load.optimizer} state", states // shards)
    gradients = Line("gradients (float32)", 4 * trainable // shards)
    reference = Line("reference model", load.reference_width * whole // shards)
    sharded = (weights, state, reference)
    masks = slots * slots if load.on_cpu else 0
    resident = (
        *(line for line in sharded if not load.cpu_offload),
        Line("reference log-probs (float32)", 4 * load.kept_log_probs),
        # int64 tokens and rows, the layout, and two float32 tables
        Line("microbatch and rotary tables", slots * (32 + 8 * shape.head_dim) + masks),
    )
    gradients_here = gradients._replace(size=0 if load.cpu_offload else gradients.size)

    # Kept from the forward pass
    mode, compiled = load.activation_checkpointing, load.compiled
    kept = block_bytes_kept(shape, width, mode, compiled)
    work = block_bytes_at_work(shape, width, mode, compiled)
    if mode == "selective":  # which keeps the results of the adapters' products too
        kept += width * adapter_results
    if load.on_cpu:  # attention keeps the mask as numbers, in every block
        kept += width * slots if mode == "none" else 0
        work += width * slots if mode != "none" else 0
    recomputed = "" if mode == "none" else "recomputed activations and "
    activations = Line(
        f"activations of {layers} blocks ({mode} checkpointing)", layers * kept * slots
    )
    scored = Line("hidden states of scored tokens", load.scored * hidden * (4 + 4 * width))

    # Gathered: a unit goes through a buffer, and the next one's buffer fills meanwhile.
    buffer = 0 if alone else width * units.block
    if load.keep_gathered:
        model = Line(
            "gathered model, kept for the step",
            width * (whole + trainable * (frozen > 0)),
        )
        at_block = at_head = at_reduction = (model,)
    else:
        root = Line("gathered embedding", width * units.root)
        at_block = (
            root,
            Line("gathered block and the prefetched one", width * units.block + buffer),
        )
        at_head = (
            root,
            Line("gathered head and the prefetched block", width * units.head + buffer),
        )
        at_reduction = (root, Line("prefetched block", buffer))

    def reduction(parameters: int) -> Line:
        """The gradients, their float32 copy and its share; alone a whole output and a copy more."""
        size = 12 * parameters if alone else (4 + width) * parameters + 4 * parameters // shards
        return Line("float32 gradients being reduced", size)

    # The head goes through its rows in chunks, and adds up its gradient in float32. Of its operands
    # a GPU rounds the logits' gradient (Triton in place) and the CPU widens the weight.
    most_rows = TRITON_CHUNK_ROWS if load.triton else max(1, CHUNK_LOGITS // shape.vocab_size)
    rows = min(load.scored, most_rows)
    widened = 4 * vocabulary if load.on_cpu and width < 4 else 0
    rounded = 0 if load.triton or load.on_cpu or width == 4 else width * shape.vocab_size * rows
    logits = Line("logits of one chunk of rows", 4 * shape.vocab_size * rows + widened)
    logits_scored = logits._replace(size=0) if load.triton else logits  # fused without gradient
    logits_trained = logits._replace(size=logits.size + rounded + 4 * hidden * rows)
    head_gradient = 0 if frozen else 4 * vocabulary + (width * vocabulary if width < 4 else 0)
    last_product = min(trained.block, hidden * shape.intermediate_size)
    # Those of the unit before: their reduction may not have ended.
    in_flight = Line("float32 gradients being reduced", 4 * max(trained.block, trained.head))
    phases = (
        Phase(
            "backward pass of the head",
            (
                gradients_here,
                activations,
                scored,
                *at_head,
                logits_trained,
                Line("gradient of the head", head_gradient),
            ),
        ),
        Phase(
            "backward pass of a block",
            (
                gradients_here,
                activations,
                Line(f"{recomputed}gradients, of one block", work * slots),
                *at_block,
                Line("gradient of the last product's weight", width * last_product),
                in_flight,
            ),
        ),
        Phase(
            "end of a block's backward pass",
            (
                gradients_here,
                activations._replace(size=(layers - 1) * kept * slots),
                Line("activations of the first norm", (4 + 4 * width) * hidden * slots),
                *at_block,
                Line("gradients of a block's parameters", width * trained.block),
                in_flight,
            ),
        ),
        Phase(
            "reduction of a block's gradients",
            (
                gradients_here,
                activations._replace(size=(layers - 1) * kept * slots),
                *at_reduction,
                reduction(trained.block),
            ),
        ),
        Phase(
            "reduction of the embedding's gradients",
            (gradients_here, reduction(trained.root)),
        ),
        Phase(
            "optimiser step",
            (
                gradients_here,
                # RMSprop takes the square roots of all its averages at once; AdamW is fused, and
                # with bfloat16 state one parameter is updated after another.
                Line(
                    "square roots of the averages",
                    state.size
                    if load.optimizer == "rmsprop"
                    and load.state_width == 4
                    and not (load.cpu_offload or load.on_cpu)
                    else 0,
                ),
            ),
        ),
        Phase(
            "scoring without gradient",
            (
                *at_block,
                Line(
                    "activations of one block",
                    3 * width * (shape.intermediate_size + hidden) * load.scoring_slots,
                ),
                logits_scored,
            ),
        ),
    )
    offloaded = (*sharded, gradients) if load.cpu_offload else ()
    return Budget(resident, phases, host=sum(line.size for line in offloaded))
