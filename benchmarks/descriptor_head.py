"""The Triton head with tensor descriptors and one pipeline over all products of a program.

The backward pass is the head's own. The forward pass differs from it in two ways: tiles are loaded
through descriptors, which an H100's copy engine (TMA) serves without addresses in registers; and
the loops over vocabulary and hidden size are flattened into one, so that the next tile's first
loads are under way while the logits of this one are reduced. Shape suffixes: S rows, D hidden size,
V vocabulary, P splits of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from notus.kernels import linear_log_probs as fused

LOG2_E = fused.LOG2_E


@triton.jit(do_not_specialize=["S", "V", "splits", "tiles_per_split"])
def _described_statistics_kernel(
    hidden,  # descriptor of [S, D]: tiles [BLOCK_S, BLOCK_D], zeros outside
    weight,  # descriptor of [V, D]: tiles [BLOCK_V, BLOCK_D], zeros outside
    targets,
    partial,  # float32 [3, P, S]: largest logit, sum of exponentials, target logit
    S,
    V,
    D,
    splits,
    tiles_per_split,
    WIDEN: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs in the order of the other kernel: GROUP blocks of rows share splits in L2.
    pid = tl.program_id(0)
    first_block = pid // (GROUP * splits) * GROUP
    group = tl.minimum(tl.cdiv(S, BLOCK_S) - first_block, GROUP)
    within = pid % (GROUP * splits)
    first_row = (first_block + within % group) * BLOCK_S
    split = within // group
    row = first_row + tl.arange(0, BLOCK_S)
    target = tl.load(targets + row, mask=row < S, other=0).to(tl.int32)
    octets = tl.arange(0, BLOCK_V // 8)[None, :, None]
    in_octet = tl.arange(0, 8)[None, None, :]

    largest = tl.full((BLOCK_S,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    picked = tl.zeros((BLOCK_S,), tl.float32)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(V, BLOCK_V))
    tl.assume(D > 0)  # or the flattened loop has a branch for tiles without a product
    for tile in tl.range(first_tile, last_tile, flatten=True):
        first_token = tile * BLOCK_V
        logits = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
        for start in range(0, D, BLOCK_D):
            x = hidden.load([first_row, start])
            w = weight.load([first_token, start])
            if WIDEN:  # the interpreter's tl.dot on bfloat16 is silently wrong
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            logits = tl.dot(x, w.T, logits, input_precision="ieee")

        # A thread's tokens are at few places of many octets. Compared with whole numbers of tokens,
        # all of its 64 would be kept in registers throughout the loop, and spill.
        by_octet = tl.reshape(logits, (BLOCK_S, BLOCK_V // 8, 8))
        if not EVEN_V:
            left = V - first_token
            inside = (octets < left // 8) | (octets == left // 8) & (in_octet < left % 8)
            by_octet = tl.where(inside, by_octet, -float("inf"))
            logits = tl.reshape(by_octet, (BLOCK_S, BLOCK_V))
        place = (target - first_token)[:, None, None]
        is_target = (octets == place >> 3) & (in_octet == place & 7)
        picked += tl.sum(tl.reshape(tl.where(is_target, by_octet, 0.0), (BLOCK_S, BLOCK_V)), 1)
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        odds = tl.exp2((logits - new_largest[:, None]) * LOG2_E)
        total = total * tl.exp2((largest - new_largest) * LOG2_E) + tl.sum(odds, 1)
        largest = new_largest

    place = split * S + row
    plane = splits * S
    tl.store(partial + place, largest, mask=row < S)
    tl.store(partial + plane + place, total, mask=row < S)
    tl.store(partial + 2 * plane + place, picked, mask=row < S)


def _statistics(hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    """As the fused function of this name, with targets: float32 [3, S]."""
    (S, D), V = hidden_SD.shape, len(weight_VD)
    tiles = fused._tiles(hidden_SD)
    row_blocks, vocabulary_tiles = triton.cdiv(S, tiles.rows), triton.cdiv(V, tiles.vocabulary)
    tiles_per_split = fused._tiles_per_split(row_blocks, vocabulary_tiles)
    splits = triton.cdiv(vocabulary_tiles, tiles_per_split)
    partial_3PS = hidden_SD.new_empty(3, splits, S, dtype=torch.float32)
    statistics_3S = hidden_SD.new_empty(3, S, dtype=torch.float32)
    with torch.cuda.device_of(hidden_SD):
        _described_statistics_kernel[(row_blocks * splits,)](
            hidden=TensorDescriptor.from_tensor(hidden_SD, [tiles.rows, tiles.hidden]),
            weight=TensorDescriptor.from_tensor(weight_VD, [tiles.vocabulary, tiles.hidden]),
            targets=targets_S,
            partial=partial_3PS,
            S=S,
            V=V,
            D=D,
            splits=splits,
            tiles_per_split=tiles_per_split,
            WIDEN=fused.INTERPRETED,
            EVEN_V=V % tiles.vocabulary == 0,
            BLOCK_S=tiles.rows,
            BLOCK_V=tiles.vocabulary,
            BLOCK_D=tiles.hidden,
            GROUP=16,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        fused._merge_kernel[(triton.cdiv(S, 128),)](
            partial=partial_3PS,
            targets=targets_S,
            statistics=statistics_3S,
            S=S,
            V=V,
            splits=splits,
            SQUARES=False,
            BLOCK=128,
            num_warps=4,
        )
    return statistics_3S


class _Described(fused._LinearLogProbs):
    @staticmethod
    def forward(ctx, hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
        statistics_3S = _statistics(hidden_SD, weight_VD, targets_S)
        ctx.save_for_backward(hidden_SD, weight_VD, targets_S, statistics_3S)
        return statistics_3S[2].clone()


def linear_log_probs(hidden_SD: Tensor, weight_VD: Tensor, targets_S: Tensor) -> Tensor:
    """As the fused function of this name: float32 [S], with gradients, for at least one row.

    Rows are contiguous and begin at multiples of 16 bytes, which the descriptors assert.
    """
    return _Described.apply(hidden_SD, weight_VD, targets_S)
