"""The ratings of a prompt's completions -> a chosen and a rejected completion.

A raw openbmb/UltraFeedback row holds a prompt (`instruction`) and usually four completions, each
rated by GPT-4 from 1 to 5 on four aspects (`annotations`) and from 1 to 10 overall
(`overall_score`). Notus takes the mean of the aspects, because about 2,600 of the overall scores
were published wrongly: a true 1 became a 10 (https://github.com/OpenBMB/UltraFeedback/issues/8).
Everything here is a pure function of one row.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from types import NoneType
from typing import Any, NamedTuple

from notus.curation.rated_rows import Completion, RatedRow
from notus.errors import UserError

SEED = 42  # of draws, where none is given: train.seed and the commands have this default

# Reasons why a row gives no pair.
TIED_RATINGS = "tied ratings"
TOO_FEW_RATED = "fewer than two rated completions"
UNCLEAR_TEN = "overall score of 10 that may be a 1"
ASPECTS_DISAGREE = "an aspect that prefers the rejected response"


class Choice(NamedTuple):
    """The completions that make a pair, and their scores under the rule."""

    chosen: Completion
    rejected: Completion
    chosen_score: float
    rejected_score: float


# ------------------------------------------------------------------------------- scores


def mean_rating(completion: Completion) -> float | None:
    """The mean of a completion's aspect ratings, 1 to 5; None if no aspect is rated.

    An aspect counts only if it holds a rating other than null and "N/A". Ratings are strings in
    the published revisions and numbers in some copies; the first revision holds a list of
    annotations for each aspect. This is Argilla's rule for
    argilla/ultrafeedback-binarized-preferences. Raises UserError if a rating is not a number from
    1 to 5, or an annotation is not an object.
    """
    ratings = [rating for _, rating in aspect_ratings(completion)]
    return sum(ratings) / len(ratings) if ratings else None


def aspect_ratings(completion: Completion) -> Iterator[tuple[str, float]]:
    """(aspect, rating) of every aspect that is rated; raises UserError as `mean_rating` does."""
    aspects = completion.get("annotations") or {}
    if not isinstance(aspects, dict):
        raise UserError(f"annotations are {aspects!r:.60}; expected an object of aspects")
    for aspect, found in aspects.items():
        for annotation in found if isinstance(found, list) else [found]:
            if not isinstance(annotation, dict | NoneType):
                raise UserError(f"annotation of {aspect} is {annotation!r:.60}; expected an object")
            rating = annotation.get("Rating") if annotation else None
            if rating is not None and rating != "N/A":
                yield aspect, _number(rating, f"rating of {aspect}", 1, 5)


def overall_score(completion: Completion) -> float | None:
    """GPT-4's overall score of a completion as published, 1 to 10; None if there is none.

    Strings ("8", "8/10") are read as numbers. Revisions before 2023-12-29 hold 10 where 1 was
    meant; this is not corrected here. Raises UserError if the score is not a number from 1 to 10.
    """
    found = completion.get("overall_score")
    if found is None or found == "N/A":
        return None
    if isinstance(found, str):
        found = found.removesuffix("/10")
    return _number(found, "overall_score", 1, 10)


def overall_score_fixed(completion: Completion) -> float | None:
    """The overall score after UltraFeedback's correction of the 10s; nan where it is unknown.

    A 10 is a 1 if the mean rating is at most 2, and a 10 if the mean is above 4. Those in between
    were annotated again by GPT-4, which is impossible here: they are nan, as is a 10 without
    ratings (OpenBMB/UltraFeedback, src/data_annotation/fix_overall_score_issue.py).
    """
    score, mean = overall_score(completion), mean_rating(completion)
    if score != 10:
        return score
    if mean is None or 2 < mean <= 4:
        return math.nan
    return 1.0 if mean <= 2 else 10.0


def rating(completion: Completion) -> float | None:
    """The completion's own `rating`, a number on any scale; None if it has none."""
    found = completion.get("rating")
    return None if found is None else _number(found, "rating", -math.inf, math.inf)


