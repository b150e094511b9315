"""Linear layer + log-softmax in Triton: log-probs of targets, without storing the logits.

Forward: each program takes a block of rows and a share of the vocabulary, tile after tile, and
keeps per row the largest logit and the sum of exponentials relative to it (online softmax, arXiv
1805.02867), on float32 accumulators that are never written out. A second kernel merges the shares
in a fixed order, so the result does not depend on which program ends first. 2 S D V FLOPs.

Backward: recomputes the logits of a chunk of rows with the library's matrix product in float32,
turns them into their gradient in place, row by row, in Triton, and multiplies by the weight and by
the hidden states; the weight's gradient accumulates in float32. 6 S D V FLOPs, all of them in the
library's matrix products: tiles fused throughout in Triton would have to run within a tenth of
those to save the traffic of the chunk, 9 % of the time on an H200 (by calculation).

Shape suffixes: S rows, D hidden size, V vocabulary, C rows of one chunk, P splits of the
vocabulary. Read upward: public functions and autograd last.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from notus.kernels.reference import multiply_into

# Each chunk reads and writes the weight's complete float32 gradient (V x D) and holds C x V
# logits. This many rows keep that traffic near a tenth of the products' time on an H200 (by
# calculation), and the buffer at half the gradient's size at D = 4096.
CHUNK_ROWS = 2048
MAX_SPLITS = 16  # shares of the vocabulary per block of rows, unless rows are few
MIN_PROGRAMS = 1024  # several waves on the largest GPUs


# exp(x) is computed as 2^(x log2 e): tl.exp would also look after results below 1e-38, with two
# more instructions each, and next to a sum of at least 1 these do not count.
LOG2_E = tl.constexpr(1.4426950408889634)


class Tiles(NamedTuple):
    """A tile of one program of the forward kernel, and the program's launch settings."""

    rows: int
    vocabulary: int
    hidden: int
    warps: int
    stages: int


LARGE = Tiles(rows=128, vocabulary=256, hidden=64, warps=8, stages=3)  # H100, H200, B200
SMALL = Tiles(rows=128, vocabulary=128, hidden=32, warps=8, stages=4)  # A100 and desktop GPUs
FLOAT32 = Tiles(rows=64, vocabulary=64, hidden=32, warps=4, stages=2)  # no matrix units: exact
DATACENTER = (9, 10)  # compute capabilities with 227 KiB of shared memory and wide matrix units


@triton.jit(do_not_specialize=["S", "V", "splits", "tiles_per_split"])
def _partial_statistics_kernel(
    hidden,
    weight,
    targets,
    partial,  # float32 [3, P, S]: largest logit, sum of exponentials, target logit or squares
    S,
    V,
    D,
    hidden_stride,
    weight_stride,
    splits,
    tiles_per_split,
    SQUARES: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs that run together share GROUP blocks of rows and a few splits, which stay in L2.
    pid = tl.program_id(0)
    row_blocks = tl.cdiv(S, BLOCK_S)
    first = pid // (GROUP * splits) * GROUP
    group = tl.minimum(row_blocks - first, GROUP)
    within = pid % (GROUP * splits)
    row_block = first + within % group
    row = row_block * BLOCK_S + tl.arange(0, BLOCK_S)
    split = within // group

    # Rows and tokens past the end repeat the last one: loads without a mask are faster. Offsets
    # within a tile are 32 bits wide, which leaves registers to the accumulators.
    d = tl.arange(0, BLOCK_D)
    first_row = row_block * BLOCK_S
    within_rows = tl.minimum(tl.arange(0, BLOCK_S), S - 1 - first_row)
    hidden_offsets = within_rows[:, None] * hidden_stride + d[None, :]
    hidden_tile = hidden + first_row.to(tl.int64) * hidden_stride
    if not SQUARES:
        target = tl.load(targets + tl.minimum(row, S - 1)).to(tl.int32)

    largest = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    third = tl.zeros((BLOCK_S,), tl.float32)
    last_tile = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(V, BLOCK_V))
    for tile in range(split * tiles_per_split, last_tile):
        first_token = tile * BLOCK_V
        within_tokens = tl.arange(0, BLOCK_V)
        token = first_token + within_tokens
        if not EVEN_V:
            within_tokens = tl.minimum(within_tokens, V - 1 - first_token)
        weight_offsets = within_tokens[None, :] * weight_stride + d[:, None]
        weight_tile = weight + tl.cast(first_token, tl.int64) * weight_stride
        logits = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
        for start in range(0, D, BLOCK_D):
            if EVEN_D:
                x = tl.load(hidden_tile + start + hidden_offsets)
                w = tl.load(weight_tile + start + weight_offsets)
            else:
                x = tl.load(
                    hidden_tile + start + hidden_offsets, mask=d[None, :] < D - start, other=0.0
                )
                w = tl.load(
                    weight_tile + start + weight_offsets, mask=d[:, None] < D - start, other=0.0
                )
            if WIDEN:  # the interpreter's tl.dot on bfloat16 is silently wrong
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            logits = tl.dot(x, w, logits, input_precision="ieee")

        if not EVEN_V:
            logits = tl.where(token[None, :] < V, logits, -float("inf"))
        if not SQUARES:
            is_target = token[None, :] == target[:, None]
            third += tl.sum(tl.where(is_target, logits, 0.0), 1)
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        odds = tl.exp2((logits - new_largest[:, None]) * LOG2_E)
        rescale = tl.exp2((largest - new_largest) * LOG2_E)
        total = total * rescale + tl.sum(odds, 1)
        if SQUARES:
            third = third * rescale * rescale + tl.sum(odds * odds, 1)
        largest = new_largest

    place = split * S + row
    plane = splits * S
    tl.store(partial + place, largest, mask=row < S)
    tl.store(partial + plane + place, total, mask=row < S)
    tl.store(partial + 2 * plane + place, third, mask=row < S)


