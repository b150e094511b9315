"""Who may attend to whom: one predicate, and the backends that apply it.

A microbatch is one row of T token slots that holds many documents side by side. Every slot knows
its document, its branch within the document (the prompt, or one of the responses that continue
it), its position, and whether it takes part in attention at all. From these four numbers
`may_attend` decides for every (query, key) pair. FlexAttention computes the same from intervals of
slots, and takes the predicate itself where they differ; FlashAttention computes only causal
sequences, and `check_segments` makes a difference an error.

    backend  device  computation
    flex     CUDA    FlexAttention over the blocks of slots in which the predicate holds somewhere
    varlen   any     a causal sequence for each branch (`packing.Segments`): on CUDA FlashAttention,
                     only in bfloat16, whose backward pass adds in no fixed order; on the CPU one
                     sequence after another
    dense    any     a [T, T] boolean mask and scaled_dot_product_attention

Shapes: T slots, N query heads, K key/value heads, H head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from notus.data.packing import PADDING, PROMPT, Layout, Segments
from notus.errors import UserError
from notus.model.intervals import BLOCK, agrees, agrees_on, block_mask


@dataclass(frozen=True)
class SegmentMask:
    """The predicate within segments.

    masks: on the CPU, bool [queries, keys] of every segment, None where it is plainly causal. On
    CUDA there are none: FlashAttention takes `window` and computes causal segments, which is what
    the predicate says as long as `check_segments` raises nothing.
    """

    segments: Segments
    window: int | None
    masks: list[Tensor | None] | None


AttentionMask = Tensor | BlockMask | SegmentMask

# With these, FlexAttention's backward kernel for bfloat16 heads of 128 spills few registers on an
# H100 or an A100; with PyTorch's own it spills many.
TILES = {f"bwd_BLOCK_{name}": 64 for name in ("M1", "N1", "M2", "N2")}
TILES |= {"bwd_num_stages": 2, "bwd_num_warps": 8}

# Since torch 2.12 fewer key than query heads must be allowed by name.
_GROUPED_QUERIES = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention as a kernel of its own; not at import, which would take a second longer."""
    return torch.compile(flex_attention, dynamic=True)


