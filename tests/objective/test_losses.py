"""Losses against their formulas, written out per pair in plain Python floats."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from loss_cases import CASES, make_pairs, map_tensors, policy_gradient, with_gradient
from torch import Tensor

from notus.objective.loss import build_loss
from notus.objective.losses import LOSSES, PairLogProbs, Sums

LN2 = math.log(2)


def moved(pairs: PairLogProbs, **shifts: Tensor | float) -> PairLogProbs:
    """The pairs with something added to the policy's sums of these names."""
    sums = {name: getattr(pairs.policy, name) + shift for name, shift in shifts.items()}
    return pairs._replace(policy=pairs.policy._replace(**sums))


def at_margin(policy_minus_reference: float, dtype: torch.dtype) -> PairLogProbs:
    """Pairs whose chosen log-ratio is +x or -x and whose rejected one is -x or +x."""
    pairs = make_pairs(count=4, dtype=dtype)
    shift = policy_minus_reference * torch.tensor([1, -1, 1, -1], dtype=dtype)
    other = policy_minus_reference * torch.tensor([-1, 1, 1, -1], dtype=dtype)
    return moved(
        pairs._replace(policy=pairs.reference),
        chosen=shift,
        rejected=other,
        chosen_shared=shift / 2,
        rejected_shared=other / 2,
    )


# --- the formulas ---


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_s(x: float) -> float:
    return math.log(s(x))


def rows(pairs: PairLogProbs) -> list[SimpleNamespace]:
    """One namespace of floats per pair: w, l (policy), rw, rl (log-ratios), lengths and so on."""
    result = []
    for i in range(len(pairs.chosen_length)):
        p = map_tensors(lambda tensor, i=i: (tensor[i] if tensor.ndim else tensor).item(), pairs)
        policy, reference = p.policy, p.reference
        result.append(
            SimpleNamespace(
                w=policy.chosen,
                l=policy.rejected,
                ref_w=reference.chosen,
                ref_l=reference.rejected,
                rw=policy.chosen - reference.chosen,
                rl=policy.rejected - reference.rejected,
                shared_rw=policy.chosen_shared - reference.chosen_shared,
                shared_rl=policy.rejected_shared - reference.rejected_shared,
                n_w=p.chosen_length,
                n_l=p.rejected_length,
                mean_n=p.mean_chosen_length,
                weight=p.chosen_weight * p.rejected_weight,
            )
        )
    return result


def odds(mean_log_prob: float) -> float:
    return math.exp(mean_log_prob) / (1 - math.exp(mean_log_prob))


def cross_entropy(x: float, e: float) -> float:
    return -(1 - e) * log_s(x) - e * log_s(-x)


def exo(p: SimpleNamespace, b: float, e: float) -> float:
    q = s(b * (p.rw - p.rl))
    return q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e)


def long_tail(r: float, shared: float, alpha: float) -> float:
    return shared + alpha * (r - shared)


def f_prime(r: float, divergence: str, alpha: float | None) -> float:
    u = math.exp(r)
    if divergence == "forward_kl":
        return 1 - 1 / u
    if divergence == "jensen_shannon":
        return math.log(2 * u / (1 + u))
    return (u ** (alpha - 1) - 1) / (alpha - 1)


def per_pair(formula: Callable[..., float]) -> Callable[..., list[float]]:
    return lambda all_rows, **options: [formula(p, **options) for p in all_rows]


def sorted_against(
    left: Callable[[SimpleNamespace], float], right: Callable[[SimpleNamespace], float]
) -> Callable[..., list[float]]:
    """AOT: left(p) of rank k against the step's right of rank k."""

    def values(all_rows: list[SimpleNamespace], beta: float, label_smoothing: float) -> list[float]:
        ordered = sorted(right(p) for p in all_rows)
        ranks = [sum(left(q) < left(p) for q in all_rows) for p in all_rows]
        return [
            cross_entropy(beta * (left(p) - ordered[k]), label_smoothing)
            for p, k in zip(all_rows, ranks, strict=True)
        ]

    return values