@triton.jit(do_not_specialize=["S", "V", "splits"])
def _merge_kernel(
    partial,
    targets,
    statistics,  # float32 [3, S]: largest logit, log of the sum relative to it, result
    S,
    V,
    splits,
    SQUARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < S
    plane = splits * S
    largest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for split in range(0, splits):
        other = tl.load(partial + split * S + row, mask=inside, other=0.0)
        largest = tl.maximum(largest, other)
    total = tl.zeros((BLOCK,), tl.float32)
    third = tl.zeros((BLOCK,), tl.float32)
    for split in range(0, splits):
        place = partial + split * S + row
        rescale = tl.exp(tl.load(place, mask=inside, other=0.0) - largest)
        total += rescale * tl.load(place + plane, mask=inside, other=1.0)
        value = tl.load(place + 2 * plane, mask=inside, other=1.0)
        third += rescale * rescale * value if SQUARES else value
    log_total = tl.log(total)
    if SQUARES:
        result = tl.log(third) - 2 * log_total
    else:
        # Relative to the largest logit first: lse itself would be rounded to its size.
        target = tl.load(targets + row, mask=inside, other=0)
        result = (third - largest) - log_total
        result = tl.where((target >= 0) & (target < V), result, float("nan"))
    tl.store(statistics + row, largest, mask=inside)
    tl.store(statistics + S + row, log_total, mask=inside)
    tl.store(statistics + 2 * S + row, result, mask=inside)


@triton.jit
def _nearest_bfloat16(x):
    """float32 rounded to the nearest bfloat16, ties to even, still as float32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["C", "V"])
def _logit_gradient_kernel(
    logits,  # float32 [C, V]
    gradient,  # the same memory; float32, or bfloat16 in the first half of each row
    targets,
    largest,
    log_total,
    upstream,
    C,
    V,
    logits_stride,
    gradient_stride,
    ROUND: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """In place: upstream * (onehot(target) - softmax(logits))."""
    row = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = row < C
    target = tl.load(targets + row, mask=inside, other=0)[:, None]
    row_max = tl.load(largest + row, mask=inside, other=0.0)[:, None]
    row_log = tl.load(log_total + row, mask=inside, other=0.0)[:, None]
    scale = tl.load(upstream + row, mask=inside, other=0.0)[:, None]
    source = logits + row.to(tl.int64)[:, None] * logits_stride
    result = gradient + row.to(tl.int64)[:, None] * gradient_stride
    for start in range(0, V, BLOCK_V):
        token = start + tl.arange(0, BLOCK_V)[None, :]
        mask = inside[:, None] & (token < V)
        z = tl.load(source + token, mask=mask, other=0.0)
        value = scale * (
            tl.where(token == target, 1.0, 0.0) - tl.exp2(((z - row_max) - row_log) * LOG2_E)
        )
        if ROUND:  # the interpreter truncates where the hardware rounds
            value = _nearest_bfloat16(value)
        # Narrower results fall on logits of this block that another thread may still have to read;
        # later blocks write only where earlier ones have read.
        tl.debug_barrier()
        tl.store(result + token, value.to(gradient.dtype.element_ty), mask=mask)


# Whether TRITON_INTERPRET=1 was set when this module was imported: NumPy instead of a GPU.
INTERPRETED = not isinstance(_merge_kernel, triton.JITFunction)


@torch.library.custom_op("notus::log_softmax_statistics", mutates_args=())
def _statistics(hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor | None) -> Tensor:
    """The fused forward pass: float32 [3, S].

    Rows: the largest logit, the log of the sum of exponentials relative to it, and the log-prob of
    the target (NaN for a target outside [0, V)) or, without targets, log sum p^2. An operator of
    its own so that torch's FLOP counter sees it.
    """
    (S, D), V = hidden_SD.shape, len(weight_VD)
    tiles = _tiles(hidden_SD)
    row_blocks, vocabulary_tiles = triton.cdiv(S, tiles.rows), triton.cdiv(V, tiles.vocabulary)
    tiles_per_split = _tiles_per_split(row_blocks, vocabulary_tiles)
    splits = triton.cdiv(vocabulary_tiles, tiles_per_split)
    partial_3PS = hidden_SD.new_empty(3, splits, S, dtype=torch.float32)
    statistics_3S = hidden_SD.new_empty(3, S, dtype=torch.float32)
    with torch.cuda.device_of(hidden_SD):
        _partial_statistics_kernel[(row_blocks * splits,)](
            hidden=hidden_SD,
            weight=weight_VD,
            targets=targets_S,
            partial=partial_3PS,
            S=S,
            V=V,
            D=D,
            hidden_stride=hidden_SD.stride(0),
            weight_stride=weight_VD.stride(0),
            splits=splits,
            tiles_per_split=tiles_per_split,
            SQUARES=targets_S is None,
            WIDEN=INTERPRETED,
            EVEN_D=D % tiles.hidden == 0,
            EVEN_V=V % tiles.vocabulary == 0,
            BLOCK_S=tiles.rows,
            BLOCK_V=tiles.vocabulary,
            BLOCK_D=tiles.hidden,
            GROUP=16,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        _merge_kernel[(triton.cdiv(S, 128),)](
            partial=partial_3PS,
            targets=targets_S,
            statistics=statistics_3S,
            S=S,
            V=V,
            splits=splits,
            SQUARES=targets_S is None,
            BLOCK=128,
            num_warps=4,
        )
    return statistics_3S


@register_flop_formula(torch.ops.notus.log_softmax_statistics)
def _statistics_flops(hidden_shape, weight_shape, targets_shape=None, *, out_shape=None) -> int:
    """One product of the hidden rows with the complete weight, counted as torch does."""
    return 2 * hidden_shape[0] * hidden_shape[1] * weight_shape[0]


def _tiles(hidden_SD: Tensor) -> Tiles:
    if hidden_SD.dtype == torch.float32:
        return FLOAT32
    if hidden_SD.is_cuda:
        major, _ = torch.cuda.get_device_capability(hidden_SD.device)
        return LARGE if major in DATACENTER else SMALL
    return LARGE


def _tiles_per_split(row_blocks: int, vocabulary_tiles: int) -> int:
    """Vocabulary tiles of one program.

    Few splits keep the partial statistics small (12 bytes a row and split) and many keep all
    multiprocessors busy when rows are few.
    """
    splits = max(MAX_SPLITS, triton.cdiv(MIN_PROGRAMS, row_blocks))
    return triton.cdiv(vocabulary_tiles, splits)


def _write_logit_gradient(
    logits_CV: Tensor, targets_C: Tensor, statistics_3C: Tensor, grad_C: Tensor, dtype: torch.dtype
) -> Tensor:
    """Turn logits into their gradient in their own memory: [C, V] of `dtype`."""
    rows, V = logits_CV.shape
    gradient_CV = torch.as_strided(logits_CV, (rows, logits_CV.stride(0)), logits_CV.stride())
    gradient_CV = gradient_CV.view(dtype)[:, :V]
    block_rows = 64 if INTERPRETED else 1  # a program costs milliseconds there
    with torch.cuda.device_of(logits_CV):
        _logit_gradient_kernel[(triton.cdiv(rows, block_rows),)](
            logits=logits_CV,
            gradient=gradient_CV,
            targets=targets_C,
            largest=statistics_3C[0],
            log_total=statistics_3C[1],
            upstream=grad_C,
            C=rows,
            V=V,
            logits_stride=logits_CV.stride(0),
            gradient_stride=gradient_CV.stride(0),
            ROUND=INTERPRETED and dtype == torch.bfloat16,
            BLOCK_C=block_rows,
            BLOCK_V=4096,
            num_warps=8,
            num_stages=1,
        )
    return gradient_CV


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
        statistics_3S = _statistics(hidden_SD, weight_VD, targets_S)
        ctx.save_for_backward(hidden_SD, weight_VD, targets_S, statistics_3S)
        return statistics_3S[2].clone()

    @staticmethod
    def backward(ctx, grad_S: Tensor):
        hidden_SD, weight_VD, targets_S, statistics_3S = ctx.saved_tensors
        need_hidden, need_weight, _ = ctx.needs_input_grad
        (S, D), V = hidden_SD.shape, len(weight_VD)
        grad_hidden_SD = torch.empty_like(hidden_SD) if need_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD, dtype=torch.float32) if need_weight else None
        grad_S = grad_S.contiguous()
        size = _rows_per_chunk(S)
        # Rows are full cache lines, even after tokens were added to the vocabulary.
        logits = hidden_SD.new_empty(min(size, S), triton.cdiv(V, 64) * 64, dtype=torch.float32)
        product = hidden_SD.new_empty(min(size, S), D, dtype=torch.float32) if need_hidden else None
        for start in range(0, S, size):
            rows = slice(start, start + size)
            hidden_CD = hidden_SD[rows]
            logits_CV = logits[: len(hidden_CD), :V]
            multiply_into(logits_CV, hidden_CD, weight_VD.T)
            gradient_CV = _write_logit_gradient(
                logits_CV, targets_S[rows], statistics_3S[:, rows], grad_S[rows], hidden_SD.dtype
            )
            if need_hidden:
                product_CD = product[: len(hidden_CD)]
                multiply_into(product_CD, gradient_CV, weight_VD)
                grad_hidden_SD[rows] = product_CD
            if need_weight:
                # The first chunk's product is written: nothing to clear or to read before it.
                multiply_into(grad_weight_VD, gradient_CV.T, hidden_CD, beta=float(start > 0))
        del logits, product
        if need_weight:
            grad_weight_VD = grad_weight_VD.to(weight_VD.dtype)
        return grad_hidden_SD, grad_weight_VD, None


def _rows_per_chunk(rows: int) -> int:
    """Equal chunks of at most CHUNK_ROWS rows, in full tiles."""
    chunks = triton.cdiv(rows, CHUNK_ROWS)
    return triton.cdiv(triton.cdiv(rows, chunks), LARGE.rows) * LARGE.rows


def linear_log_probs(hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    """`reference.linear_log_probs` in Triton: float32 [S], with gradients.

    hidden_SD and weight_VD are both bfloat16 or both float32, targets_S int64; a target outside
    [0, V) gives NaN, because asking would make the host wait for the GPU. Memory beyond the
    gradients: in the forward pass 12 bytes for each row and split, in the backward pass
    CHUNK_ROWS x (V + D) float32 and the weight's gradient in float32.
    """
    if len(hidden_SD) == 0:
        return (hidden_SD.float() @ weight_VD.float().T).sum(-1)  # empty, with empty gradients
    hidden_SD, weight_VD = _dense_rows(hidden_SD), _dense_rows(weight_VD)
    return _LinearLogProbs.apply(hidden_SD, weight_VD, targets_S.contiguous())


@torch.no_grad()
def linear_log_sum_squares(hidden_SD: Tensor, weight_VD: Tensor) -> Tensor:
    """`reference.linear_log_sum_squares` in Triton: float32 [S], no gradient."""
    if len(hidden_SD) == 0:
        return hidden_SD.new_empty(0, dtype=torch.float32)
    return _statistics(_dense_rows(hidden_SD), _dense_rows(weight_VD), None)[2]


def _dense_rows(x: Tensor) -> Tensor:
    """Rows may be strided; the values within a row must be contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()
