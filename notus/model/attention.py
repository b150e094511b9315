"""Who may attend to whom: one predicate, and the backends that apply it.

A microbatch is one row of T token slots that holds many documents side by side. Every slot knows
its document, its branch within the document (the prompt, or one of the responses that continue
it), its position, and whether it takes part in attention at all. From these four numbers
`may_attend` decides for every (query, key) pair. Every backend asks it but FlashAttention, which
knows causal sequences alone.

    backend  device  what it does
    flex     CUDA    FlexAttention over the blocks in which the predicate holds somewhere
    varlen   any     a causal sequence for each branch (`packing.Segments`) and nothing else: on
                     CUDA FlashAttention, in bfloat16 alone, whose backward pass adds in no fixed
                     order; on the CPU one sequence after another
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


@dataclass(frozen=True)
class SegmentMask:
    """The predicate within segments.

    masks: on the CPU, bool [queries, keys] of every segment, None where it is a plain causal one.
    There are none for FlashAttention, on CUDA, which knows `window` and that segments are causal; a
    predicate that says something else is not seen there.
    """

    segments: Segments
    window: int | None
    masks: list[Tensor | None] | None


AttentionMask = Tensor | BlockMask | SegmentMask

# Since torch 2.12 fewer key than query heads must be allowed by name.
_GROUPED_QUERIES = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """FlexAttention as a kernel of its own; not at import, which would take a second longer."""
    return torch.compile(flex_attention, dynamic=True)


def may_attend(layout: Layout, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether slot `query` may look at slot `key`: bool, in the broadcast shape of the two indices.

    Both are integer tensors of slot indices. True when both lie in the same document, the key is
    not later, the key is in the prompt or in the query's own branch, fewer than `window` positions
    lie between them (None: no limit), and neither is hidden. Padding may attend to itself alone.
    Nothing is changed in place: FlexAttention's kernel cannot hold that.
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
    """The predicate over all T x T slots in the form that `backend` wants; once per microbatch.

    backend: "dense" gives a bool tensor [T, T], "flex" a BlockMask, "varlen" a SegmentMask. A row
    with hidden tokens, which FlashAttention cannot pass over, takes another backend than "varlen".
    """
    slots = torch.arange(len(layout.document), device=layout.document.device)
    if backend == "varlen" and layout.segments is None:
        backend = "flex" if slots.is_cuda else "dense"
    if backend == "flex":

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
    """The predicate cut into that of each segment; None where it allows more than they hold.

    One segment's queries at a time: over all T x T at once, the predicate takes 7 bytes a pair of
    slots (450 MiB where T is 8,192) and longer.
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


def default_backend(device: torch.device, head_dim: int, compiled: bool = False) -> str:
    """What attention uses unless told otherwise: on CUDA one with which runs repeat to the bit.

    FlexAttention's kernels hold no heads narrower than 16, and it has no backward pass on the CPU,
    where segments are not compiled.
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
        # A compiled block takes it in; elsewhere it must be compiled alone, or stores all scores.
        if q.is_cuda and not torch.compiler.is_compiling():
            flex = _compiled_flex_attention()
        out = flex(q, k, v, block_mask=mask, enable_gqa=True)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)


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
