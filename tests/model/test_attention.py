"""The predicate by hand, and the two backends of it against each other."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from conftest import random_pairs
from notus.data.packing import Layout, pack
from notus.model.attention import attend, build_mask


def layout(document, branch, position, hidden=None) -> Layout:
    size = len(document)
    return Layout(
        *(torch.tensor(x, dtype=torch.int32) for x in (document, branch, position)),
        torch.tensor(hidden or [False] * size),
    )


def test_mask_of_a_shared_pair_by_hand():
    # [p0 p1 | c2 c3 | r2] and one padding slot
    mask = build_mask(layout([1] * 5 + [-1], [0, 0, 1, 1, 2, 0], [0, 1, 2, 3, 2, 0]), None, "dense")
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_window_counts_positions_and_not_slots():
    mask = build_mask(layout([1] * 5, [0, 0, 1, 1, 2], [0, 1, 2, 3, 2]), 2, "dense")
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],  # the rejected response sees the prompt's end across the chosen one
    ]


def test_hidden_slots_have_empty_rows_and_columns():
    mask = build_mask(layout([1] * 3, [0, 0, 0], [0, 1, 2], [False, True, False]), None, "dense")
    assert mask.int().tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_computes_what_the_dense_mask_does(sharing, window):
    batch = pack(random_pairs(6, hide=0.1), range(6), 256, sharing)
    torch.manual_seed(0)
    q, k, v = torch.randn(256, 4, 16), torch.randn(256, 2, 16), torch.randn(256, 2, 16)
    block_mask = build_mask(batch.layout, window, "flex")
    assert isinstance(block_mask, BlockMask)
    with torch.no_grad():
        flex = attend(q, k, v, block_mask)
        dense = attend(q, k, v, build_mask(batch.layout, window, "dense"))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)
