"""The Triton head's plain alternative: a chunk's logits by the library, then one pass over them.

The backward pass is the head's own, which does the same. The forward pass writes and reads a
chunk's float32 logits where the fused one writes nothing; in exchange its product is the library's.
Shape suffixes: S rows, D hidden size, V vocabulary, C rows of one chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from notus.kernels import linear_log_probs as fused
from notus.kernels.reference import multiply_into

LOG2_E = fused.LOG2_E


@triton.jit(do_not_specialize=["C", "S", "V"])
def _row_statistics_kernel(
    logits,  # float32 [C, V]
    targets,
    statistics,  # float32 [3, S] from this chunk's first row on, as the fused kernels give them
    C,
    S,
    V,
    logits_stride,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = row < C
    source = logits + tl.minimum(row, C - 1).to(tl.int64)[:, None] * logits_stride
    target = tl.load(targets + row, mask=inside, other=0)
    largest = tl.full((BLOCK_C,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    third = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, V, BLOCK_V):
        token = start + tl.arange(0, BLOCK_V)[None, :]
        z = tl.load(source + token, mask=token < V, other=-float("inf"))
        third += tl.sum(tl.where(token == target[:, None], z, 0.0), 1)
        new_largest = tl.maximum(largest, tl.max(z, 1))
        odds = tl.exp2((z - new_largest[:, None]) * LOG2_E)
        total = total * tl.exp2((largest - new_largest) * LOG2_E) + tl.sum(odds, 1)
        largest = new_largest
    log_total = tl.log(total)
    result = (third - largest) - log_total
    result = tl.where((target >= 0) & (target < V), result, float("nan"))
    tl.store(statistics + row, largest, mask=inside)
    tl.store(statistics + S + row, log_total, mask=inside)
    tl.store(statistics + 2 * S + row, result, mask=inside)


class _Chunked(fused._LinearLogProbs):
    @staticmethod
    def forward(ctx, hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
        S, V = len(hidden_SD), len(weight_VD)
        block_rows = 64 if fused.INTERPRETED else 1  # a program costs milliseconds there
        size = fused._rows_per_chunk(S)
        statistics_3S = hidden_SD.new_empty(3, S, dtype=torch.float32)
        logits = hidden_SD.new_empty(min(size, S), triton.cdiv(V, 64) * 64, dtype=torch.float32)
        for start in range(0, S, size):
            rows = slice(start, start + size)
            logits_CV = logits[: len(hidden_SD[rows]), :V]
            multiply_into(logits_CV, hidden_SD[rows], weight_VD.T)
            with torch.cuda.device_of(logits_CV):
                _row_statistics_kernel[(triton.cdiv(len(logits_CV), block_rows),)](
                    logits=logits_CV,
                    targets=targets_S[rows],
                    statistics=statistics_3S[:, rows],
                    C=len(logits_CV),
                    S=S,
                    V=V,
                    logits_stride=logits_CV.stride(0),
                    BLOCK_C=block_rows,
                    BLOCK_V=4096,
                    num_warps=8,
                )
        ctx.save_for_backward(hidden_SD, weight_VD, targets_S, statistics_3S)
        return statistics_3S[2].clone()


def linear_log_probs(hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    """As the fused function of this name: float32 [S], with gradients, for at least one row."""
    return _Chunked.apply(hidden_SD, weight_VD, targets_S)
