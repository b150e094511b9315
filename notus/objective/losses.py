"""Every pairwise preference loss, each a pure function of log-probabilities, in one table.

To add a loss, write one function below and put `@register()` on it; nothing else changes. Its name
is what `loss.name` selects, its keyword-only parameters are the options that `loss` accepts, and
their annotations and defaults are what the configuration is checked against:

    @register()
    def my_loss(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
        return -F.logsigmoid(beta * _margin(pairs))

A loss returns one value per pair ([B], in the dtype of its input). The training loop sums them
over the optimiser step and divides once by the number of pairs in that step.

Notation in the docstrings: l_w and l_l are the policy's log-probabilities of the chosen and the
rejected response; r_w and r_l are those minus the reference's (log-ratios); D = r_w - r_l is the
margin; mean(x) is x divided by the response's tokens; e is label_smoothing; s is the logistic
function. All logarithms are natural, so log-probabilities are in nats. "At D = 0" is the value
where policy and reference agree on every response, which is what a fresh run starts from.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import torch
import torch.nn.functional as F
from torch import Tensor

from notus.errors import UserError


class PairLogProbs(NamedTuple):
    """What a pairwise loss may look at: float tensors of shape [B], one entry per pair.

    Log-probabilities are sums over a response's tokens, in nats. The `_shared` fields sum over the
    first min(chosen_length, rejected_length) response tokens only. Gradients flow through the four
    `policy_` fields. `mean_chosen_length` is 0-d: chosen tokens per pair over the whole optimiser
    step, so that a token average does not depend on how the step is split. The weights are
    exp(mean over tokens of (log pi(token) - log sum over the vocabulary of pi^2)), without
    gradient, and None unless the loss `uses_weights`.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    policy_chosen_shared: Tensor
    policy_rejected_shared: Tensor
    reference_chosen_shared: Tensor
    reference_rejected_shared: Tensor
    mean_chosen_length: Tensor
    chosen_weight: Tensor | None = None
    rejected_weight: Tensor | None = None


POLICY_FIELDS = (
    "policy_chosen",
    "policy_rejected",
    "policy_chosen_shared",
    "policy_rejected_shared",
)


# --- the table, and the kinds of number an option can be ---


class LossEntry(NamedTuple):
    """A loss function and what the training loop has to provide for it."""

    function: Callable[..., Tensor]
    uses_reference: bool
    uses_rejected: bool
    uses_weights: bool
    couples_pairs: bool
    option_needs: Mapping[str, tuple[str, str]]


LOSSES: dict[str, LossEntry] = {}


