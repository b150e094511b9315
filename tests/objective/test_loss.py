"""The configured loss: mixes, settings, coupling, and what a user can get wrong in `loss`."""

import math

import pytest
import torch
from loss_cases import CASES, make_pairs, map_tensors, policy_gradient, with_gradient

from notus.errors import UserError
from notus.objective.loss import build_loss, couple
from notus.objective.losses import LOSSES


def test_a_mix_is_the_weighted_sum_of_its_losses() -> None:
    pairs = make_pairs()
    mix = build_loss(
        {"mix": [{"name": "ipo", "weight": 2, "beta": 0.3}, {"name": "sft", "weight": 0.5}]}
    )
    expected = 2 * build_loss({"name": "ipo", "beta": 0.3})(pairs)
    expected = expected + 0.5 * build_loss({"name": "sft"})(pairs)
    torch.testing.assert_close(mix(pairs), expected)
    assert mix.name == "2 ipo + 0.5 sft"
    assert mix.beta == 0.3 and mix.uses_reference
    assert not mix.uses_weights and not mix.couples_pairs


def test_what_the_loop_has_to_provide() -> None:
    needs = {name: build_loss({"name": name}) for name in LOSSES}
    assert {n for n, loss in needs.items() if not loss.uses_reference} == {"simpo", "orpo", "sft"}
    assert {n for n, loss in needs.items() if loss.uses_weights} == {"wpo"}
    assert {n for n, loss in needs.items() if loss.couples_pairs} == {"aot", "aot_unpaired"}
    assert needs["orpo"].beta == 1.0 and needs["sigmoid"].beta == 0.1


@pytest.mark.parametrize(
    "section", [*CASES, {"mix": [{"weight": 0.5, **case} for case in CASES]}], ids=str
)
def test_settings_build_an_equal_loss(section: dict[str, object]) -> None:
    loss = build_loss(section)
    assert build_loss(loss.settings) == loss


def test_settings_hold_every_option_that_acts() -> None:
    assert build_loss({"name": "sigmoid"}).settings == {
        "name": "sigmoid",
        "beta": 0.1,
        "label_smoothing": 0.0,
    }
    assert "alpha" not in build_loss({"name": "f_dpo"}).settings


def part(pairs, indices):
    """Some of the pairs; what is not per pair stays."""
    return map_tensors(lambda tensor: tensor[indices] if tensor.ndim else tensor, pairs)


@pytest.mark.parametrize("split", [[6], [1] * 6, [2, 4], [3, 1, 2]], ids=str)
@pytest.mark.parametrize(
    "section",
    [
        {"name": "aot", "label_smoothing": 0.1},
        {"name": "aot_unpaired", "beta": 0.5},
        {"mix": [{"name": "aot", "weight": 0.7}, {"name": "ld_dpo", "weight": 2}]},
    ],
    ids=str,
)
def test_microbatches_of_a_coupled_loss_add_up_to_the_step(
    section: dict[str, object], split: list[int]
) -> None:
    loss = build_loss(section)
    step = with_gradient(make_pairs())
    whole = loss(step)
    known = torch.tensor([17, 3, 99, 40, 8, 21])  # the pairs' indices in a data set
    coupled = couple(loss, step, known)
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    total = torch.zeros((), dtype=torch.float64)
    gradient = torch.zeros(4, 6, dtype=torch.float64)
    for indices in order.split(split):
        microbatch = with_gradient(part(step, indices))
        values = coupled(microbatch, known[indices])
        torch.testing.assert_close(values, whole[indices])
        total += values.detach().sum()
        gradient[:, indices] = policy_gradient(values, microbatch)
    torch.testing.assert_close(total, whole.detach().sum())
    torch.testing.assert_close(gradient, policy_gradient(whole, step))


def test_a_coupled_loss_is_not_the_sum_over_separate_microbatches() -> None:
    loss, step = build_loss({"name": "aot"}), make_pairs(count=32)
    separate = [loss(part(step, slice(i, None, 2))).sum() for i in (0, 1)]
    assert abs(sum(separate) - loss(step).sum()) > 1e-3


def test_couple_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        coupled = couple(build_loss({"name": "aot"}), make_pairs(), torch.arange(6))
    assert not coupled.values.requires_grad and coupled.gradients.chosen.any()


# --- what a user can get wrong ---


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "loss.name: found null, expected a string"),
        ({"name": "sigmiod"}, "loss.name: unknown loss 'sigmiod' (did you mean 'sigmoid'?)"),
        ({"name": "dpo"}, "loss.name: unknown loss 'dpo' (did you mean 'sigmoid'?)"),
        ({"name": 3}, "loss.name: found 3, expected a string"),
        (
            {"name": "ipo", "label_smoothing": 0.1},
            "loss.label_smoothing: unknown key; valid keys here: loss.beta, loss.average (loss",
        ),
        (
            {"name": "sft", "beta": 0.1},
            "loss.beta: unknown key; valid keys here: none (loss 'sft')",
        ),
        (
            {"name": "ipo", "averge": True},
            "loss.averge: unknown key; nearest valid key: loss.average (loss 'ipo')",
        ),
        ({"name": "ipo", "average": 1}, "loss.average: found 1, expected true or false"),
        ({"name": "sigmoid", "beta": "0.1"}, 'loss.beta: found "0.1", expected a number above 0'),
        ({"name": "sigmoid", "beta": True}, "loss.beta: found true, expected a number above 0"),
        (
            {"name": "sigmoid", "beta": math.inf},
            "loss.beta: found Infinity, expected a finite number",
        ),
        ({"name": "sigmoid", "beta": 0.0}, "loss.beta: found 0.0, expected a number above 0"),
        (
            {"name": "sigmoid", "label_smoothing": 0.5},
            "loss.label_smoothing: found 0.5, expected a number from 0 to below 0.5",
        ),
        (
            {"name": "exo_pair", "label_smoothing": 0.0},
            "loss.label_smoothing: found 0.0, expected a number above 0 and below 0.5",
        ),
        (
            {"name": "f_dpo", "divergence": "reverse_kl"},
            'loss.divergence: found "reverse_kl", '
            'expected "forward_kl", "jensen_shannon" or "alpha"',
        ),
        (
            {"name": "f_dpo", "alpha": 0.5},
            "loss.alpha: acts only with divergence 'alpha', and loss.divergence is 'forward_kl'",
        ),
        ({"mix": []}, "loss.mix: found [], expected a list of one or more values"),
        ({"mix": ["sft"]}, 'loss.mix.0: found "sft", expected an object'),
        ({"mix": [{"name": "sft"}]}, "loss.mix.0.weight: found null, expected a number above 0"),
        (
            {"mix": [{"name": "sft", "weight": 0.0}]},
            "loss.mix.0.weight: found 0.0, expected a number above 0",
        ),
        (
            {"mix": [{"name": "sft", "weight": 1}, {"name": "simp", "weight": 1}]},
            "loss.mix.1.name: unknown loss 'simp' (did you mean 'simpo'?)",
        ),
        (
            {"mix": [{"name": "ipo", "weight": 1, "gamma": 1}]},
            "loss.mix.0.gamma: unknown key; valid keys here: loss.mix.0.beta, loss.mix.0.average",
        ),
        (
            {"mix": [{"name": "sft", "weight": 1}], "beta": 0.1},
            "loss.beta: has no effect with loss.mix",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_named(section: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_loss(section)
    assert str(error.value).startswith(message)