RULES = {
    "mean-rating": mean_rating,
    "overall-score": overall_score,
    "overall-score-fixed": overall_score_fixed,
    "rating": rating,
}


def _number(found: Any, name: str, lowest: float, highest: float) -> float:
    """`found` as a number from `lowest` to `highest`."""
    try:
        number = float(found)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(found, bool) or not lowest <= number <= highest or math.isinf(number):
        bounds = f" from {lowest} to {highest}" if math.isfinite(highest) else ""
        raise UserError(f"{name} is {found!r:.60}; expected a number{bounds}")
    return number


# ------------------------------------------------------------------------------- the pair


def choose_pairs(
    row: RatedRow, rule: str, seed: int, rejected: str = "random"
) -> list[Choice] | str:
    """The pairs that `rule` (a name in `RULES`) makes of a row, or the reason why there are none.

    The chosen completion is the first with the highest score. The rejected one is, by `rejected`:

    - "random": drawn among those with a strictly lower score (as Notus did; nearly Zephyr's way,
      https://arxiv.org/abs/2310.16944, section 3). The draw depends only on the seed and the
      prompt's text, so neither the order of the rows nor other rows change it.
    - "lowest": the first with the lowest score.
    - "all-lower": each of those with a strictly lower score, in a pair of its own, as in
      argilla/ultrafeedback-multi-binarized-preferences-cleaned; the other choices give one pair.
    - "zephyr": drawn among all the others, equal scores included, by Python's `random`, seeded
      for every row: the first published HuggingFaceH4/ultrafeedback_binarized.

    Completions without a score are ignored. Raises UserError if a rating is out of range.
    """
    scores = [(completion, RULES[rule](completion)) for completion in row.completions]
    scored = [(completion, score) for completion, score in scores if score is not None]
    if any(math.isnan(score) for _, score in scored):
        return UNCLEAR_TEN
    if len(scored) < 2:
        return TOO_FEW_RATED
    best = max(score for _, score in scored)
    chosen = next(completion for completion, score in scored if score == best)
    if rejected == "zephyr":
        others = [one for one in scored if one[0] != chosen]
    else:
        others = [one for one in scored if one[1] < best]
    if not others:
        return TIED_RATINGS
    if rejected == "zephyr":
        draws = random.Random(seed)
        while (pick := draws.choice(scored))[0] == chosen:
            pass
    elif rejected == "all-lower":
        return [Choice(chosen, completion, best, score) for completion, score in others]
    elif rejected == "lowest":
        pick = min(others, key=lambda one: one[1])
    else:
        key = hashlib.sha256(f"{seed}:{row.prompt}".encode()).digest()
        pick = others[int.from_bytes(key, "big") % len(others)]
    return [Choice(chosen, pick[0], best, pick[1])]


def shortcoming(
    choice: Choice, min_margin: float | None, min_chosen: float | None, agree: bool
) -> str | None:
    """The reason to leave a pair out, or None.

    min_margin, min_chosen: the least difference of the two scores, and the least score of the
    chosen completion. agree: whether no aspect that both are rated on may be higher for the
    rejected completion. Raises UserError if a rating is out of range.
    """
    # A mean of three is rounded, so that 13/3 - 10/3 is below 1.
    if min_chosen is not None and choice.chosen_score < min_chosen - 1e-9:
        return f"chosen score below {min_chosen:g}"
    if min_margin is not None and choice.chosen_score - choice.rejected_score < min_margin - 1e-9:
        return f"margin below {min_margin:g}"
    if agree:
        chosen, rejected = (dict(aspect_ratings(one)) for one in choice[:2])
        if any(rejected[aspect] > chosen[aspect] for aspect in chosen.keys() & rejected.keys()):
            return ASPECTS_DISAGREE
    return None
