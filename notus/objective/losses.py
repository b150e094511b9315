"""Every pairwise preference loss, each a pure function of log-probabilities.

To add a loss, write one function below and put `@register()` on it; nothing else changes. Its name
becomes a `loss.name` of the configuration and its keyword-only parameters become keys of `loss`,
checked against their annotations:

    @register()
    def my_loss(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
        return -F.logsigmoid(beta * margin(pairs))

A loss returns one value per pair ([B], in the dtype of its input). The training loop sums them
over the optimiser step and divides once by the number of pairs in that step.

Notation in the docstrings: l_w and l_l are the policy's log-probabilities of the chosen and the
rejected response; r_w and r_l are those minus the reference's (log-ratios); D = r_w - r_l is the
margin; mean(x) is x divided by the response's tokens; e is label_smoothing; s is the logistic
function. All logarithms are natural, so log-probabilities are in nats. "At D = 0" is the value
where policy and reference agree on every response, as they do when a run starts.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from notus.strict import (
    Fraction,
    FractionBelowOne,
    NonNegative,
    Positive,
    PositiveFraction,
    PositiveSmoothing,
    Smoothing,
)


class Sums(NamedTuple):
    """One model's log-probabilities of B pairs, in nats: four float tensors [B].

    Each is a sum over a response's tokens; the `_shared` ones sum over the first
    min(chosen_length, rejected_length) tokens only.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_shared: Tensor
    rejected_shared: Tensor


class PairLogProbs(NamedTuple):
    """The input of a loss: B pairs under both models. Tensors are float [B] unless noted."""

    policy: Sums  # with gradient
    reference: Sums  # without; zeros if there is none
    chosen_length: Tensor  # tokens of the response
    rejected_length: Tensor
    # 0-d, per pair over the complete optimiser step: a token average must not depend on its split
    mean_chosen_length: Tensor
    # exp(mean over tokens of (log pi(token) - log sum over the vocabulary of pi^2)), without
    # gradient; None unless the loss `uses_weights`
    chosen_weight: Tensor | None = None
    rejected_weight: Tensor | None = None


class LossEntry(NamedTuple):
    """A loss and its needs; `register` takes the fields after the first as keywords."""

    function: Callable[..., Tensor]
    uses_reference: bool = True  # it reads the reference's log-probabilities
    uses_rejected: bool = True  # it reads the rejected response's
    uses_weights: bool = False  # it reads `chosen_weight` and `rejected_weight`
    couples_pairs: bool = False  # a value depends on the step's other pairs, see `loss.couple`
    # {option: (other, value)} for an option that acts only while `other` is `value`
    option_needs: Mapping[str, tuple[str, str]] = {}


LOSSES: dict[str, LossEntry] = {}


def register(**needs: Any) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Enter the decorated loss into LOSSES under its own name; needs: fields of LossEntry."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LOSSES[function.__name__] = LossEntry(function, **needs)
        return function

    return enter


# --- shared pieces ---