FORMULAS: dict[str, Callable[..., list[float]]] = {
    "sigmoid": per_pair(
        lambda p, beta, label_smoothing: cross_entropy(beta * (p.rw - p.rl), label_smoothing)
    ),
    "robust": per_pair(
        lambda p, beta, label_smoothing: (
            (
                -(1 - label_smoothing) * log_s(beta * (p.rw - p.rl))
                + label_smoothing * log_s(-beta * (p.rw - p.rl))
            )
            / (1 - 2 * label_smoothing)
        )
    ),
    "ipo": per_pair(
        lambda p, beta, average: (
            (((p.rw / p.n_w - p.rl / p.n_l) if average else (p.rw - p.rl)) - 1 / (2 * beta)) ** 2
        )
    ),
    "hinge": per_pair(lambda p, beta: max(0.0, 1 - beta * (p.rw - p.rl))),
    "sigmoid_norm": per_pair(lambda p, beta: -log_s(beta * (p.rw / p.n_w - p.rl / p.n_l))),
    "simpo": per_pair(
        lambda p, beta, gamma: -log_s(beta / p.n_w * p.w - beta / p.n_l * p.l - gamma)
    ),
    "orpo": per_pair(
        lambda p, odds_weight: (
            -p.w / p.n_w - odds_weight * log_s(math.log(odds(p.w / p.n_w) / odds(p.l / p.n_l)))
        )
    ),
    "sft": per_pair(lambda p: -p.w / p.mean_n),
    "rpo": per_pair(lambda p, beta, alpha: -log_s(beta * (p.rw - p.rl)) - alpha * p.w / p.n_w),
    "dpop": per_pair(
        lambda p, beta, penalty: -log_s(beta * (p.rw - p.rl - penalty * max(0.0, p.ref_w - p.w)))
    ),
    "apo_zero": per_pair(lambda p, beta: 1 - s(beta * p.rw) + s(beta * p.rl)),
    "apo_down": per_pair(lambda p, beta: s(beta * p.rw) + 1 - s(beta * (p.rw - p.rl))),
    "bco_pair": per_pair(lambda p, beta: -log_s(beta * p.rw) - log_s(-beta * p.rl)),
    "nca_pair": per_pair(
        lambda p, beta: -log_s(beta * p.rw) - log_s(-beta * p.rw) / 2 - log_s(-beta * p.rl) / 2
    ),
    "exo_pair": per_pair(lambda p, beta, label_smoothing: exo(p, beta, label_smoothing)),
    "sppo_hard": per_pair(
        lambda p, beta: (p.rw - 1 / (2 * beta)) ** 2 + (p.rl + 1 / (2 * beta)) ** 2
    ),
    "aot": sorted_against(lambda p: p.w - p.l, lambda p: p.ref_w - p.ref_l),
    "aot_unpaired": sorted_against(lambda p: p.rw, lambda p: p.rl),
    "discopop": per_pair(
        lambda p, beta, temperature: (
            -(1 - s(beta * (p.rw - p.rl) / temperature)) * log_s(beta * (p.rw - p.rl))
            + s(beta * (p.rw - p.rl) / temperature) * math.exp(-beta * (p.rw - p.rl))
        )
    ),
    "wpo": per_pair(lambda p, beta: -p.weight * log_s(beta * (p.rw - p.rl))),
    "ld_dpo": per_pair(
        lambda p, beta, alpha: (
            -log_s(
                beta * (long_tail(p.rw, p.shared_rw, alpha) - long_tail(p.rl, p.shared_rl, alpha))
            )
        )
    ),
    "f_dpo": per_pair(
        lambda p, beta, divergence, alpha=None: (
            -log_s(beta * (f_prime(p.rw, divergence, alpha) - f_prime(p.rl, divergence, alpha)))
        )
    ),
}


def test_every_loss_has_a_formula_and_a_value_at_zero_margin() -> None:
    assert LOSSES.keys() == FORMULAS.keys() == AT_ZERO.keys()


@pytest.mark.parametrize("section", CASES, ids=str)
def test_value_and_gradient_are_the_formulas(section: dict[str, object]) -> None:
    loss = build_loss(section)
    options = {key: value for key, value in loss.settings.items() if key != "name"}
    formula = FORMULAS[section["name"]]
    pairs = with_gradient(make_pairs())
    values = loss(pairs)
    assert values.tolist() == pytest.approx(formula(rows(pairs), **options), rel=1e-11)

    step = 1e-5
    expected = torch.zeros(len(Sums._fields), len(values), dtype=torch.float64)
    for row, field in enumerate(Sums._fields):
        for i in range(len(values)):
            shift = torch.zeros_like(values)
            shift[i] = step
            up, down = (
                sum(formula(rows(moved(pairs, **{field: d})), **options)) for d in (shift, -shift)
            )
            expected[row, i] = (up - down) / (2 * step)
    torch.testing.assert_close(policy_gradient(values, pairs), expected, rtol=1e-6, atol=1e-8)


# --- known values ---