def may_attend(layout: Layout, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether slot `query` may look at slot `key`: bool, in the broadcast shape of the two indices.

    Both are integer tensors of slot indices. True when both are in the same document, the key is
    not later, the key is in the prompt or in the query's own branch, their positions differ by less
    than `window` (None: no limit), and neither is hidden. Padding may attend only to itself.
    Nothing is changed in place, which FlexAttention's kernel does not allow.
    """
    distance = layout.position[query] - layout.position[key]
    allowed = (layout.document[query] == layout.document[key]) & (distance >= 0)
    key_branch = layout.branch[key]
    allowed = allowed & ((key_branch == PROMPT) | (key_branch == layout.branch[query]))
    if window is not None:
        allowed = allowed & (distance < window)
    allowed = allowed & ~(layout.hidden[query] | layout.hidden[key])
    return torch.where(layout.document[query] == PADDING, query == key, allowed)


def build_mask(layout: Layout, window: int | None, backend: str) -> AttentionMask:
    """The predicate over all T x T slots in the form that `backend` needs; once per microbatch.

    backend: "dense" gives a bool tensor [T, T], "flex" a BlockMask, "varlen" a SegmentMask. For a
    row with hidden tokens, which FlashAttention cannot skip, "varlen" is replaced by "flex" on CUDA
    and by "dense" on the CPU.
    """
    slots = torch.arange(len(layout.document), device=layout.document.device)
    if backend == "varlen" and layout.segments is None:
        backend = "flex" if slots.is_cuda else "dense"
    if backend == "flex":
        in_blocks = layout.intervals is not None and len(slots) % BLOCK == 0
        if in_blocks and agrees(may_attend, window):
            return block_mask(layout, window)

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return may_attend(layout, query, key, window)

        return create_block_mask(mask_mod, None, None, *slots.shape * 2, device=slots.device)
    if backend == "varlen":
        mask = SegmentMask(layout.segments, window, masks=None)
        mask = mask if slots.is_cuda else _in_segments(layout, window)
        if mask is not None:
            return mask
    return may_attend(layout, slots[:, None], slots[None, :], window)


def _in_segments(layout: Layout, window: int | None) -> SegmentMask | None:
    """The predicate within each segment; None where it allows a key outside its query's segment.

    One segment's queries at a time: over all T x T slots at once, the predicate takes longer and 7
    bytes for each pair of slots (450 MiB if T is 8,192).
    """
    masks: list[Tensor | None] = []
    segments = layout.segments
    slots = torch.arange(len(layout.document))
    edges = torch.stack((segments.query_edges, segments.key_edges), 1).tolist()
    for (query, key), (query_end, key_end) in pairwise(edges):
        allowed = may_attend(layout, slots[query:query_end, None], slots[None, :], window)
        mask = allowed[:, segments.key_slots[key:key_end]]
        if mask.sum() < allowed.sum():
            return None
        causal = mask.shape[0] == mask.shape[1] and torch.equal(mask, torch.ones_like(mask).tril())
        masks.append(None if causal else mask)
    return SegmentMask(segments, window, masks)


def check_segments(layout: Layout, sliding_window: int | None) -> None:
    """Raise UserError if `may_attend` was edited, which FlashAttention would ignore.

    layout: of a packed row, on the CPU, which is compared like the rows of `agrees`.
    """
    same = agrees(may_attend, sliding_window) and agrees_on(may_attend, layout, sliding_window)
    if not same:
        raise UserError(
            'parallel.attention: found "varlen", expected "flex" or "dense": on CUDA it '
            "is FlashAttention, which computes only causal sequences, and may_attend in "
            "notus/model/attention.py allows something else"
        )


def default_backend(device: torch.device, head_dim: int, compiled: bool = False) -> str:
    """The backend where the configuration names none; on CUDA one with bit-identical repeats.

    FlexAttention's kernels need heads of at least 16, and it has no backward pass on the CPU, where
    segments are not compiled.
    """
    if device.type == "cuda":
        return "flex" if head_dim >= 16 else "dense"
    return "dense" if compiled else "varlen"


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, mask: AttentionMask) -> Tensor:
    """Grouped-query attention of one packed row, scaled by 1 / sqrt(H).

    Returns [T, N, H] in the dtype of the queries; zero where the mask allows a query no key.
    """
    if isinstance(mask, SegmentMask):
        return _attend_in_segments(q_TNH, k_TKH, v_TKH, mask)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))  # [1, heads, T, H]
    if isinstance(mask, BlockMask):
        flex = flex_attention
        # Part of a compiled block; elsewhere compiled by itself, or it would store all scores.
        if q.is_cuda and not torch.compiler.is_compiling():
            flex = _compiled_flex_attention()
        options = _kernel_options(q)
        out = flex(q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


def flex_tiles(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """FlexAttention's options that set its tiles; empty where they are PyTorch's."""
    return TILES if (dtype, head_dim) == (torch.bfloat16, 128) else {}


def _kernel_options(q: Tensor) -> dict[str, int] | None:
    """FlexAttention's, for queries [1, N, T, H]; None leaves all to PyTorch."""
    return None if q.shape[2] % BLOCK else {"IS_DIVISIBLE": True} | flex_tiles(q.dtype, q.shape[3])


def _attend_in_segments(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, mask: SegmentMask) -> Tensor:
    segments = mask.segments
    k, v = (_Copies.apply(x, segments.key_slots, segments.copies) for x in (k_TKH, v_TKH))
    if mask.masks is None:
        return varlen_attn(
            q_TNH,
            k,
            v,
            segments.query_edges,
            segments.key_edges,
            segments.most_queries,
            segments.most_keys,
            window_size=(-1 if mask.window is None else mask.window - 1, 0),
            **_GROUPED_QUERIES,
        )
    queries = q_TNH.transpose(0, 1).split(segments.query_edges.diff().tolist(), dim=1)
    sizes = segments.key_edges.diff().tolist()
    keys, values = (x.transpose(0, 1).split(sizes, dim=1) for x in (k, v))
    parts = [
        scaled_dot_product_attention(
            *(x.unsqueeze(0) for x in qkv), attn_mask=m, is_causal=m is None, enable_gqa=True
        )
        for *qkv, m in zip(queries, keys, values, mask.masks, strict=True)
    ]
    return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1)


class _Copies(torch.autograd.Function):
    """Rows of x by index; the gradients of a row's copies are summed in order, in float32.

    Indexing does that too, but on CUDA with atomic additions, so that runs would not be repeatable.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, key_slots: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(copies)
        return x[key_slots]

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (copies,) = ctx.saved_tensors
        padded = torch.cat((gradient, gradient.new_zeros(1, *gradient.shape[1:])))
        first, second, third = (padded[index] for index in copies.unbind(1))
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return (first.to(wide) + second + third).to(gradient.dtype), None, None
