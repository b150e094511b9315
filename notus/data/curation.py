"""UltraFeedback's ratings -> one chosen and one rejected completion per prompt.

A raw openbmb/UltraFeedback row holds a prompt (`instruction`) and usually four completions, each
rated by GPT-4 from 1 to 5 on four aspects (`annotations`) and from 1 to 10 overall
(`overall_score`). Notus takes the mean of the aspects, because about 2,600 of the overall scores
were published wrongly: a true 1 became a 10 (https://github.com/OpenBMB/UltraFeedback/issues/8).
Everything here is a pure function of one row.
"""

import hashlib
from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any

from notus.errors import UserError

Completion = dict[str, Any]

TIED_RATINGS = "tied ratings"
TOO_FEW_RATED = "fewer than two rated completions"


def mean_rating(completion: Completion) -> float | None:
    """The mean of a completion's aspect ratings, 1 to 5; None if no aspect is rated.

    An aspect counts only if it holds a rating other than null and "N/A". Ratings are strings in
    the published revisions and numbers in some copies; the first revision holds a list of
    annotations for each aspect. This is Argilla's rule for
    argilla/ultrafeedback-binarized-preferences.

    Raises:
        UserError: a rating is not a number from 1 to 5, or an annotation is not an object.
    """
    ratings = [_number(found, f"rating of {aspect}", 5) for aspect, found in _ratings(completion)]
    return sum(ratings) / len(ratings) if ratings else None


def overall_score(completion: Completion) -> float | None:
    """GPT-4's overall score of a completion as published, 1 to 10; None if there is none.

    Strings ("8", "8/10") are read as numbers. Revisions before 2023-12-29 hold 10 where 1 was
    meant; that is not repaired here.

    Raises:
        UserError: the score is not a number from 1 to 10.
    """
    found = completion.get("overall_score")
    if found is None or found == "N/A":
        return None
    if isinstance(found, str):
        found = found.removesuffix("/10")
    return _number(found, "overall_score", 10)


RULES: dict[str, Callable[[Completion], float | None]] = {
    "mean-rating": mean_rating,
    "overall-score": overall_score,
}


def choose_pair(
    row: dict[str, Any], rule: str, seed: int
) -> tuple[Completion, Completion, float, float] | str:
    """(chosen, rejected, chosen score, rejected score) of a raw row, or why there is no pair.

    Chosen is the first completion with the highest score under `rule` (a name in `RULES`).
    Rejected is drawn among those with a strictly lower score rather than being the worst one,
    as for Zephyr (https://arxiv.org/abs/2310.16944, section 3). The draw depends on the seed and
    the prompt's text alone, so neither the order of the rows nor other rows change it.
    Completions without a score take no part.

    Raises:
        UserError: the rule is unknown, or a rating is out of range.
    """
    if rule not in RULES:
        raise UserError(f'no curation rule "{rule}"; expected one of {", ".join(RULES)}')
    scored = [
        (completion, score)
        for completion in row["completions"] or []
        if (score := RULES[rule](completion)) is not None
    ]
    if len(scored) < 2:
        return TOO_FEW_RATED
    best = max(score for _, score in scored)
    lower = [candidate for candidate in scored if candidate[1] < best]
    if not lower:
        return TIED_RATINGS
    chosen = next(completion for completion, score in scored if score == best)
    rejected, rejected_score = lower[_draw(seed, row["instruction"], len(lower))]
    return chosen, rejected, best, rejected_score


def _ratings(completion: Completion) -> Iterator[tuple[str, Any]]:
    """(aspect, rating) of every aspect that is rated."""
    aspects = completion.get("annotations") or {}
    if not isinstance(aspects, dict):
        raise UserError(f"annotations are {aspects!r:.60}; expected an object of aspects")
    for aspect, found in aspects.items():
        for annotation in found if isinstance(found, list) else [found]:
            if not isinstance(annotation, dict | NoneType):
                raise UserError(f"annotation of {aspect} is {annotation!r:.60}; expected an object")
            rating = annotation.get("Rating") if annotation else None
            if rating is not None and rating != "N/A":
                yield aspect, rating


def _number(found: Any, name: str, highest: int) -> float:
    """`found` as a number from 1 to `highest`."""
    expected = f"expected a number from 1 to {highest}"
    try:
        number = float(found)
    except (TypeError, ValueError):
        raise UserError(f"{name} is {found!r}; {expected}") from None
    if not 1 <= number <= highest:
        raise UserError(f"{name} is {found!r}; {expected}")
    return number


def _draw(seed: int, prompt: str, count: int) -> int:
    """A uniform draw from range(count), keyed by the seed and the prompt's text."""
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest, "big") % count
