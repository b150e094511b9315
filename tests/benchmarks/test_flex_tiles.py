"""The sweep over FlexAttention's tiles, as far as it goes without a GPU."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from benchmarks import flex_tiles
from notus.model import attention
from notus.model.attention import TILES


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a GPU")
def test_it_needs_a_gpu(capsys):
    assert flex_tiles.main([]) == 2
    assert "need a CUDA GPU" in capsys.readouterr().err


def test_the_tiles_of_notus_are_among_the_options_and_come_back():
    usual = attention._kernel_options
    batch = flex_tiles.filled_row(2048)
    assert (batch.layout.document >= 0).any()
    q = torch.empty(1, 1, 128, 128, dtype=torch.bfloat16)
    lines = [(n, mask, attention._kernel_options(q)) for n, mask in flex_tiles.variants(batch, 9)]
    found = {name: options for name, mask, options in lines if isinstance(mask, BlockMask)}
    assert found.pop("flex, may_attend itself") is None
    assert found["flex, notus"] == usual(q) == {"IS_DIVISIBLE": True} | TILES
    assert len(found) == len(flex_tiles.VARIANTS) and attention._kernel_options is usual
