"""The configured loss: one of `losses.LOSSES` or a weighted sum, with its options resolved.

`build_loss` reads the configuration's `loss` section. `couple` makes a loss that looks at all pairs
of a step additive over microbatches.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from notus.errors import UserError
from notus.objective.losses import LOSSES, PairLogProbs, Sums
from notus.strict import Invalid, Positive, parse

# The names of other trainers and papers; by spelling, "dpo" is nearest to "dpop".
OTHER_NAMES = {
    "dpo": "sigmoid",
    "cdpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "slic": "hinge",
    "rso": "hinge",
    "nll": "sft",
}


@dataclass(frozen=True)
class Term:
    """One loss of the table with its weight and all its options resolved."""

    name: str
    weight: float
    options: dict[str, Any]


@dataclass(frozen=True)
class Loss:
    """A weighted sum of losses: pairs -> [B]. The properties are those of LossEntry."""

    terms: tuple[Term, ...]

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        values = [
            term.weight * LOSSES[term.name].function(pairs, **term.options) for term in self.terms
        ]
        return torch.stack(values).sum(dim=0)

    uses_reference = property(lambda self: self._any("uses_reference"))
    uses_rejected = property(lambda self: self._any("uses_rejected"))
    uses_weights = property(lambda self: self._any("uses_weights"))
    couples_pairs = property(lambda self: self._any("couples_pairs"))

    def _any(self, need: str) -> bool:
        return any(getattr(LOSSES[term.name], need) for term in self.terms)

    @property
    def beta(self) -> float:
        """The factor of log-ratios in reward metrics: the first beta among the terms, or 1."""
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
    """A loss that couples pairs, evaluated over a step's N pairs; made by `couple`."""

    indices: Tensor  # int64 [N], the pairs' indices in the data set, ascending
    values: Tensor  # [N], each pair's share of the loss
    gradients: Sums  # [N] each, of the step's summed loss with respect to the policy's sums

    def __call__(self, pairs: PairLogProbs, indices: Tensor) -> Tensor:
        """Losses [B] of a microbatch of the step; indices: int64 [B], as in the data set.

        Their sum over any split of the step has the value and the gradient of the complete step.
        """
        place = torch.searchsorted(self.indices, indices)
        loss = self.values[place]
        for log_probs, gradient in zip(pairs.policy, self.gradients, strict=True):
            loss = loss + gradient[place] * (log_probs - log_probs.detach())
        return loss


def couple(loss: Loss, pairs: PairLogProbs, indices: Tensor) -> Coupled:
    """Evaluate a loss that couples pairs over the complete optimiser step.

    pairs: all N pairs of the step, of every rank; they need no gradient. indices: int64 [N], their
    indices in the data set.
    """
    policy = Sums(*(log_probs.detach().requires_grad_() for log_probs in pairs.policy))
    with torch.enable_grad():
        values = loss(pairs._replace(policy=policy))
        gradients = torch.autograd.grad(
            values.sum(), policy, allow_unused=True, materialize_grads=True
        )
    ascending, order = indices.sort()
    return Coupled(
        ascending, values.detach()[order], Sums(*(gradient[order] for gradient in gradients))
    )


def build_loss(section: Mapping[str, Any]) -> Loss:
    """The configuration's `loss` section as a callable.

    section: {"name": ..., **options}, or {"mix": [{"name", "weight", **options}, ...]}.
    Raises UserError, beginning with the dotted key at fault, for an unknown loss, an option that
    the loss does not take or that has no effect, a value of the wrong type or out of range.
    """
    if "mix" not in section:
        return Loss((_term(section, 1.0, "loss"),))
    for key in section.keys() - {"mix"}:
        raise UserError(f"loss.{key}: has no effect with loss.mix; give it inside a term of mix")
    terms = []
    for i, term in enumerate(parse(section["mix"], tuple[dict[str, Any], ...], "loss.mix")):
        weight = parse(term.pop("weight", None), Positive, f"loss.mix.{i}.weight")
        terms.append(_term(term, weight, f"loss.mix.{i}"))
    return Loss(tuple(terms))


def _term(section: Mapping[str, Any], weight: float, where: str) -> Term:
    """A loss with all its options, given or default, except those that have no effect."""
    name = parse(section.get("name"), str, f"{where}.name")
    if name not in LOSSES:
        nearest = difflib.get_close_matches(OTHER_NAMES.get(name, name), LOSSES, n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise UserError(
            f"{where}.name: unknown loss {name!r}{hint}; expected one of {', '.join(LOSSES)}"
        )
    loss, given = LOSSES[name], {key: value for key, value in section.items() if key != "name"}
    try:
        options = parse(given, loss.function, where)
    except Invalid as error:
        raise UserError(f"{error} (loss {name!r})") from None
    for key, (other, needed) in loss.option_needs.items():
        if options[other] != needed:
            if key in given:
                raise UserError(
                    f"{where}.{key}: acts only with {other} {needed!r}, and {where}.{other} is "
                    f"{options[other]!r}"
                )
            del options[key]
    return Term(name, weight, options)
