"""Who may attend to whom: one predicate, and the backends that apply it.

A microbatch is one row of T token slots that holds many documents side by side. Every slot knows
its document, its branch within the document (the prompt, or one of the responses that continue
it), its position, and whether it takes part in attention at all. From these four numbers
`may_attend` decides for every (query, key) pair; nothing else in the project builds a mask.

    backend  device  what it does
    dense    any     a [T, T] boolean mask and scaled_dot_product_attention; has a CPU backward
    flex     CUDA    FlexAttention over the blocks in which the predicate holds somewhere

Shapes: T slots, N query heads, K key/value heads, H head dimension.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from notus.data.packing import PADDING, PROMPT, Layout

AttentionMask = Tensor | BlockMask

# Uncompiled, FlexAttention stores the whole score matrix; inside a compiled block this is inlined.
_compiled_flex_attention = torch.compile(flex_attention)


def may_attend(layout: Layout, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Whether slot `query` may look at slot `key`: bool, in the broadcast shape of the two indices.

    Both are integer tensors of slot indices. True when both lie in the same document, the key is
    not later, the key is in the prompt or in the query's own branch, fewer than `window` positions
    lie between them (None: no limit), and neither is hidden. Padding may attend to itself alone.
    """
    distance = layout.position[query] - layout.position[key]
    allowed = (layout.document[query] == layout.document[key]) & (distance >= 0)
    key_branch = layout.branch[key]
    allowed &= (key_branch == PROMPT) | (key_branch == layout.branch[query])
    if window is not None:
        allowed &= distance < window
    allowed &= ~(layout.hidden[query] | layout.hidden[key])
    return torch.where(layout.document[query] == PADDING, query == key, allowed)


def build_mask(layout: Layout, window: int | None, backend: str) -> AttentionMask:
    """The predicate over all T x T slots in the form that `backend` wants; once per microbatch.

    backend: "dense" gives a bool tensor [T, T], "flex" a BlockMask.
    """
    slots = torch.arange(len(layout.document), device=layout.document.device)
    if backend == "dense":
        return may_attend(layout, slots[:, None], slots[None, :], window)
    assert backend == "flex", backend

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(layout, query, key, window)

    return create_block_mask(mask_mod, None, None, len(slots), len(slots), device=slots.device)


def default_backend(device: torch.device) -> str:
    """FlexAttention has no backward on the CPU, so there the mask is dense."""
    return "flex" if device.type == "cuda" else "dense"


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, mask: AttentionMask) -> Tensor:
    """Grouped-query attention of one packed row, scaled by 1 / sqrt(H).

    Returns [T, N, H] in the dtype of the queries; zero where the mask allows a query no key.
    """
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TKH, v_TKH))  # [1, heads, T, H]
    if isinstance(mask, BlockMask):
        flex = _compiled_flex_attention if q.is_cuda else flex_attention
        out = flex(q, k, v, block_mask=mask, enable_gqa=True)
    else:
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.squeeze(0).transpose(0, 1)