# The value per pair where policy and reference agree, at the default options.
AT_ZERO: dict[str, Callable[[SimpleNamespace], float]] = {
    "sigmoid": lambda p: LN2,
    "robust": lambda p: LN2,
    "ipo": lambda p: 25,
    "hinge": lambda p: 1,
    "sigmoid_norm": lambda p: LN2,
    "simpo": lambda p: math.log(1 + math.exp(0.5 - 0.1 * (p.w / p.n_w - p.l / p.n_l))),
    "orpo": lambda p: FORMULAS["orpo"]([p], odds_weight=0.1)[0],
    "sft": lambda p: -p.w / p.mean_n,
    "rpo": lambda p: LN2 - p.w / p.n_w,
    "dpop": lambda p: LN2,
    "apo_zero": lambda p: 1,
    "apo_down": lambda p: 1,
    "bco_pair": lambda p: 2 * LN2,
    "nca_pair": lambda p: 2 * LN2,
    "exo_pair": lambda p: -LN2 - math.log(0.001 * 0.999) / 2,
    "sppo_hard": lambda p: 50,
    "aot": lambda p: LN2,
    "aot_unpaired": lambda p: LN2,
    "discopop": lambda p: (LN2 + 1) / 2,
    "wpo": lambda p: p.weight * LN2,
    "ld_dpo": lambda p: LN2,
    "f_dpo": lambda p: LN2,
}


@pytest.mark.parametrize("name", LOSSES)
def test_value_where_policy_is_the_reference(name: str) -> None:
    pairs = at_margin(0.0, torch.float64)
    expected = [AT_ZERO[name](p) for p in rows(pairs)]
    assert build_loss({"name": name})(pairs).tolist() == pytest.approx(expected, rel=1e-12)


def test_alpha_divergence_lies_between_forward_and_reverse_kl() -> None:
    pairs = make_pairs()
    alpha = {"name": "f_dpo", "divergence": "alpha"}
    torch.testing.assert_close(
        build_loss({**alpha, "alpha": 0})(pairs), build_loss({"name": "f_dpo"})(pairs)
    )
    near_reverse = build_loss({**alpha, "alpha": 1 - 1e-9})(pairs)
    torch.testing.assert_close(near_reverse, build_loss({"name": "sigmoid"})(pairs))


def test_label_smoothing_moves_the_minimum_to_the_log_odds_of_the_label() -> None:
    pairs = with_gradient(at_margin(0.0, torch.float64))
    minimum = math.log((1 - 0.2) / 0.2) / 0.1
    at_minimum = moved(pairs, chosen=minimum)
    for name in ("sigmoid", "exo_pair"):
        values = build_loss({"name": name, "label_smoothing": 0.2})(at_minimum)
        torch.testing.assert_close(
            policy_gradient(values, pairs), torch.zeros(4, 4, dtype=torch.float64)
        )
    assert build_loss({"name": "exo_pair", "label_smoothing": 0.2})(at_minimum).tolist() == (
        pytest.approx([0.0] * 4, abs=1e-12)
    )


# The other losses have a minimum at a finite margin, or do not depend on the margin alone.
DECREASING = """sigmoid robust hinge sigmoid_norm simpo orpo sft rpo dpop apo_zero bco_pair wpo
    ld_dpo f_dpo""".split()


@pytest.mark.parametrize("name", DECREASING)
def test_a_larger_margin_costs_less(name: str) -> None:
    pairs = make_pairs(count=1)
    shift = torch.linspace(-4, 4, 41, dtype=torch.float64)
    chosen = pairs.reference.chosen + shift
    grid = pairs._replace(policy=pairs.policy._replace(chosen=chosen))
    assert (build_loss({"name": name})(grid).diff() < 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("section", CASES, ids=str)
def test_extreme_margins_stay_finite(section: dict[str, object], dtype: torch.dtype) -> None:
    for log_ratio in (50.0, 1e4):
        pairs = with_gradient(at_margin(log_ratio, dtype))
        values = build_loss(section)(pairs)
        assert values.dtype == dtype and values.shape == (4,)
        assert values.isfinite().all()
        assert policy_gradient(values, pairs).isfinite().all()


def test_a_dropped_chosen_response_is_still_pulled_back() -> None:
    pairs = with_gradient(at_margin(1e4, torch.float32))  # pair 1 has r_w = -1e4
    for section in ({"name": "f_dpo"}, {"name": "f_dpo", "divergence": "alpha"}):
        assert policy_gradient(build_loss(section)(pairs), pairs)[0, 1] < 0


def test_orpo_is_finite_for_a_certain_response() -> None:
    pairs = make_pairs()
    pairs = with_gradient(moved(pairs, chosen=-pairs.policy.chosen))
    values = build_loss({"name": "orpo"})(pairs)
    assert values.isfinite().all() and policy_gradient(values, pairs).isfinite().all()


@pytest.mark.parametrize("name", ["simpo", "orpo", "sft"])
def test_losses_without_a_reference_ignore_it(name: str) -> None:
    pairs = make_pairs()
    nothing = torch.full_like(pairs.chosen_length, math.nan)
    without = pairs._replace(reference=Sums(nothing, nothing, nothing, nothing))
    loss = build_loss({"name": name})
    torch.testing.assert_close(loss(without), loss(pairs), rtol=0, atol=0)
