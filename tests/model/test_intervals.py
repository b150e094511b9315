"""The intervals of packed rows against the predicate, and their block mask against PyTorch's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import random_pairs
from notus.data.packing import Layout, pack, slots_of
from notus.data.token_arrays import TokenizedPairs
from notus.model import attention
from notus.model.attention import build_mask, may_attend
from notus.model.intervals import agrees, agrees_on, block_mask, limits, within


def random_layout(count: int, seed: int, longest: int, hide: float, sharing: bool) -> Layout:
    """Pairs of parts of up to `longest` tokens, some without a rejected response; then padding."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, (count, 3)) * [1, 1, 0]
    lengths[:, 2] = rng.integers(0, longest + 1, count)
    hidden = rng.random(lengths.sum()) < hide
    pairs = TokenizedPairs(np.zeros(len(hidden), np.int32), hidden, lengths)
    needed = int(slots_of(lengths, sharing).sum())
    return pack(pairs, range(count), (needed // 128 + 1) * 128, sharing).layout


rows = st.builds(
    random_layout,
    count=st.integers(0, 6),
    seed=st.integers(0, 10_000),
    longest=st.sampled_from([3, 40, 300]),
    hide=st.sampled_from([0.0, 0.1, 0.9]),
    sharing=st.booleans(),
)
windows = st.sampled_from([None, 1, 5, 60, 200])


@settings(max_examples=60, deadline=None)
@given(rows, windows)
def test_intervals_are_the_predicate(layout, window):
    slots = torch.arange(len(layout.document))
    query, key = slots[:, None], slots[None, :]
    found = within(limits(layout, window), query, key)
    assert torch.equal(found, may_attend(layout, query, key, window))
    assert agrees_on(may_attend, layout, window)


@settings(max_examples=30, deadline=None)
@given(rows, windows)
def test_blocks_are_those_of_pytorch(layout, window):
    """Partial and full blocks, for queries and for keys, in the same order.

    A row of one block gets a second, which is empty: the compiler would specialise on a size of 1.
    """
    size = len(layout.document)
    found = block_mask(layout, window)
    expected = create_block_mask(
        lambda batch, head, query, key: may_attend(layout, query, key, window),
        *(None, None, size, size),
        device="cpu",
    )
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
    blocks, listed = size // 128, max(2, size // 128)
    for side in ("kv", "full_kv", "q", "full_q"):
        counts, indices = (getattr(found, f"{side}_{name}") for name in ("num_blocks", "indices"))
        assert counts.shape == (1, 1, listed) and indices.shape == (1, 1, listed, listed)
        assert not counts[..., blocks:].any()
        for ours, name in ((counts, "num_blocks"), (indices[..., :blocks, :], "indices")):
            theirs = getattr(expected, f"{side}_{name}")
            ours = ours[..., :blocks]
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), (side, name)
    assert torch.equal(found.to_dense()[..., :blocks, :blocks], expected.to_dense())


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return out


def test_nothing_of_the_size_of_all_pairs_of_slots():
    layout = random_layout(8, seed=0, longest=600, hide=0.1, sharing=True)
    size = len(layout.document)
    assert size > 6000 and agrees(may_attend, 4096)
    with Largest() as largest:
        build_mask(layout, 4096, "flex")
    assert largest.bytes <= size * (size // 128 + 1) * 4  # 3 % of a [T, T] array of booleans
    with Largest() as largest:
        build_mask(layout, 4096, "dense")
    assert largest.bytes >= size * size


def test_an_edited_predicate_is_applied_by_flex_attention(monkeypatch):
    """Also one that differs over long distances, past the window, or by a field it has added."""
    written = attention.may_attend

    def same(layout, query, key):
        return layout.document[query] == layout.document[key]

    def prefix(layout, query, key, window):
        in_prompt = (layout.branch[query] == 0) & (layout.branch[key] == 0)
        return written(layout, query, key, window) | same(layout, query, key) & in_prompt

    def far(layout, query, key, window):
        distance = layout.position[query] - layout.position[key]
        return written(layout, query, key, window) & (distance < 2000)

    def sinks(layout, query, key, window):
        return written(layout, query, key, window) | (
            written(layout, query, key, None) & (layout.position[key] < 4)
        )

    def seeing_hidden(layout, query, key, window):
        return written(replace_hidden(layout), query, key, window)

    def replace_hidden(layout):
        fields = (layout.document, layout.branch, layout.position)
        return Layout(*fields, torch.zeros_like(layout.hidden))

    def new_field(layout, query, key, window):
        return written(layout, query, key, window) & (layout.turn[query] >= layout.turn[key])

    for edited in (prefix, far, sinks, seeing_hidden, new_field):
        assert not agrees(edited, 4096), edited
    assert agrees(written, 4096) and agrees(written, None)
    layout = pack(random_pairs(6), range(6), 256, True).layout
    plain = build_mask(layout, None, "flex")
    monkeypatch.setattr(attention, "may_attend", prefix)
    mask = build_mask(layout, None, "flex")
    slots = torch.arange(256)
    for made, expected in ((plain, written), (mask, prefix)):
        seen = made.mask_mod(None, None, slots[:, None], slots[None, :])
        assert torch.equal(seen, expected(layout, slots[:, None], slots[None, :], None))


@pytest.mark.parametrize("slots, intervals", [(300, True), (256, False)])
def test_other_rows_take_the_predicate(slots, intervals):
    """Those that are not of whole blocks, and those that `pack` has not made."""
    layout = pack(random_pairs(6), range(6), slots, True).layout
    layout = layout if intervals else replace(layout, intervals=None)
    index = torch.arange(slots)
    seen = build_mask(layout, 5, "flex").mask_mod(None, None, index[:, None], index[None, :])
    assert torch.equal(seen, may_attend(layout, index[:, None], index[None, :], 5))


def test_the_intervals_change_nothing_in_place():
    """Or Inductor refuses FlexAttention's kernel on CUDA, in a lowering that the CPU never does."""
    found = limits(pack(random_pairs(3), range(3), 128, True).layout, 7)
    traced = make_fx(lambda q, k: within(found, q, k))(torch.tensor([5]), torch.tensor([5]))
    operators = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert operators and not [str(o) for o in operators if o._schema.is_mutable]
