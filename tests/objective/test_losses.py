"""Losses against their formulas, written out per pair in plain Python floats."""

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from notus.errors import UserError
from notus.objective.losses import (
    LOSSES,
    POLICY_FIELDS,
    PairLogProbs,
    build_loss,
    couple,
)

LN2 = math.log(2)


def make_pairs(seed: int = 0, count: int = 6, dtype: torch.dtype = torch.float64) -> PairLogProbs:
    """Log-probs of a plausible size: some -1.5 nats per token, policy near the reference."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    chosen_length = uniform(3, 12).round()
    rejected_length = uniform(3, 12).round()
    reference_chosen = chosen_length * uniform(-2, -1)
    reference_rejected = rejected_length * uniform(-2, -1)
    reference_chosen_shared = reference_chosen * uniform(0.5, 1)
    reference_rejected_shared = reference_rejected * uniform(0.5, 1)
    fields = PairLogProbs(
        policy_chosen=reference_chosen + uniform(-2.5, 2.5),
        policy_rejected=reference_rejected + uniform(-2.5, 2.5),
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        policy_chosen_shared=reference_chosen_shared + uniform(-1, 1),
        policy_rejected_shared=reference_rejected_shared + uniform(-1, 1),
        reference_chosen_shared=reference_chosen_shared,
        reference_rejected_shared=reference_rejected_shared,
        mean_chosen_length=chosen_length.mean(),
        chosen_weight=uniform(0.2, 1),
        rejected_weight=uniform(0.2, 1),
    )
    return PairLogProbs(*(tensor.to(dtype) for tensor in fields))


def at_margin(policy_minus_reference: float, dtype: torch.dtype) -> PairLogProbs:
    """Pairs whose chosen log-ratio is +x or -x and whose rejected one is -x or +x."""
    pairs = make_pairs(count=4, dtype=dtype)
    shift = policy_minus_reference * torch.tensor([1, -1, 1, -1], dtype=dtype)
    other = policy_minus_reference * torch.tensor([-1, 1, 1, -1], dtype=dtype)
    return pairs._replace(
        policy_chosen=pairs.reference_chosen + shift,
        policy_rejected=pairs.reference_rejected + other,
        policy_chosen_shared=pairs.reference_chosen_shared + shift / 2,
        policy_rejected_shared=pairs.reference_rejected_shared + other / 2,
    )


def with_gradient(pairs: PairLogProbs) -> PairLogProbs:
    leaves = {f: getattr(pairs, f).detach().clone().requires_grad_() for f in POLICY_FIELDS}
    return pairs._replace(**leaves)


def policy_gradient(values: Tensor, pairs: PairLogProbs) -> Tensor:
    """[4, B]: d(sum of values) / d(each policy field)."""
    leaves = [getattr(pairs, name) for name in POLICY_FIELDS]
    return torch.stack(
        torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True)
    )


# --- the formulas ---


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_s(x: float) -> float:
    return math.log(s(x))


def rows(pairs: PairLogProbs) -> list[SimpleNamespace]:
    """One namespace of floats per pair: w, l (policy), rw, rl (log-ratios), lengths and so on."""
    result = []
    for i in range(len(pairs.policy_chosen)):
        p = {k: (v[i] if v.ndim else v).item() for k, v in pairs._asdict().items()}
        result.append(
            SimpleNamespace(
                w=p["policy_chosen"],
                l=p["policy_rejected"],
                ref_w=p["reference_chosen"],
                ref_l=p["reference_rejected"],
                rw=p["policy_chosen"] - p["reference_chosen"],
                rl=p["policy_rejected"] - p["reference_rejected"],
                shared_rw=p["policy_chosen_shared"] - p["reference_chosen_shared"],
                shared_rl=p["policy_rejected_shared"] - p["reference_rejected_shared"],
                n_w=p["chosen_length"],
                n_l=p["rejected_length"],
                mean_n=p["mean_chosen_length"],
                weight=p["chosen_weight"] * p["rejected_weight"],
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

# Beside its defaults, the options each loss is tried with.
OTHER_OPTIONS: dict[str, list[dict[str, object]]] = {
    "sigmoid": [{"beta": 0.7, "label_smoothing": 0.2}],
    "robust": [{"label_smoothing": 0.0}, {"beta": 0.5, "label_smoothing": 0.3}],
    "ipo": [{"average": False}, {"beta": 0.6}],
    "hinge": [{"beta": 0.9}],
    "sigmoid_norm": [{"beta": 5}],
    "simpo": [{"beta": 2.5, "gamma": 0.3}],
    "orpo": [{"odds_weight": 0.8}],
    "rpo": [{"beta": 0.4, "alpha": 0.2}],
    "dpop": [{"beta": 0.3, "penalty": 5}],
    "exo_pair": [{"beta": 0.4, "label_smoothing": 0.1}],
    "aot": [{"beta": 0.6, "label_smoothing": 0.1}],
    "aot_unpaired": [{"beta": 0.6, "label_smoothing": 0.1}],
    "discopop": [{"beta": 0.02, "temperature": 0.3}],
    "ld_dpo": [{"beta": 0.8, "alpha": 0.0}, {"alpha": 1}],
    "f_dpo": [
        {"divergence": "jensen_shannon", "beta": 0.8},
        {"divergence": "alpha", "beta": 0.5},
        {"divergence": "alpha", "alpha": 0.8},
    ],
}

CASES = [
    {"name": name, **options} for name in LOSSES for options in [{}, *OTHER_OPTIONS.get(name, [])]
]


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
    expected = torch.zeros(len(POLICY_FIELDS), len(values), dtype=torch.float64)
    for row, field in enumerate(POLICY_FIELDS):
        for i in range(len(values)):
            shift = torch.zeros_like(values)
            shift[i] = step
            up, down = (
                sum(formula(rows(pairs._replace(**{field: getattr(pairs, field) + d})), **options))
                for d in (shift, -shift)
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
    moved = pairs._replace(policy_chosen=pairs.policy_chosen + minimum)
    for name in ("sigmoid", "exo_pair"):
        values = build_loss({"name": name, "label_smoothing": 0.2})(moved)
        torch.testing.assert_close(
            policy_gradient(values, pairs), torch.zeros(4, 4, dtype=torch.float64)
        )
    assert build_loss({"name": "exo_pair", "label_smoothing": 0.2})(moved).tolist() == (
        pytest.approx([0.0] * 4, abs=1e-12)
    )


# The other losses have a minimum at a finite margin, or do not depend on the margin alone.
DECREASING = """sigmoid robust hinge sigmoid_norm simpo orpo sft rpo dpop apo_zero bco_pair wpo
    ld_dpo f_dpo""".split()


@pytest.mark.parametrize("name", DECREASING)
def test_a_larger_margin_costs_less(name: str) -> None:
    pairs = make_pairs(count=1)
    shift = torch.linspace(-4, 4, 41, dtype=torch.float64)
    grid = pairs._replace(policy_chosen=pairs.reference_chosen + shift)
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
    pairs = with_gradient(pairs._replace(policy_chosen=torch.zeros_like(pairs.policy_chosen)))
    values = build_loss({"name": "orpo"})(pairs)
    assert values.isfinite().all() and policy_gradient(values, pairs).isfinite().all()


# --- mixes, settings, coupling ---


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


@pytest.mark.parametrize("name", ["simpo", "orpo", "sft"])
def test_losses_without_a_reference_ignore_it(name: str) -> None:
    pairs = make_pairs()
    nothing = torch.full_like(pairs.policy_chosen, math.nan)
    without = pairs._replace(reference_chosen=nothing, reference_rejected=nothing)
    loss = build_loss({"name": name})
    torch.testing.assert_close(loss(without), loss(pairs), rtol=0, atol=0)


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
    coupled = couple(loss, step)
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    total = torch.zeros((), dtype=torch.float64)
    gradient = torch.zeros(len(POLICY_FIELDS), 6, dtype=torch.float64)
    for indices in order.split(split):
        microbatch = with_gradient(
            PairLogProbs(*(tensor[indices] if tensor.ndim else tensor for tensor in step))
        )
        values = coupled(microbatch, indices)
        torch.testing.assert_close(values, whole[indices])
        total += values.detach().sum()
        gradient[:, indices] = policy_gradient(values, microbatch)
    torch.testing.assert_close(total, whole.detach().sum())
    torch.testing.assert_close(gradient, policy_gradient(whole, step))


def test_a_coupled_loss_differs_from_its_microbatches_taken_alone() -> None:
    loss, step = build_loss({"name": "aot"}), make_pairs(count=32)
    alone = [loss(PairLogProbs(*(t[i::2] if t.ndim else t for t in step))).sum() for i in (0, 1)]
    assert abs(sum(alone) - loss(step).sum()) > 1e-3


def test_couple_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        coupled = couple(build_loss({"name": "aot"}), make_pairs())
    assert not coupled.values.requires_grad and coupled.gradients["policy_chosen"].any()


# --- what a user can get wrong ---


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "loss.name: missing; expected one of sigmoid, robust, "),
        ({"name": "sigmiod"}, "loss.name: unknown loss 'sigmiod' (did you mean 'sigmoid'?)"),
        ({"name": "dpo"}, "loss.name: unknown loss 'dpo' (did you mean 'sigmoid'?)"),
        ({"name": 3}, "loss.name: unknown loss 3; expected one of sigmoid, "),
        (
            {"name": "ipo", "label_smoothing": 0.1},
            "loss.label_smoothing: not used by loss 'ipo', which takes beta, average",
        ),
        (
            {"name": "sft", "beta": 0.1},
            "loss.beta: not used by loss 'sft', which takes no options",
        ),
        (
            {"name": "ipo", "averge": True},
            "loss.averge: unknown option (did you mean 'average'?); loss 'ipo' takes beta, average",
        ),
        ({"name": "ipo", "average": 1}, "loss.average: expected true or false, found 1"),
        ({"name": "sigmoid", "beta": "0.1"}, "loss.beta: expected a finite number, found '0.1'"),
        ({"name": "sigmoid", "beta": True}, "loss.beta: expected a finite number, found True"),
        ({"name": "sigmoid", "beta": math.inf}, "loss.beta: expected a finite number, found inf"),
        ({"name": "sigmoid", "beta": 0}, "loss.beta: expected a number greater than 0, found 0"),
        (
            {"name": "sigmoid", "label_smoothing": 0.5},
            "loss.label_smoothing: expected a number at least 0 and below 0.5, found 0.5",
        ),
        (
            {"name": "exo_pair", "label_smoothing": 0},
            "loss.label_smoothing: expected a number above 0 and below 0.5, found 0",
        ),
        (
            {"name": "f_dpo", "divergence": "reverse_kl"},
            "loss.divergence: expected one of 'forward_kl', 'jensen_shannon', 'alpha', "
            "found 'reverse_kl'",
        ),
        (
            {"name": "f_dpo", "alpha": 0.5},
            "loss.alpha: acts only with divergence 'alpha', and loss.divergence is 'forward_kl'",
        ),
        ({"mix": []}, "loss.mix: expected a non-empty list of losses, found []"),
        ({"mix": ["sft"]}, "loss.mix.0: expected an object with name and weight, found 'sft'"),
        ({"mix": [{"name": "sft"}]}, "loss.mix.0.weight: missing"),
        (
            {"mix": [{"name": "sft", "weight": 0}]},
            "loss.mix.0.weight: expected a number greater than 0, found 0",
        ),
        (
            {"mix": [{"name": "sft", "weight": 1}, {"name": "simp", "weight": 1}]},
            "loss.mix.1.name: unknown loss 'simp' (did you mean 'simpo'?)",
        ),
        (
            {"mix": [{"name": "ipo", "weight": 1, "gamma": 1}]},
            "loss.mix.0.gamma: not used by loss 'ipo', which takes beta, average",
        ),
        (
            {"mix": [{"name": "sft", "weight": 1}], "beta": 0.1},
            "loss.beta: has no effect beside loss.mix",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_named(section: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        build_loss(section)
    assert str(error.value).startswith(message)