def register(
    *,
    uses_reference: bool = True,
    uses_rejected: bool = True,
    uses_weights: bool = False,
    couples_pairs: bool = False,
    option_needs: Mapping[str, tuple[str, str]] | None = None,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enter the decorated loss into LOSSES under its own name.

    uses_reference: it reads the reference's log-probabilities.
    uses_rejected: it reads the rejected response's.
    uses_weights: it needs `chosen_weight` and `rejected_weight`.
    couples_pairs: a pair's value depends on the other pairs of the step; see `couple`.
    option_needs: {option: (other, value)} for an option that acts only while `other` is `value`.
    """

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LOSSES[function.__name__] = LossEntry(
            function,
            uses_reference,
            uses_rejected,
            uses_weights,
            couples_pairs,
            option_needs or {},
        )
        return function

    return enter


@dataclass(frozen=True)
class Range:
    """The numbers an option accepts, with the words an error message uses for them."""

    words: str
    contains: Callable[[float], bool]


Positive = Annotated[float, Range("greater than 0", lambda x: x > 0)]
NonNegative = Annotated[float, Range("at least 0", lambda x: x >= 0)]
Fraction = Annotated[float, Range("between 0 and 1", lambda x: 0 <= x <= 1)]
FractionBelowOne = Annotated[float, Range("at least 0 and below 1", lambda x: 0 <= x < 1)]
PositiveFraction = Annotated[float, Range("above 0 and at most 1", lambda x: 0 < x <= 1)]
Smoothing = Annotated[float, Range("at least 0 and below 0.5", lambda x: 0 <= x < 0.5)]
PositiveSmoothing = Annotated[float, Range("above 0 and below 0.5", lambda x: 0 < x < 0.5)]
Divergence = Literal["forward_kl", "jensen_shannon", "alpha"]


# --- shared pieces ---


def _log_ratios(pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """(r_w, r_l), each [B]: log pi / pi_ref of the chosen and of the rejected response."""
    return (
        pairs.policy_chosen - pairs.reference_chosen,
        pairs.policy_rejected - pairs.reference_rejected,
    )


def _margin(pairs: PairLogProbs) -> Tensor:
    """D = r_w - r_l, [B]."""
    chosen, rejected = _log_ratios(pairs)
    return chosen - rejected


def _mean_margin(pairs: PairLogProbs) -> Tensor:
    """mean(r_w) - mean(r_l), [B]: each log-ratio per token of its own response."""
    chosen, rejected = _log_ratios(pairs)
    return chosen / pairs.chosen_length - rejected / pairs.rejected_length


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of logits [B] against the label 1 - label_smoothing."""
    clean = -(1 - label_smoothing) * F.logsigmoid(logits)
    return clean - label_smoothing * F.logsigmoid(-logits)


def _log_odds(mean_log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = exp(mean_log_prob), [B].

    The odds are infinite at p = 1, so 1 - p is taken as at least 1e-6 (no gradient beyond).
    """
    return mean_log_prob - torch.log(-torch.expm1(mean_log_prob.clamp(max=-1e-6)))


def _expm1_tangent(x: Tensor, limit: float = 40.0) -> Tensor:
    """exp(x) - 1 up to x = limit and its tangent line there beyond, [B].

    A response that the policy has dropped has a ratio that no float holds. The line keeps value and
    gradient finite and pointing the right way, where a clamp would end the gradient.
    """
    return torch.expm1(x.clamp(max=limit)) + math.exp(limit) * (x - limit).clamp(min=0)


def _same_rank(values: Tensor, others: Tensor) -> Tensor:
    """For each of values [B], the entry of others [B] that has the same rank in ascending order."""
    rank = values.argsort(stable=True).argsort()
    return others.sort(stable=True).values[rank]


# --- the losses ---


@register()
def sigmoid(
    pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> Tensor:
    """DPO: -(1 - e) log s(beta D) - e log s(-beta D), [B].

    arXiv 2305.18290 eq. 7 for e = 0; e > 0 is conservative DPO (ericmitchell.ai/cdpo.pdf), whose
    minimum is at beta D = log((1 - e) / e). At D = 0: ln 2.
    """
    return _smoothed(beta * _margin(pairs), label_smoothing)


@register()
def robust(
    pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1
) -> Tensor:
    """Robust DPO: [-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2e), [B].

    arXiv 2403.00409: the unbiased estimate of the clean loss where a share e of labels is flipped.
    Unbounded below for e > 0; e = 0 is `sigmoid`. At D = 0: ln 2.
    """
    logits = beta * _margin(pairs)
    clean = -(1 - label_smoothing) * F.logsigmoid(logits)
    return (clean + label_smoothing * F.logsigmoid(-logits)) / (1 - 2 * label_smoothing)


@register()
def ipo(pairs: PairLogProbs, *, beta: Positive = 0.1, average: bool = True) -> Tensor:
    """IPO: (mean(r_w) - mean(r_l) - 1 / (2 beta))^2, [B].

    arXiv 2310.12036 eq. 17, whose tau is beta here. average = false takes D, the sums, as the
    paper writes it; the averages are what its authors say they used. At D = 0: 1 / (4 beta^2).
    """
    margin = _mean_margin(pairs) if average else _margin(pairs)
    return (margin - 1 / (2 * beta)) ** 2


@register()
def hinge(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """max(0, 1 - beta D), [B].

    SLiC (arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657). At D = 0: 1.
    """
    return torch.relu(1 - beta * _margin(pairs))


@register()
def sigmoid_norm(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """Length-normalised DPO: -log s(beta (mean(r_w) - mean(r_l))), [B].

    Tulu 3, arXiv 2411.15124 eq. 6, which uses beta = 5: a mean is some hundred times smaller than
    a sum. At D = 0: ln 2.
    """
    return -F.logsigmoid(beta * _mean_margin(pairs))


@register(uses_reference=False)
def simpo(pairs: PairLogProbs, *, beta: Positive = 0.1, gamma: NonNegative = 0.5) -> Tensor:
    """SimPO: -log s(beta (mean(l_w) - mean(l_l)) - gamma), [B]; no reference.

    arXiv 2405.14734 eq. 6. gamma is the target margin itself: beta times the `gamma_beta_ratio`
    that other trainers ask for. The paper uses beta of 2 and above; 0.1 is only this table's
    common default. Where mean(l_w) = mean(l_l): ln(1 + exp(gamma)).
    """
    chosen = pairs.policy_chosen / pairs.chosen_length
    rejected = pairs.policy_rejected / pairs.rejected_length
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@register(uses_reference=False)
def orpo(pairs: PairLogProbs, *, odds_weight: NonNegative = 0.1) -> Tensor:
    """ORPO: -mean(l_w) - odds_weight log s(log odds_w - log odds_l), [B]; no reference.

    arXiv 2403.07691 eq. 6 and 7; odds = p / (1 - p) with p = exp(mean(l)), and odds_weight is the
    paper's lambda. Where mean(l_w) = mean(l_l): -mean(l_w) + odds_weight ln 2.
    """
    chosen = pairs.policy_chosen / pairs.chosen_length
    rejected = pairs.policy_rejected / pairs.rejected_length
    return -chosen - odds_weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


@register(uses_reference=False, uses_rejected=False)
def sft(pairs: PairLogProbs) -> Tensor:
    """Negative log-likelihood of the chosen response: -l_w / mean_chosen_length, [B]; no reference.

    The mean over a step's pairs is the mean over its chosen tokens, in nats per token: a long
    response counts for more than a short one. For an average within each response, see `rpo`.
    """
    return -pairs.policy_chosen / pairs.mean_chosen_length


@register()
def rpo(pairs: PairLogProbs, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Tensor:
    """DPO with a likelihood term: -log s(beta D) - alpha mean(l_w), [B].

    Iterative RPO, arXiv 2404.19733 eq. 1, up to which term carries the factor: the paper's alpha
    multiplies the DPO term; here, as in other trainers, the likelihood. At D = 0:
    ln 2 - alpha mean(l_w).
    """
    likelihood = pairs.policy_chosen / pairs.chosen_length
    return -F.logsigmoid(beta * _margin(pairs)) - alpha * likelihood


@register()
def dpop(pairs: PairLogProbs, *, beta: Positive = 0.1, penalty: NonNegative = 50.0) -> Tensor:
    """DPO-Positive: -log s(beta (D - penalty max(0, -r_w))), [B].

    Smaug, arXiv 2402.13228; penalty is the paper's lambda. It acts on pairs whose chosen
    response has become less likely than under the reference. At D = 0: ln 2.
    """
    chosen, rejected = _log_ratios(pairs)
    return -F.logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))


@register()
def apo_zero(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """APO-zero: (1 - s(beta r_w)) + s(beta r_l), [B].

    arXiv 2408.06266 eq. 7: raises the chosen and lowers the rejected response, for chosen responses
    that are better than the policy's own. At D = 0: 1.
    """
    chosen, rejected = _log_ratios(pairs)
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


@register()
def apo_down(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """APO-down: s(beta r_w) + (1 - s(beta D)), [B].

    arXiv 2408.06266 eq. 8: lowers both responses, the rejected one more, for chosen responses that
    are worse than the policy's own. At D = 0: 1.
    """
    chosen, rejected = _log_ratios(pairs)
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


@register()
def bco_pair(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """BCO on pairs: -log s(beta r_w) - log s(-beta r_l), [B].

    arXiv 2404.04656, without the running-mean reward shift of the paper. At D = 0: 2 ln 2.
    """
    chosen, rejected = _log_ratios(pairs)
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


@register()
def nca_pair(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """NCA on pairs: -log s(beta r_w) - 1/2 log s(-beta r_w) - 1/2 log s(-beta r_l), [B].

    arXiv 2402.05369: pushes the chosen response's absolute likelihood up, not only the margin.
    At D = 0: 2 ln 2.
    """
    chosen, rejected = _log_ratios(pairs)
    noise = F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)
    return -F.logsigmoid(beta * chosen) - 0.5 * noise


@register()
def exo_pair(
    pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: PositiveSmoothing = 1e-3
) -> Tensor:
    """EXO on pairs: q_w (log q_w - log(1 - e)) + q_l (log q_l - log e), [B].

    arXiv 2402.00856 eq. 16 with q_w = s(beta D), q_l = 1 - q_w: the reverse KL divergence from the
    smoothed labels, hence e > 0 (the paper's 1e-3 is the default). At D = 0:
    -ln 2 - ln(e (1 - e)) / 2.
    """
    logits = beta * _margin(pairs)
    chosen = F.logsigmoid(logits) - math.log1p(-label_smoothing)
    rejected = F.logsigmoid(-logits) - math.log(label_smoothing)
    return torch.sigmoid(logits) * chosen + torch.sigmoid(-logits) * rejected


@register()
def sppo_hard(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """SPPO with hard labels: (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, [B].

    arXiv 2405.00675 eq. 4.7 with win probabilities 1 and 0. At D = 0: 1 / (2 beta^2).
    """
    chosen, rejected = _log_ratios(pairs)
    target = 1 / (2 * beta)
    return (chosen - target) ** 2 + (rejected + target) ** 2


@register(couples_pairs=True)
def aot(pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """AOT: `sigmoid` of the sorted policy margins against the sorted reference margins, [B].

    arXiv 2406.05882, paired form: the k-th smallest l_w - l_l of the step is compared with the
    k-th smallest of the reference. A value belongs to the pair whose policy margin it compares.
    At D = 0: ln 2.
    """
    policy = pairs.policy_chosen - pairs.policy_rejected
    reference = pairs.reference_chosen - pairs.reference_rejected
    return _smoothed(beta * (policy - _same_rank(policy, reference)), label_smoothing)


@register(couples_pairs=True)
def aot_unpaired(
    pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> Tensor:
    """AOT without pairs: `sigmoid` of the sorted r_w against the sorted r_l, [B].

    arXiv 2406.05882, unpaired form: the k-th smallest r_w of the step is compared with the k-th
    smallest r_l. A value belongs to the pair whose r_w it compares. At D = 0: ln 2.
    """
    chosen, rejected = _log_ratios(pairs)
    return _smoothed(beta * (chosen - _same_rank(chosen, rejected)), label_smoothing)


@register()
def discopop(
    pairs: PairLogProbs, *, beta: Positive = 0.1, temperature: PositiveFraction = 0.05
) -> Tensor:
    """DiscoPOP: (1 - m) (-log s(beta D)) + m exp(-beta D) with m = s(beta D / temperature), [B].

    arXiv 2406.08414 eq. 5, whose tau is temperature. At most 1, where m decays at least as fast as
    the exponential grows. At D = 0: (ln 2 + 1) / 2.
    """
    logits = beta * _margin(pairs)
    logistic = -torch.sigmoid(-logits / temperature) * F.logsigmoid(logits)
    # m and exp(-beta D) as one exponential: apart, a very negative margin is 0 times infinity.
    exponential = torch.exp(F.logsigmoid(logits / temperature) - logits)
    return logistic + exponential


@register(uses_weights=True)
def wpo(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """WPO: -w_w w_l log s(beta D), [B].

    arXiv 2406.11827 eq. 2 with the paper's alignment of weights (see PairLogProbs): pairs that the
    policy would itself produce count for more. At D = 0: w_w w_l ln 2.
    """
    assert pairs.chosen_weight is not None and pairs.rejected_weight is not None
    weight = pairs.chosen_weight * pairs.rejected_weight
    return -weight * F.logsigmoid(beta * _margin(pairs))


@register()
def ld_dpo(pairs: PairLogProbs, *, beta: Positive = 0.1, alpha: Fraction = 0.5) -> Tensor:
    """LD-DPO: `sigmoid` where tokens beyond the shorter response's length count alpha, [B].

    arXiv 2409.06411, applied to policy and reference alike: l becomes
    sum(first L tokens) + alpha sum(the rest), L the shorter length. alpha = 1 is `sigmoid`,
    alpha = 0 cuts the longer response off. At D = 0: ln 2.
    """
    chosen, rejected = _log_ratios(pairs)
    chosen_shared = pairs.policy_chosen_shared - pairs.reference_chosen_shared
    rejected_shared = pairs.policy_rejected_shared - pairs.reference_rejected_shared
    chosen = chosen_shared + alpha * (chosen - chosen_shared)
    rejected = rejected_shared + alpha * (rejected - rejected_shared)
    return -F.logsigmoid(beta * (chosen - rejected))


@register(option_needs={"alpha": ("divergence", "alpha")})
def f_dpo(
    pairs: PairLogProbs,
    *,
    beta: Positive = 0.1,
    divergence: Divergence = "forward_kl",
    alpha: FractionBelowOne = 0.5,
) -> Tensor:
    """f-DPO: -log s(beta (f'(exp(r_w)) - f'(exp(r_l)))), [B].

    arXiv 2309.16240; with r the log-ratio, f' is 1 - exp(-r) for "forward_kl",
    ln 2 + log s(r) for "jensen_shannon" and (exp((alpha - 1) r) - 1) / (alpha - 1) for "alpha",
    where alpha = 0 is the forward KL divergence and alpha -> 1 the reverse one, which is `sigmoid`.
    The paper's alpha is 1 - alpha. Exponents above 40 follow the tangent. At D = 0: ln 2.
    """
    chosen, rejected = _log_ratios(pairs)
    if divergence == "jensen_shannon":
        return -F.logsigmoid(beta * (F.logsigmoid(chosen) - F.logsigmoid(rejected)))
    power = alpha - 1 if divergence == "alpha" else -1.0
    difference = _expm1_tangent(power * chosen) - _expm1_tangent(power * rejected)
    return -F.logsigmoid(beta * difference / power)


# --- a configured loss ---


@dataclass(frozen=True)
class Term:
    """One loss of the table with its weight and all its options resolved."""

    name: str
    weight: float
    options: dict[str, Any]


@dataclass(frozen=True)
class Loss:
    """A weighted sum of losses: pairs -> [B]."""

    terms: tuple[Term, ...]

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        values = (t.weight * LOSSES[t.name].function(pairs, **t.options) for t in self.terms)
        return torch.stack(list(values)).sum(dim=0)

    @property
    def uses_reference(self) -> bool:
        return any(LOSSES[term.name].uses_reference for term in self.terms)

    @property
    def uses_rejected(self) -> bool:
        return any(LOSSES[term.name].uses_rejected for term in self.terms)

    @property
    def uses_weights(self) -> bool:
        return any(LOSSES[term.name].uses_weights for term in self.terms)

    @property
    def couples_pairs(self) -> bool:
        return any(LOSSES[term.name].couples_pairs for term in self.terms)

    @property
    def beta(self) -> float:
        """What reward metrics multiply log-ratios by: the first term's beta that there is, or 1."""
        return next((term.options["beta"] for term in self.terms if "beta" in term.options), 1.0)

    @property
    def name(self) -> str:
        """For logs: "sigmoid", or "1 sigmoid + 0.2 sft"."""
        if self._is_single:
            return self.terms[0].name
        return " + ".join(f"{term.weight:g} {term.name}" for term in self.terms)

    @property
    def settings(self) -> dict[str, Any]:
        """The `loss` section with every default filled in: build_loss(settings) == this loss."""
        if self._is_single:
            return {"name": self.terms[0].name, **self.terms[0].options}
        return {"mix": [{"name": t.name, "weight": t.weight, **t.options} for t in self.terms]}

    @property
    def _is_single(self) -> bool:
        return len(self.terms) == 1 and self.terms[0].weight == 1.0


@dataclass(frozen=True)
class Coupled:
    """A loss that couples pairs, evaluated once over a step's N pairs; made by `couple`.

    values: [N], each pair's share of the loss. gradients: per policy field, [N], the derivative of
    the step's summed loss.
    """

    values: Tensor
    gradients: dict[str, Tensor]

    def __call__(self, pairs: PairLogProbs, indices: Tensor) -> Tensor:
        """Per-pair values [B] of a microbatch; indices [B] (int64) say which pairs of the step.

        Their sum over any split of the step has the value and the gradient of the whole.
        """
        loss = self.values[indices]
        for name, gradient in self.gradients.items():
            log_probs = getattr(pairs, name)
            loss = loss + gradient[indices] * (log_probs - log_probs.detach())
        return loss


def couple(loss: Loss, pairs_of_step: PairLogProbs) -> Coupled:
    """Evaluate a loss that couples pairs over the whole optimiser step, for use by microbatch.

    pairs_of_step holds all N pairs of the step, of every rank, in an order known to the caller; it
    needs no gradient, so a forward pass without one provides it.
    """
    policy = {name: getattr(pairs_of_step, name).detach() for name in POLICY_FIELDS}
    with torch.enable_grad():
        for log_probs in policy.values():
            log_probs.requires_grad_()
        values = loss(pairs_of_step._replace(**policy))
        gradients = torch.autograd.grad(
            values.sum(), list(policy.values()), allow_unused=True, materialize_grads=True
        )
    return Coupled(values.detach(), dict(zip(policy, gradients, strict=True)))


# --- from the configuration ---

# What other trainers and papers call a loss; a guess by spelling would turn "dpo" into "dpop".
OTHER_NAMES = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "slic": "hinge",
    "rso": "hinge",
    "nll": "sft",
}


def build_loss(section: Mapping[str, Any]) -> Loss:
    """The configuration's `loss` section as a callable.

    section: {"name": ..., **options}, or {"mix": [{"name", "weight", **options}, ...]}.
    Raises UserError, beginning with the dotted key at fault, for an unknown loss, an option that
    the loss does not take or that has no effect, a value of the wrong type or out of range.
    """
    if "mix" not in section:
        return Loss((_term(section, 1.0, "loss"),))
    mix = section["mix"]
    for key in section.keys() - {"mix"}:
        raise UserError(f"loss.{key}: has no effect beside loss.mix; give it inside a term of mix")
    if not isinstance(mix, list | tuple) or not mix:
        raise UserError(f"loss.mix: expected a non-empty list of losses, found {mix!r}")
    return Loss(tuple(_weighted_term(term, f"loss.mix.{i}") for i, term in enumerate(mix)))


def _weighted_term(section: Any, where: str) -> Term:
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: expected an object with name and weight, found {section!r}")
    if "weight" not in section:
        raise UserError(f"{where}.weight: missing; every loss of a mix needs a weight")
    options = {key: value for key, value in section.items() if key != "weight"}
    return _term(options, _checked(section["weight"], Positive, f"{where}.weight"), where)


def _term(section: Mapping[str, Any], weight: float, where: str) -> Term:
    if "name" not in section:
        raise UserError(f"{where}.name: missing; expected one of {', '.join(LOSSES)}")
    name = section["name"]
    if not isinstance(name, str) or name not in LOSSES:
        hint = _did_you_mean(OTHER_NAMES.get(name, name), LOSSES) if isinstance(name, str) else ""
        raise UserError(
            f"{where}.name: unknown loss {name!r}{hint}; expected one of {', '.join(LOSSES)}"
        )
    given = {key: value for key, value in section.items() if key != "name"}
    return Term(name, weight, _resolve_options(name, given, where))


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """A loss's options: the keyword-only parameters of its function."""
    parameters = inspect.signature(LOSSES[name].function).parameters
    return {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _resolve_options(name: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """All options of a loss, given or default; without those that have no effect."""
    parameters = _parameters(name)
    for key in given:
        if key not in parameters:
            raise UserError(f"{where}.{key}: {_misplaced(key, name)}")
    options = {
        key: _checked(given[key], p.annotation, f"{where}.{key}") if key in given else p.default
        for key, p in parameters.items()
    }
    for key, (other, needed) in LOSSES[name].option_needs.items():
        if options[other] == needed:
            continue
        if key in given:
            raise UserError(
                f"{where}.{key}: acts only with {other} {needed!r}, and {where}.{other} is "
                f"{options[other]!r}"
            )
        del options[key]
    return options


def _misplaced(key: str, name: str) -> str:
    parameters = _parameters(name)
    takes = f"takes {', '.join(parameters)}" if parameters else "takes no options"
    if any(key in _parameters(other) for other in LOSSES):
        return f"not used by loss {name!r}, which {takes}"
    return f"unknown option{_did_you_mean(key, parameters)}; loss {name!r} {takes}"


def _did_you_mean(word: str, known: Mapping[str, Any]) -> str:
    nearest = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _checked(value: Any, annotation: Any, where: str) -> Any:
    """value as the option's annotated type: bool, a choice of strings, or a number in a range."""
    if annotation is bool:
        if not isinstance(value, bool):
            raise UserError(f"{where}: expected true or false, found {value!r}")
        return value
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        if value not in choices:
            expected = ", ".join(repr(choice) for choice in choices)
            raise UserError(f"{where}: expected one of {expected}, found {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, found {value!r}")
    for limit in getattr(annotation, "__metadata__", ()):
        if not limit.contains(value):
            raise UserError(f"{where}: expected a number {limit.words}, found {value!r}")
    return float(value)
