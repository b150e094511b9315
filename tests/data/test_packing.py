import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import random_pairs
from notus.data.packing import CHOSEN, PADDING, PROMPT, REJECTED, pack, slots_of
from notus.data.token_arrays import TokenizedPairs

# Two pairs: prompt 11 12, chosen 13, rejected 14 15 (15 hidden); prompt 21, chosen 22 23,
# rejected 24.
EXAMPLE = TokenizedPairs(
    np.array([11, 12, 13, 14, 15, 21, 22, 23, 24], np.int32),
    np.array([0, 0, 0, 0, 1, 0, 0, 0, 0], bool),
    np.array([[2, 1, 2], [1, 2, 1]]),
)
P, C, R = PROMPT, CHOSEN, REJECTED


def test_shared_prompt_by_hand():
    batch = pack(EXAMPLE, [1, 0], slots=11, prefix_sharing=True)
    assert batch.tokens.tolist() == [21, 22, 23, 24, 11, 12, 13, 14, 15, 0, 0]
    assert batch.layout.branch[:9].tolist() == [P, C, C, R, P, P, C, R, R]
    assert batch.layout.position[:9].tolist() == [0, 1, 2, 1, 0, 1, 2, 2, 3]
    assert batch.layout.hidden.tolist() == [False] * 8 + [True] + [False] * 2
    first, stop, own = batch.layout.intervals.tolist()
    assert first == [0, 0, 0, 0, 0, 0, 4, 4, 4, 0, 0]
    assert stop == [0, 1, 1, 1, 0, 0, 6, 6, 6, 0, 0]
    assert own == [0, 1, 1, 3, 4, 4, 6, 7, 7, 9, 10]
    document = batch.layout.document.tolist()
    assert document[9:] == [PADDING, PADDING]
    assert len(set(document[:4])) == len(set(document[4:9])) == 1
    assert len({*document}) == 3
    # The prompt's last slot predicts the first token of either response.
    assert batch.rows.tolist() == [0, 1, 0, 5, 5, 7]
    assert batch.targets.tolist() == [22, 23, 24, 13, 14, 15]
    assert batch.lengths.tolist() == [[2, 1], [1, 2]]
    assert batch.pairs.tolist() == [1, 0]


def test_apart_by_hand():
    batch = pack(EXAMPLE, [0, 1], slots=12, prefix_sharing=False)
    assert batch.tokens.tolist() == [11, 12, 13, 11, 12, 14, 15, 21, 22, 23, 21, 24]
    assert batch.layout.branch.tolist() == [P, P, C, P, P, R, R, P, C, C, P, R]
    assert batch.layout.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1]
    document = batch.layout.document.tolist()
    runs = [document[:3], document[3:7], document[7:10], document[10:]]
    assert [len(set(run)) for run in runs] == [1] * 4
    assert len({*document}) == 4 and PADDING not in document
    assert batch.layout.hidden.nonzero().flatten().tolist() == [6]
    assert batch.rows.tolist() == [1, 4, 5, 7, 8, 10]
    assert batch.targets.tolist() == [13, 14, 15, 22, 23, 24]
    assert batch.lengths.tolist() == [[1, 2], [2, 1]]


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_without_rejected_response(prefix_sharing):
    """Supervised fine-tuning: prompt 11 12, chosen 13; prompt 21, chosen 22 23."""
    alone = TokenizedPairs(
        np.array([11, 12, 13, 21, 22, 23], np.int32),
        np.zeros(6, bool),
        np.array([[2, 1, 0], [1, 2, 0]]),
    )
    slots = slots_of(alone.lengths, prefix_sharing)
    assert slots.tolist() == [3, 3]
    batch = pack(alone, [0, 1], slots=7, prefix_sharing=prefix_sharing)
    assert batch.tokens.tolist() == [11, 12, 13, 21, 22, 23, 0]
    assert batch.layout.branch[:6].tolist() == [P, P, C, P, C, C]
    assert batch.rows.tolist() == [1, 3, 4]
    assert batch.targets.tolist() == [13, 22, 23]
    assert batch.lengths.tolist() == [[1, 0], [2, 0]]


def test_types():
    batch = pack(EXAMPLE, [0], slots=6, prefix_sharing=True)
    layout = batch.layout
    for tensor in (batch.tokens, batch.pairs, batch.rows, batch.targets, batch.lengths):
        assert tensor.dtype == torch.int64
    for tensor in (layout.document, layout.branch, layout.position, layout.intervals):
        assert tensor.dtype == torch.int32
    assert layout.hidden.dtype == torch.bool


