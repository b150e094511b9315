"""Packed, prefix-shared scoring against transformers' model on one sequence at a time."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers

from conftest import flat_log_probs, random_pairs
from notus.data.packing import Rows, pack, slots_of
from notus.data.planning import divide_pairs
from notus.objective.logprobs import (
    gather_pairs,
    pair_log_probs,
    response_sums,
    score,
    token_log_probs,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(9)


@pytest.fixture(scope="module")
def expected(pairs, tiny_folder):
    theirs = transformers.MistralForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        return flat_log_probs(lambda ids: theirs(ids[None]).logits[0], pairs)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("budget", [48, 100, 1000])
def test_packed_scores_equal_one_sequence_at_a_time(
    sharing, budget, pairs, expected, tiny_model, group
):
    division = divide_pairs(range(9), slots_of(pairs.lengths, sharing), ranks=1, budget=budget)
    assert (len(division.bins) > 1) == (budget < 1000)
    flat = score(tiny_model.train(), pairs, range(9), Rows(budget, sharing, CPU))
    torch.testing.assert_close(flat.double(), expected, rtol=1e-5, atol=1e-5)
    assert not tiny_model.training
    some = score(tiny_model, pairs, [7, 2], Rows(budget, sharing, CPU))
    wanted = gather_pairs(expected, pairs, [7, 2])
    torch.testing.assert_close(some.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sharing", [True, False])
def test_one_pair_never_changes_another_bit_for_bit(sharing, tiny_model):
    pairs = random_pairs(4)
    slots = int(slots_of(pairs.lengths, sharing).sum()) + 7  # with padding behind
    before = token_log_probs(tiny_model, pack(pairs, range(4), slots, sharing))
    for changed in range(4):
        tokens = pairs.tokens.copy()
        for part in pairs.parts(changed):
            tokens[part] = (tokens[part] - 3 + 5) % 50 + 3
        other = dataclasses.replace(pairs, tokens=tokens)
        after = token_log_probs(tiny_model, pack(other, range(4), slots, sharing))
        same = before == after
        owner = np.repeat(np.arange(4), pairs.lengths[:, 1:].sum(1))
        assert same[owner != changed].all()
        assert not same[owner == changed].all()


def test_padding_tokens_do_not_matter_bit_for_bit(tiny_model):
    pairs = random_pairs(2)
    batch = pack(pairs, range(2), 100, True)
    noisy = dataclasses.replace(
        batch, tokens=torch.where(batch.layout.document < 0, 7, batch.tokens)
    )
    assert not torch.equal(batch.tokens, noisy.tokens)
    assert torch.equal(token_log_probs(tiny_model, batch), token_log_probs(tiny_model, noisy))


def test_a_response_never_sees_the_other_one(tiny_model):
    pairs = random_pairs(1, response=(6, 6))
    tokens = pairs.tokens.copy()
    tokens[pairs.parts(0)[1]] = 5
    other = dataclasses.replace(pairs, tokens=tokens)
    before, after = (token_log_probs(tiny_model, pack(p, [0], 64, True)) for p in (pairs, other))
    assert torch.equal(before[6:], after[6:])
    assert not torch.equal(before[:6], after[:6])


def test_a_hidden_token_is_seen_by_no_other_and_sees_none(tiny_model):
    pairs = random_pairs(1, prompt=(8, 8), response=(6, 6))
    hidden = np.zeros_like(pairs.hidden)
    hidden[[3, 10]] = True  # one in the prompt, one in the chosen response
    masked = dataclasses.replace(pairs, hidden=hidden)
    tokens = pairs.tokens.copy()
    tokens[[3, 10]] = [11, 12]
    other = dataclasses.replace(masked, tokens=tokens)
    before, after = (token_log_probs(tiny_model, pack(p, [0], 64, True)) for p in (masked, other))
    # Index 10 is the chosen response's third token: scored itself, and the input of the fourth.
    changed = (before != after).nonzero().flatten().tolist()
    assert changed == [2, 3]
    plain = token_log_probs(tiny_model, pack(pairs, [0], 64, True))
    assert not torch.allclose(plain, before)


def test_sharing_gives_the_same_gradient(tiny_model):
    pairs = random_pairs(5)
    gradients = []
    for sharing in (True, False):
        tiny_model.zero_grad()
        batch = pack(pairs, range(5), 400, sharing)
        weights = torch.linspace(-1, 1, len(batch.rows))
        (token_log_probs(tiny_model, batch) * weights).sum().backward()
        gradients.append([p.grad.clone() for p in tiny_model.parameters()])
    for shared, unshared in zip(*gradients, strict=True):
        torch.testing.assert_close(shared, unshared, rtol=1e-5, atol=1e-5 * unshared.abs().max())


def test_an_empty_microbatch_has_zero_gradient_everywhere(tiny_model):
    batch = pack(random_pairs(3), [], 16, True)
    log_probs = token_log_probs(tiny_model, batch)
    assert log_probs.shape == (0,)
    pair_log_probs(log_probs, log_probs.detach(), batch.lengths, 1.0).policy.chosen.sum().backward()
    assert all((p.grad == 0).all() for p in tiny_model.parameters())


def test_response_sums_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    lengths = torch.tensor([[2, 1], [1, 2]])
    assert response_sums(values, lengths).tolist() == [[3.0, 4.0], [8.0, 48.0]]


def test_pair_log_probs_by_hand():
    policy = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    reference = policy / 2
    lengths = torch.tensor([[2, 1], [1, 2]])
    squares = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 30.0])
    pairs = pair_log_probs(torch.stack((policy, squares)), reference, lengths, 1.5)
    assert pairs.policy.chosen.tolist() == [3.0, 8.0]
    assert pairs.policy.rejected.tolist() == [4.0, 48.0]
    assert pairs.reference.rejected.tolist() == [2.0, 24.0]
    assert pairs.chosen_length.tolist() == [2.0, 1.0]
    assert pairs.policy.chosen_shared.tolist() == [1.0, 8.0]
    assert pairs.policy.rejected_shared.tolist() == [4.0, 16.0]
    assert pairs.reference.rejected_shared.tolist() == [2.0, 8.0]
    assert pairs.mean_chosen_length == 1.5
    torch.testing.assert_close(pairs.rejected_weight, torch.tensor([1.0, np.exp(1.0)]).double())
    assert pairs.chosen_weight.tolist() == [1.0, 1.0]


def test_gather_pairs_picks_whole_pairs_in_order(pairs):
    flat = torch.arange(int(pairs.response_starts[-1]))
    picked = gather_pairs(flat, pairs, [7, 2])
    starts = pairs.response_starts
    expected = [*range(starts[7], starts[8]), *range(starts[2], starts[3])]
    assert picked.tolist() == expected
