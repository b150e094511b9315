"""The reference's two forms, TR-DPO's step, and the check of a run's start."""

import pytest
import torch

from conftest import random_pairs
from notus.data.packing import Rows, pack
from notus.errors import UserError
from notus.objective.logprobs import pair_log_probs, token_log_probs
from notus.objective.loss import build_loss
from notus.objective.reference import (
    CachedReference,
    OnlineReference,
    check_start,
    follow,
    no_reference,
)

CPU = torch.device("cpu")


def test_cached_and_online_agree_and_none_is_zero(group, tiny_model):
    pairs = random_pairs(30)
    batch = pack(pairs, [7, 2, 19], 200, True)
    online = OnlineReference(tiny_model, pairs, Rows(200, True, CPU))
    cached = CachedReference(online.of_pairs(range(30)), pairs)
    torch.testing.assert_close(cached.of_batch(batch), online.of_batch(batch), rtol=1e-5, atol=1e-5)
    assert not online.of_batch(batch).requires_grad
    torch.testing.assert_close(cached.of_pairs([4, 1]), online.of_pairs([4, 1]))
    assert no_reference(pairs, CPU).of_batch(batch).eq(0).all()


def start(tiny_model, shift):
    pairs = random_pairs(4)
    batch = pack(pairs, range(4), 200, True)
    with torch.no_grad():
        log_probs = token_log_probs(tiny_model, batch)
    return pair_log_probs(log_probs, log_probs + shift, batch.lengths, 1.0)


def test_the_start_is_accepted_when_policy_and_reference_agree(tiny_model):
    check_start(build_loss({"name": "sigmoid"}), start(tiny_model, 1e-6), torch.float32)


@pytest.mark.parametrize("shift", [1e-3, -1e-3, float("nan")])
def test_the_start_is_refused_when_they_do_not(shift, tiny_model):
    with pytest.raises(UserError, match="before the first step.*nats"):
        check_start(build_loss({"name": "sigmoid"}), start(tiny_model, shift), torch.float32)


def test_follow_moves_the_reference_by_the_share(tiny_model):
    policy, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.6 * policy.weight + 0.4 * reference.weight
    follow(reference, policy, 0.6)
    torch.testing.assert_close(reference.weight, expected)
