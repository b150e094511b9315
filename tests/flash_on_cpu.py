"""Stands in for FlashAttention on the CPU: torch's operator of variable length, written out.

Importing it registers the operator and its derivative, so that what runs on CUDA can be run and
compiled here. Called as the kernel is: q [Q, N, H], k and v [K, M, H], edges int32 [G + 1].
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import varlen  # noqa: F401  defines the operator


def _segments(q, k, v, q_edges, k_edges, most_q, most_k, window) -> Iterator[tuple]:
    """Per segment where it lies among queries and keys, its keys and values, and softmax scores."""
    left, right = window
    assert right == 0
    groups = q.shape[1] // k.shape[1]
    edges = torch.stack((q_edges, k_edges), 1)
    for (q_start, k_start), (q_end, k_end) in pairwise(edges.tolist()):
        queries, keys = q_end - q_start, k_end - k_start
        assert 0 < queries <= most_q and queries <= keys <= most_k
        key_head, value_head = (x[k_start:k_end].repeat_interleave(groups, 1) for x in (k, v))
        scores = torch.einsum("qnh,knh->nqk", q[q_start:q_end], key_head) / q.shape[-1] ** 0.5
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = (distance >= 0) & (distance <= (left if left >= 0 else keys))
        softmax = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        yield slice(q_start, q_end), slice(k_start, k_end), key_head, value_head, softmax


def forward(
    q, k, v, q_edges, k_edges, most_q, most_k, is_causal=False, scale=None, window=None, *rest
) -> tuple[Tensor, Tensor, Tensor]:
    assert scale is None
    out = torch.full_like(q, torch.nan)  # what no segment writes, nobody may read
    for here, _, _, values, softmax in _segments(q, k, v, q_edges, k_edges, most_q, most_k, window):
        out[here] = torch.einsum("nqk,knh->qnh", softmax, values)
    return out, torch.zeros(q.shape[1], q.shape[0]), torch.empty(2, dtype=torch.uint64)


def backward(
    gradient, q, k, v, out, lse, q_edges, k_edges, most_q, most_k, is_causal, rng, scale, window
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    for here, there, keys, values, softmax in _segments(
        q, k, v, q_edges, k_edges, most_q, most_k, window
    ):
        g = gradient[here]
        d_softmax = torch.einsum("qnh,knh->nqk", g, values)
        d_scores = softmax * (d_softmax - (d_softmax * softmax).sum(-1, keepdim=True))
        d_scores = d_scores / q.shape[-1] ** 0.5
        dq[here] = torch.einsum("nqk,knh->qnh", d_scores, keys)
        heads = (k.shape[1], -1)
        d_keys = torch.einsum("nqk,qnh->knh", d_scores, q[here])
        dk[there] = d_keys.unflatten(1, heads).sum(2)
        dv[there] = torch.einsum("nqk,qnh->knh", softmax, g).unflatten(1, heads).sum(2)
    return dq, dk, dv


torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)
