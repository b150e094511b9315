"""The plain definition of every kernel of this folder: the CPU path and the test oracle.

Shape suffixes: S rows, D hidden size, V vocabulary, C rows of one chunk.
"""

import torch
from torch import Tensor

CHUNK_LOGITS = 1 << 25  # logits held at once: 128 MiB of float32


def linear_log_probs(hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T) at the targets: float32 [S], natural logarithm.

    hidden_SD and weight_VD share one floating dtype, targets_S is int64 in [0, V). Products
    accumulate in float32 and the logits are never rounded to a narrower type. Rows are taken in
    chunks and the backward pass recomputes their logits, so memory beyond the gradients is a few
    times chunk x V (and on the CPU a float32 copy of a bfloat16 weight) and does not grow with S.
    """
    return _LinearLogProbs.apply(hidden_SD, weight_VD, targets_S)


@torch.no_grad()
def linear_log_sum_squares(hidden_SD: Tensor, weight_VD: Tensor) -> Tensor:
    """log of the sum over the vocabulary of squared probabilities: float32 [S], no gradient.

    WPO (arXiv 2406.11827, equation 2) measures a token's log-prob against it.
    """
    out_S = _empty_rows(hidden_SD)
    for rows in _chunks(hidden_SD, weight_VD):
        logits_CV = _logits(hidden_SD[rows], weight_VD)
        out_S[rows] = (2 * logits_CV).logsumexp(-1) - 2 * logits_CV.logsumexp(-1)
    return out_S


def _chunks(hidden_SD: Tensor, weight_VD: Tensor) -> list[slice]:
    size = max(1, CHUNK_LOGITS // len(weight_VD))
    return [slice(start, start + size) for start in range(0, len(hidden_SD), size)]


def _empty_rows(hidden_SD: Tensor) -> Tensor:
    """Float32, or float64 for float64 inputs (gradient checks)."""
    dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
    return hidden_SD.new_empty(len(hidden_SD), dtype=dtype)


def _logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    return _product(hidden_CD, weight_VD.T)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product accumulated and returned in float32 (float64 for float64 operands).

    `right` has the dtype of the parameters in the computation. On CUDA the left factor is rounded
    to it, so that bfloat16 products run on the matrix units; elsewhere both are widened.
    """
    if right.is_cuda and right.dtype == torch.bfloat16:
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    dtype = torch.promote_types(right.dtype, torch.float32)
    return left.to(dtype) @ right.to(dtype)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
        lse_S = _empty_rows(hidden_SD)
        picked_S = torch.empty_like(lse_S)
        for rows in _chunks(hidden_SD, weight_VD):
            logits_CV = _logits(hidden_SD[rows], weight_VD)
            lse_S[rows] = logits_CV.logsumexp(-1)
            picked_S[rows] = logits_CV.gather(1, targets_S[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden_SD, weight_VD, targets_S, lse_S)
        return picked_S - lse_S

    @staticmethod
    def backward(ctx, grad_S: Tensor):
        hidden_SD, weight_VD, targets_S, lse_S = ctx.saved_tensors
        need_hidden, need_weight, _ = ctx.needs_input_grad
        grad_hidden_SD = torch.empty_like(hidden_SD) if need_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=lse_S.dtype) if need_weight else None
        for rows in _chunks(hidden_SD, weight_VD):
            # d log p(target) / d logits = onehot(target) - softmax(logits), made in place
            grad_CV = _logits(hidden_SD[rows], weight_VD)
            grad_CV.sub_(lse_S[rows, None]).exp_().mul_(-grad_S[rows, None])
            grad_CV.scatter_add_(1, targets_S[rows, None], grad_S[rows, None])
            if need_hidden:
                grad_hidden_SD[rows] = _product(grad_CV, weight_VD)
            if need_weight:
                grad_weight_VD += _product(grad_CV.T, hidden_SD[rows])
        if need_weight:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_SD, grad_weight_VD, None
