"""The memory of one rank while it trains: the largest sum of tensors that are alive together.

Computed from the decoder's shape and the length of a row. What is kept for the backward pass
follows model/mistral.py line by line; what is gathered when follows PyTorch's fully_shard
(torch/distributed/fsdp/_fully_shard): a unit is a transformer block, the head, or the root with the
embedding. tests/dryrun/test_memory.py compares the sum with what the allocator really gave,
benchmarks/memory.py does so on a GPU. All sizes are in bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from notus.kernels.reference import CHUNK_LOGITS
from notus.model.hf_config import ModelShape
from notus.model.lora import LoraSettings, add_adapters
from notus.model.mistral import MistralForCausalLM

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


def _gathered_and_trained(load: Load) -> tuple[Units, Units]:
    """The parameters of each unit: all that is gathered, and those that have gradients."""
    units = units_of(load.shape)
    if not load.counts.frozen:
        return units, units
    # Adapters sit in the blocks, and nothing else is trained.
    adapters = load.counts.trainable // load.shape.num_hidden_layers
    return units._replace(block=units.block + adapters), Units(adapters, 0, 0)


class _Sharded(NamedTuple):
    """What is divided over the ranks; all but the gradients is held all the time."""

    parameters: Line
    state: Line
    reference: Line
    gradients: Line


def _sharded(load: Load) -> _Sharded:
    trainable, frozen, _ = load.counts
    states = load.state_width * OPTIMIZER_STATES[load.optimizer] * trainable
    weights = 4 * trainable + load.frozen_width * frozen
    reference = load.reference_width * (frozen or trainable)
    return _Sharded(
        parameters=Line("parameters", weights // load.shard),
        state=Line(f"{load.optimizer} state", states // load.shard),
        reference=Line("reference model", reference // load.shard),
        gradients=Line("gradients (float32)", 4 * trainable // load.shard),
    )


class _BlockActivations(NamedTuple):
    """Bytes of one block's activations: kept for its backward pass, and needed by that pass."""

    kept: int
    at_work: int


def _block_activations(load: Load) -> _BlockActivations:
    mode, width = load.activation_checkpointing, load.compute_width
    kept = block_bytes_kept(load.shape, width, mode, load.compiled)
    work = block_bytes_at_work(load.shape, width, mode, load.compiled)
    if mode == "selective":  # which keeps the results of the adapters' products too
        kept += width * load.counts.adapter_results
    if load.on_cpu:  # attention keeps the mask as numbers, in every block
        kept += width * load.slots if mode == "none" else 0
        work += width * load.slots if mode != "none" else 0
    return _BlockActivations(kept * load.slots, work * load.slots)


class _GatheredLines(NamedTuple):
    """Whole parameters while a block works, while the head does, and while gradients are reduced.

    A unit goes through a buffer, and the next one's buffer fills meanwhile.
    """

    at_block: tuple[Line, ...]
    at_head: tuple[Line, ...]
    at_reduction: tuple[Line, ...]


def _gathered_lines(load: Load, units: Units) -> _GatheredLines:
    width, (trainable, frozen, _) = load.compute_width, load.counts
    if load.keep_gathered:
        model = Line("gathered model, kept for the step", width * (frozen + trainable))
        return _GatheredLines((model,), (model,), (model,))
    buffer = 0 if load.shard == 1 else width * units.block
    root = Line("gathered embedding", width * units.root)
    block = Line("gathered block and the prefetched one", width * units.block + buffer)
    head = Line("gathered head and the prefetched block", width * units.head + buffer)
    return _GatheredLines((root, block), (root, head), (root, Line("prefetched block", buffer)))


def _reduction(load: Load, parameters: int) -> Line:
    """The gradients, their float32 copy and its share; alone a whole output and a copy more."""
    shared = (4 + load.compute_width) * parameters + 4 * parameters // load.shard
    size = 12 * parameters if load.shard == 1 else shared
    return Line("float32 gradients being reduced", size)


class _HeadLines(NamedTuple):
    """The head's chunk of rows with a gradient, the same without one, and its own gradient."""

    trained: Line
    scored: Line
    gradient: Line