def log_ratios(pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """(r_w, r_l), each [B]: log pi / pi_ref of the chosen and of the rejected response."""
    policy, reference = pairs.policy, pairs.reference
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def margin(pairs: PairLogProbs) -> Tensor:
    """D = r_w - r_l, [B]."""
    chosen, rejected = log_ratios(pairs)
    return chosen - rejected


def mean_margin(pairs: PairLogProbs) -> Tensor:
    """mean(r_w) - mean(r_l), [B]: each log-ratio per token of its own response."""
    chosen, rejected = log_ratios(pairs)
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

    A dropped response's ratio overflows a float. The tangent has a gradient, a clamp would not.
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
    return _smoothed(beta * margin(pairs), label_smoothing)


@register()
def robust(
    pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.1
) -> Tensor:
    """Robust DPO: [-(1 - e) log s(beta D) + e log s(-beta D)] / (1 - 2e), [B].

    arXiv 2403.00409: the unbiased estimate of the clean loss where a share e of labels is flipped.
    Unbounded below for e > 0; e = 0 is `sigmoid`. At D = 0: ln 2.
    """
    logits = beta * margin(pairs)
    clean = -(1 - label_smoothing) * F.logsigmoid(logits)
    return (clean + label_smoothing * F.logsigmoid(-logits)) / (1 - 2 * label_smoothing)


@register()
def ipo(pairs: PairLogProbs, *, beta: Positive = 0.1, average: bool = True) -> Tensor:
    """IPO: (mean(r_w) - mean(r_l) - 1 / (2 beta))^2, [B].

    arXiv 2310.12036 eq. 17, whose tau is beta here. average = false takes D, as in the paper; its
    authors say that they used the averages. At D = 0: 1 / (4 beta^2).
    """
    difference = mean_margin(pairs) if average else margin(pairs)
    return (difference - 1 / (2 * beta)) ** 2


@register()
def hinge(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """max(0, 1 - beta D), [B].

    SLiC (arXiv 2305.10425) on log-ratios, as in RSO (arXiv 2309.06657). At D = 0: 1.
    """
    return torch.relu(1 - beta * margin(pairs))


@register()
def sigmoid_norm(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """Length-normalised DPO: -log s(beta (mean(r_w) - mean(r_l))), [B].

    Tulu 3, arXiv 2411.15124 eq. 6, with beta = 5, as a mean is small. At D = 0: ln 2.
    """
    return -F.logsigmoid(beta * mean_margin(pairs))


@register(uses_reference=False)
def simpo(pairs: PairLogProbs, *, beta: Positive = 0.1, gamma: NonNegative = 0.5) -> Tensor:
    """SimPO: -log s(beta (mean(l_w) - mean(l_l)) - gamma), [B]; no reference.

    arXiv 2405.14734 eq. 6, with beta of 2 and above. gamma is the target margin itself: beta times
    other trainers' `gamma_beta_ratio`. Where mean(l_w) = mean(l_l): ln(1 + exp(gamma)).
    """
    chosen = pairs.policy.chosen / pairs.chosen_length
    rejected = pairs.policy.rejected / pairs.rejected_length
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


@register(uses_reference=False)
def orpo(pairs: PairLogProbs, *, odds_weight: NonNegative = 0.1) -> Tensor:
    """ORPO: -mean(l_w) - odds_weight log s(log odds_w - log odds_l), [B]; no reference.

    arXiv 2403.07691 eq. 6 and 7; odds = p / (1 - p) with p = exp(mean(l)), and odds_weight is the
    paper's lambda. Where mean(l_w) = mean(l_l): -mean(l_w) + odds_weight ln 2.
    """
    chosen = pairs.policy.chosen / pairs.chosen_length
    rejected = pairs.policy.rejected / pairs.rejected_length
    return -chosen - odds_weight * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


@register(uses_reference=False, uses_rejected=False)
def sft(pairs: PairLogProbs) -> Tensor:
    """Negative log-likelihood of the chosen response: -l_w / mean_chosen_length, [B]; no reference.

    The mean over a step's pairs is the mean over its chosen tokens, in nats per token: a long
    response counts for more than a short one. `rpo` averages within each response instead.
    """
    return -pairs.policy.chosen / pairs.mean_chosen_length


@register()
def rpo(pairs: PairLogProbs, *, beta: Positive = 0.1, alpha: NonNegative = 1.0) -> Tensor:
    """DPO with a likelihood term: -log s(beta D) - alpha mean(l_w), [B].

    Iterative RPO, arXiv 2404.19733 eq. 1, whose alpha multiplies the DPO term; here, as in other
    trainers, the likelihood. At D = 0: ln 2 - alpha mean(l_w).
    """
    likelihood = pairs.policy.chosen / pairs.chosen_length
    return -F.logsigmoid(beta * margin(pairs)) - alpha * likelihood


@register()
def dpop(pairs: PairLogProbs, *, beta: Positive = 0.1, penalty: NonNegative = 50.0) -> Tensor:
    """DPO-Positive: -log s(beta (D - penalty max(0, -r_w))), [B].

    Smaug, arXiv 2402.13228; penalty is the paper's lambda. It acts on pairs whose chosen response
    is less likely than under the reference. At D = 0: ln 2.
    """
    chosen, rejected = log_ratios(pairs)
    return -F.logsigmoid(beta * (chosen - rejected - penalty * torch.relu(-chosen)))


@register()
def apo_zero(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """APO-zero: (1 - s(beta r_w)) + s(beta r_l), [B].

    arXiv 2408.06266 eq. 7: raises the chosen and lowers the rejected response, for chosen responses
    that are better than the policy's own. At D = 0: 1.
    """
    chosen, rejected = log_ratios(pairs)
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


@register()
def apo_down(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """APO-down: s(beta r_w) + (1 - s(beta D)), [B].

    arXiv 2408.06266 eq. 8: lowers both responses, the rejected one more, for chosen responses that
    are worse than the policy's own. At D = 0: 1.
    """
    chosen, rejected = log_ratios(pairs)
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


@register()
def bco_pair(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """BCO on pairs: -log s(beta r_w) - log s(-beta r_l), [B].

    arXiv 2404.04656, without the running-mean reward shift of the paper. At D = 0: 2 ln 2.
    """
    chosen, rejected = log_ratios(pairs)
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)


@register()
def nca_pair(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """NCA on pairs: -log s(beta r_w) - 1/2 log s(-beta r_w) - 1/2 log s(-beta r_l), [B].

    arXiv 2402.05369: pushes the chosen response's absolute likelihood up, not only the margin.
    At D = 0: 2 ln 2.
    """
    chosen, rejected = log_ratios(pairs)
    noise = F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)
    return -F.logsigmoid(beta * chosen) - 0.5 * noise


@register()
def exo_pair(
    pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: PositiveSmoothing = 1e-3
) -> Tensor:
    """EXO on pairs: q_w (log q_w - log(1 - e)) + q_l (log q_l - log e), [B].

    arXiv 2402.00856 eq. 16 with q_w = s(beta D), q_l = 1 - q_w: the reverse KL divergence from the
    smoothed labels, hence e > 0. At D = 0: -ln 2 - ln(e (1 - e)) / 2.
    """
    logits = beta * margin(pairs)
    chosen = F.logsigmoid(logits) - math.log1p(-label_smoothing)
    rejected = F.logsigmoid(-logits) - math.log(label_smoothing)
    return torch.sigmoid(logits) * chosen + torch.sigmoid(-logits) * rejected


@register()
def sppo_hard(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """SPPO with hard labels: (r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, [B].

    arXiv 2405.00675 eq. 4.7 with win probabilities 1 and 0. At D = 0: 1 / (2 beta^2).
    """
    chosen, rejected = log_ratios(pairs)
    target = 1 / (2 * beta)
    return (chosen - target) ** 2 + (rejected + target) ** 2


@register(couples_pairs=True)
def aot(pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """AOT: `sigmoid` of the sorted policy margins against the sorted reference margins, [B].

    arXiv 2406.05882, paired form: the k-th smallest l_w - l_l of the step is compared with the
    k-th smallest of the reference. A value belongs to the pair whose policy margin it compares.
    At D = 0: ln 2.
    """
    policy = pairs.policy.chosen - pairs.policy.rejected
    reference = pairs.reference.chosen - pairs.reference.rejected
    return _smoothed(beta * (policy - _same_rank(policy, reference)), label_smoothing)


@register(couples_pairs=True)
def aot_unpaired(
    pairs: PairLogProbs, *, beta: Positive = 0.1, label_smoothing: Smoothing = 0.0
) -> Tensor:
    """AOT without pairs: `sigmoid` of the sorted r_w against the sorted r_l, [B].

    arXiv 2406.05882, unpaired form: the k-th smallest r_w of the step is compared with the k-th
    smallest r_l. A value belongs to the pair whose r_w it compares. At D = 0: ln 2.
    """
    chosen, rejected = log_ratios(pairs)
    return _smoothed(beta * (chosen - _same_rank(chosen, rejected)), label_smoothing)


@register()
def discopop(
    pairs: PairLogProbs, *, beta: Positive = 0.1, temperature: PositiveFraction = 0.05
) -> Tensor:
    """DiscoPOP: (1 - m) (-log s(beta D)) + m exp(-beta D) with m = s(beta D / temperature), [B].

    arXiv 2406.08414 eq. 5, whose tau is temperature. At most 1, where m decays at least as fast as
    the exponential grows. At D = 0: (ln 2 + 1) / 2.
    """
    logits = beta * margin(pairs)
    logistic = -torch.sigmoid(-logits / temperature) * F.logsigmoid(logits)
    # m exp(-beta D) as one exponential: as a product, a very negative margin gives 0 x infinity.
    exponential = torch.exp(F.logsigmoid(logits / temperature) - logits)
    return logistic + exponential


@register(uses_weights=True)
def wpo(pairs: PairLogProbs, *, beta: Positive = 0.1) -> Tensor:
    """WPO: -w_w w_l log s(beta D), [B].

    arXiv 2406.11827 eq. 2 with the paper's aligned weights (see PairLogProbs): pairs that the
    policy would itself produce count for more. At D = 0: w_w w_l ln 2.
    """
    assert pairs.chosen_weight is not None and pairs.rejected_weight is not None
    weight = pairs.chosen_weight * pairs.rejected_weight
    return -weight * F.logsigmoid(beta * margin(pairs))


@register()
def ld_dpo(pairs: PairLogProbs, *, beta: Positive = 0.1, alpha: Fraction = 0.5) -> Tensor:
    """LD-DPO: `sigmoid` where tokens beyond the shorter response's length count alpha, [B].

    arXiv 2409.06411, applied to both policy and reference: l becomes
    sum(first L tokens) + alpha sum(the rest), with L the shorter length. alpha = 1 is `sigmoid`,
    alpha = 0 truncates the longer response. At D = 0: ln 2.
    """
    chosen, rejected = log_ratios(pairs)
    chosen_shared = pairs.policy.chosen_shared - pairs.reference.chosen_shared
    rejected_shared = pairs.policy.rejected_shared - pairs.reference.rejected_shared
    chosen = chosen_shared + alpha * (chosen - chosen_shared)
    rejected = rejected_shared + alpha * (rejected - rejected_shared)
    return -F.logsigmoid(beta * (chosen - rejected))


@register(option_needs={"alpha": ("divergence", "alpha")})
def f_dpo(
    pairs: PairLogProbs,
    *,
    beta: Positive = 0.1,
    divergence: Literal["forward_kl", "jensen_shannon", "alpha"] = "forward_kl",
    alpha: FractionBelowOne = 0.5,
) -> Tensor:
    """f-DPO: -log s(beta (f'(exp(r_w)) - f'(exp(r_l)))), [B].

    arXiv 2309.16240; with r the log-ratio, f' is 1 - exp(-r) for "forward_kl",
    ln 2 + log s(r) for "jensen_shannon" and (exp((alpha - 1) r) - 1) / (alpha - 1) for "alpha",
    where alpha = 0 is the forward KL divergence and alpha -> 1 the reverse one, which is `sigmoid`.
    The paper's alpha is 1 - alpha. Exponentials are continued by their tangent beyond exponent
    40. At D = 0: ln 2.
    """
    chosen, rejected = log_ratios(pairs)
    if divergence == "jensen_shannon":
        return -F.logsigmoid(beta * (F.logsigmoid(chosen) - F.logsigmoid(rejected)))
    power = alpha - 1 if divergence == "alpha" else -1.0
    difference = _expm1_tangent(power * chosen) - _expm1_tangent(power * rejected)
    return -F.logsigmoid(beta * difference / power)