def sequences(batch, prefix_sharing):
    """(tokens, positions, hidden) of each scored sequence, read back from the row slot by slot."""
    layout, found = batch.layout, {}
    for slot, document in enumerate(layout.document.tolist()):
        if document == PADDING:
            continue
        branch = int(layout.branch[slot])
        wanted = (CHOSEN, REJECTED) if branch == PROMPT else (branch,)
        for side in wanted:
            entry = (int(batch.tokens[slot]), int(layout.position[slot]), bool(layout.hidden[slot]))
            found.setdefault((document, side), []).append((slot, *entry))
    if not prefix_sharing:  # a document's prompt belongs to the one response it holds
        scored = {
            key: entries
            for key, entries in found.items()
            if any(int(layout.branch[slot]) == key[1] for slot, *_ in entries)
        }
        return list(scored.values())
    return list(found.values())


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    prefix_sharing=st.booleans(),
    spare=st.integers(0, 9),
    data=st.data(),
)
def test_every_sequence_is_whole(count, seed, prefix_sharing, spare, data):
    pairs = random_pairs(count, seed, hide=0.2)
    order = data.draw(st.permutations(range(count)))[: data.draw(st.integers(1, count))]
    slots = int(slots_of(pairs.lengths, prefix_sharing)[order].sum()) + spare
    batch = pack(pairs, order, slots, prefix_sharing)
    assert batch.tokens.shape == batch.layout.document.shape == (slots,)
    assert int((batch.layout.document == PADDING).sum()) == spare

    rows, targets = batch.rows.tolist(), batch.targets.tolist()
    found = iter(sequences(batch, prefix_sharing))
    cursor = 0
    for place, pair in enumerate(order):
        prompt, *responses = pairs.parts(pair)
        for side, part in enumerate(responses):
            sequence = next(found)
            slots_of_sequence = [slot for slot, *_ in sequence]
            whole = [*pairs.tokens[prompt], *pairs.tokens[part]]
            assert [token for _, token, *_ in sequence] == whole
            assert [position for *_, position, _ in sequence] == list(range(len(whole)))
            flags = [*pairs.hidden[prompt], *pairs.hidden[part]]
            assert [hidden for *_, hidden in sequence] == flags
            length = part.stop - part.start
            assert batch.lengths[place, side] == length
            scored = slice(cursor, cursor + length)
            assert targets[scored] == whole[-length:]
            # Each target is predicted by the slot of the token before it.
            assert rows[scored] == slots_of_sequence[-length - 1 : -1]
            cursor += length
    assert cursor == len(rows) == len(targets)
    assert next(found, None) is None


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_no_pairs_is_a_row_of_padding(prefix_sharing):
    batch = pack(EXAMPLE, [], slots=8, prefix_sharing=prefix_sharing)
    assert batch.tokens.tolist() == [0] * 8
    assert (batch.layout.document == PADDING).all()
    assert not batch.layout.hidden.any()
    assert batch.rows.shape == batch.targets.shape == batch.pairs.shape == (0,)
    assert batch.lengths.shape == (0, 2)
    assert batch.rows.dtype == batch.targets.dtype == batch.lengths.dtype == torch.int64


@pytest.mark.parametrize("prefix_sharing, needed", [(True, 9), (False, 12)])
def test_exact_fill_and_one_too_few(prefix_sharing, needed):
    assert slots_of(EXAMPLE.lengths, prefix_sharing).sum() == needed
    batch = pack(EXAMPLE, [0, 1], needed, prefix_sharing)
    assert PADDING not in batch.layout.document
    with pytest.raises(AssertionError):
        pack(EXAMPLE, [0, 1], needed - 1, prefix_sharing)


def test_slots_of():
    assert slots_of(EXAMPLE.lengths, True).tolist() == [5, 4]
    assert slots_of(EXAMPLE.lengths, False).tolist() == [7, 5]


def test_to_device_keeps_everything():
    batch = pack(EXAMPLE, [0, 1], slots=10, prefix_sharing=True)
    moved = batch.to(torch.device("cpu"))
    assert moved.tokens.tolist() == batch.tokens.tolist()
    assert moved.layout.document.tolist() == batch.layout.document.tolist()
    assert moved.lengths.tolist() == batch.lengths.tolist()