def _head_lines(load: Load) -> _HeadLines:
    """The head goes through its rows in chunks, and adds up its gradient in float32.

    Of its operands a GPU rounds the logits' gradient (Triton in place) and the CPU widens the
    weight.
    """
    width, hidden, words = load.compute_width, load.shape.hidden_size, load.shape.vocab_size
    most_rows = TRITON_CHUNK_ROWS if load.triton else max(1, CHUNK_LOGITS // words)
    rows = min(load.scored, most_rows)
    widened = 4 * words * hidden if load.on_cpu and width < 4 else 0
    rounded = 0 if load.triton or load.on_cpu or width == 4 else width * words * rows
    logits = Line("logits of one chunk of rows", 4 * words * rows + widened)
    gradient = 4 * words * hidden + (width * words * hidden if width < 4 else 0)
    return _HeadLines(
        trained=logits._replace(size=logits.size + rounded + 4 * hidden * rows),
        scored=logits._replace(size=0) if load.triton else logits,  # fused without gradient
        gradient=Line("gradient of the head", 0 if load.counts.frozen else gradient),
    )


def memory_budget(load: Load) -> Budget:
    """What one rank holds at the fullest moments of a step.

    The moments: the head's backward pass, with all blocks' activations; the last block's, in its
    feed-forward part and when all its gradients are there; the reduction of a block's gradients;
    that of the embedding's; the optimiser's step; and scoring without gradient.
    """
    shape, width, slots = load.shape, load.compute_width, load.slots
    mode = load.activation_checkpointing
    layers, hidden, inner = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    units, trained = _gathered_and_trained(load)
    sharded, block, head = _sharded(load), _block_activations(load), _head_lines(load)
    gathered = _gathered_lines(load, units)
    on_host = sharded if load.cpu_offload else ()
    masks = slots * slots if load.on_cpu else 0
    resident = (
        *(() if on_host else (sharded.parameters, sharded.state, sharded.reference)),
        Line("reference log-probs (float32)", 4 * load.kept_log_probs),
        # int64 tokens and rows, the layout, and two float32 tables
        Line("microbatch and rotary tables", slots * (32 + 8 * shape.head_dim) + masks),
    )
    gradients = sharded.gradients._replace(size=0 if on_host else sharded.gradients.size)
    activations = Line(
        f"activations of {layers} blocks ({mode} checkpointing)", layers * block.kept
    )
    other_activations = activations._replace(size=(layers - 1) * block.kept)
    recomputed = "" if mode == "none" else "recomputed activations and "
    last_product = min(trained.block, hidden * inner)
    # Those of the unit before: their reduction may not have ended.
    in_flight = Line("float32 gradients being reduced", 4 * max(trained.block, trained.head))
    # RMSprop takes the square roots of all its averages at once; AdamW is fused, and with bfloat16
    # state one parameter is updated after another.
    at_once = load.optimizer == "rmsprop" and load.state_width == 4
    roots = sharded.state.size if at_once and not (on_host or load.on_cpu) else 0
    moments = {
        "backward pass of the head": (
            gradients,
            activations,
            Line("hidden states of scored tokens", load.scored * hidden * (4 + 4 * width)),
            *gathered.at_head,
            head.trained,
            head.gradient,
        ),
        "backward pass of a block": (
            gradients,
            activations,
            Line(f"{recomputed}gradients, of one block", block.at_work),
            *gathered.at_block,
            Line("gradient of the last product's weight", width * last_product),
            in_flight,
        ),
        "end of a block's backward pass": (
            gradients,
            other_activations,
            Line("activations of the first norm", (4 + 4 * width) * hidden * slots),
            *gathered.at_block,
            Line("gradients of a block's parameters", width * trained.block),
            in_flight,
        ),
        "reduction of a block's gradients": (
            gradients,
            other_activations,
            *gathered.at_reduction,
            _reduction(load, trained.block),
        ),
        "reduction of the embedding's gradients": (gradients, _reduction(load, trained.root)),
        "optimiser step": (gradients, Line("square roots of the averages", roots)),
        "scoring without gradient": (
            *gathered.at_block,
            Line("activations of one block", 3 * width * (inner + hidden) * load.scoring_slots),
            head.scored,
        ),
    }
    phases = tuple(Phase(name, lines) for name, lines in moments.items())
    return Budget(resident, phases, host=sum(line.size for line in on_host))
