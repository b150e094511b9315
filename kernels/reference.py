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
    chunks and the backward pass recomputes their logits, so memory beyond the gradients is
    chunk x V (and, for bfloat16, a wider or narrower copy of a product's operands) and does not
    grow with S.
    """
    return _LinearLogProbs.apply(hidden_SD, weight_VD, targets_S)


@torch.no_grad()
def linear_log_sum_squares(hidden_SD: Tensor, weight_VD: Tensor) -> Tensor:
    """log of the sum over the vocabulary of squared probabilities: float32 [S], no gradient.

    WPO (arXiv 2406.11827, equation 2) measures a token's log-prob against it.
    """
    out_S, buffer = _empty_rows(hidden_SD), _buffer(hidden_SD, weight_VD)
    for rows in _chunks(hidden_SD, weight_VD):
        logits_CV = _logits(hidden_SD[rows], weight_VD, buffer)
        odds_CV = logits_CV.sub_(logits_CV.amax(-1, keepdim=True)).exp_()
        sum_C = odds_CV.sum(-1)
        out_S[rows] = odds_CV.square_().sum(-1).log() - 2 * sum_C.log()
    return out_S


def multiply_into(out: Tensor, left: Tensor, right: Tensor, beta: float = 0.0) -> None:
    """out = beta * out + left @ right, accumulated and kept in out's dtype, float32 or float64.

    `right` has the dtype of the parameters in the computation. On CUDA the left factor is rounded
    to it, so that bfloat16 products run on the matrix units; elsewhere both are widened.
    """
    if right.is_cuda and right.dtype == torch.bfloat16:
        left = left.to(right.dtype)
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)


def _chunks(hidden_SD: Tensor, weight_VD: Tensor) -> list[slice]:
    size = max(1, CHUNK_LOGITS // len(weight_VD))
    return [slice(start, start + size) for start in range(0, len(hidden_SD), size)]


def _empty_rows(hidden_SD: Tensor) -> Tensor:
    """Float32, or float64 for float64 inputs (gradient checks)."""
    dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
    return hidden_SD.new_empty(len(hidden_SD), dtype=dtype)


def _buffer(hidden_SD: Tensor, weight_VD: Tensor) -> Tensor:
    """Room for the logits of the largest chunk, used again for each."""
    rows = min(len(hidden_SD), max(1, CHUNK_LOGITS // len(weight_VD)))
    dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
    return hidden_SD.new_empty(rows, len(weight_VD), dtype=dtype)


def _logits(hidden_CD: Tensor, weight_VD: Tensor, buffer: Tensor) -> Tensor:
    logits_CV = buffer[: len(hidden_CD)]
    multiply_into(logits_CV, hidden_CD, weight_VD.T)
    return logits_CV


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
        # The largest logit and the log of the sum relative to it are kept apart: added up they
        # would be rounded to the precision of the larger, 1e-3 at logits of 1e4.
        log_probs_S, max_S, log_sum_S = (_empty_rows(hidden_SD) for _ in range(3))
        buffer = _buffer(hidden_SD, weight_VD)
        for rows in _chunks(hidden_SD, weight_VD):
            logits_CV = _logits(hidden_SD[rows], weight_VD, buffer)
            max_S[rows] = logits_CV.amax(-1)
            logits_CV.sub_(max_S[rows, None])
            picked_C = logits_CV.gather(1, targets_S[rows, None]).squeeze(1)
            log_sum_S[rows] = logits_CV.exp_().sum(-1).log()
            log_probs_S[rows] = picked_C - log_sum_S[rows]
        ctx.save_for_backward(hidden_SD, weight_VD, targets_S, max_S, log_sum_S)
        return log_probs_S

    @staticmethod
    def backward(ctx, grad_S: Tensor):
        hidden_SD, weight_VD, targets_S, max_S, log_sum_S = ctx.saved_tensors
        need_hidden, need_weight, _ = ctx.needs_input_grad
        grad_hidden_SD = torch.empty_like(hidden_SD) if need_hidden else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=max_S.dtype) if need_weight else None
        buffer = _buffer(hidden_SD, weight_VD)
        for rows in _chunks(hidden_SD, weight_VD):
            # d log p(target) / d logits = onehot(target) - softmax(logits), made in place
            grad_CV = _logits(hidden_SD[rows], weight_VD, buffer)
            grad_CV.sub_(max_S[rows, None]).sub_(log_sum_S[rows, None]).exp_()
            grad_CV.mul_(-grad_S[rows, None])
            grad_CV.scatter_add_(1, targets_S[rows, None], grad_S[rows, None])
            if need_hidden:
                product_CD = hidden_SD.new_empty(
                    len(grad_CV), hidden_SD.shape[1], dtype=max_S.dtype
                )
                multiply_into(product_CD, grad_CV, weight_VD)
                grad_hidden_SD[rows] = product_CD
            if need_weight:
                multiply_into(grad_weight_VD, grad_CV.T, hidden_SD[rows], beta=1.0)
        if need_weight:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_SD, grad_weight_VD, None
