"""Rated responses -> preference pairs: the settings, and the rules for a row.

The screen of prompts, sources and marks is for ready pairs too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from notus.curation.decontamination import (
    BenchmarkPrompts,
    Dropped,
    Prompt,
    SeenPrompts,
    read_prompts,
    whole_text,
)
from notus.curation.marks import MARKED, Mark, Marks, fingerprint
from notus.curation.rated_rows import RATED, RatedRow
from notus.curation.ratings import RULES, Choice, choose_pairs, shortcoming
from notus.curation.rows import Row, read_text
from notus.data.columns import complete
from notus.data.formats import ONLY_ANSWERS
from notus.data.pairs import Pair
from notus.errors import UserError
from notus.strict import Positive, Text

HELD_OUT_PROMPT = "prompt of a held-out row"


@dataclass(frozen=True, kw_only=True)
class Curation:
    """How rated completions become pairs, and which prompts are left out (of ready pairs too)."""

    # what ranks a row's completions: the mean of UltraFeedback's aspects (Notus), its overall
    # score (Zephyr) as published or corrected, or each response's own rating; null: ready pairs
    rule: Literal["mean-rating", "overall-score", "overall-score-fixed", "rating"] | None = None
    # drawn among the lower ones, the lowest, each lower one in a pair of its own (several pairs of
    # a row), or drawn among all others, ties too, as for Zephyr
    rejected: Literal["random", "lowest", "all-lower", "zephyr"] = "random"
    min_margin: Positive | None = None  # the least by which chosen must exceed rejected, in scores
    min_chosen: float | None = None  # the least score of a chosen response
    agree: bool = False  # leave out pairs of which an aspect rates the rejected response higher
    decontaminate: tuple[Text, ...] | None = None  # files of benchmark prompts to leave out
    # a benchmark prompt is recognised by its text, also by its words, also by runs of 8 words
    match: Literal["exact", "normalised", "n-grams"] = "n-grams"
    drop_sources: tuple[Text, ...] | None = None  # rows to leave out by their "source"
    # of pairs with the same prompt, or nearly the same, only the first is kept
    duplicates: Literal["keep", "exact", "near"] = "keep"
    marks: Text | None = None  # a file of marks (drop, swap, notes) that notus.look's page saved

    @property
    def decides(self) -> bool:
        """Whether pairs are left out because of their scores."""
        return self.min_margin is not None or self.min_chosen is not None or self.agree


class Screen:
    """Decides which rows are left out because of their prompt or their source.

    marks: those of the curation's file, for `curate_row` and for ready pairs.
    """

    def __init__(self, curation: Curation, held_out: Sequence[str] = ()) -> None:
        """held_out: files of prompts that no pair may repeat or nearly repeat.

        Raises UserError if a file cannot be read, or holds no prompts.
        """
        self._sources = frozenset(curation.drop_sources or ())
        self._benchmarks = BenchmarkPrompts(curation.decontaminate or (), curation.match)
        self._duplicates = curation.duplicates
        self.marks = Marks(curation.marks)
        self._texts: set[str] = set()
        self._seen, self._held_out = SeenPrompts(), SeenPrompts()
        for path in held_out:
            for where, prompt in read_prompts(path):
                self._held_out.add(prompt, where)

    def refuse(self, prompt: Prompt, row: Row, where: str) -> Dropped | None:
        """The reason to leave a row out whatever its responses are; None if there is none."""
        if self._sources and read_text(row, "source", where) in self._sources:
            return Dropped(f'source "{row["source"]}"')
        if hit := self._benchmarks.find(prompt):
            return Dropped(f"{hit.kind} of {hit.benchmark}", hit)
        return Dropped(HELD_OUT_PROMPT) if self._held_out.find(whole_text(prompt)) else None

    def repeated(self, prompt: Prompt, where: str) -> Dropped | None:
        """The reason to drop a pair with an earlier pair's prompt; else None, and it is noted."""
        text = whole_text(prompt)
        if self._duplicates == "near" and self._seen.add(text, where) is not None:
            return Dropped("near-duplicate prompt")
        if self._duplicates == "exact":
            if text in self._texts:
                return Dropped("duplicate prompt")
            self._texts.add(text)
        return None


def curate_row(
    rated: RatedRow, row: Row, where: str, curation: Curation, screen: Screen, seed: int
) -> list[Choice | Dropped]:
    """The pairs of a row of rated responses, or the reason why it gives none.

    With "all-lower" each pair that is left out has its reason among them. A mark is of the row: a
    swap makes its pair the only one, whatever its scores. Raises UserError if a rating is out of
    range, or a response of a pair is not text.
    """
    mark = screen.marks.find(rated.prompt, texts_of(rated), where)
    if mark and mark.mark == "drop":
        return [Dropped(MARKED)]
    if refused := screen.refuse(rated.prompt, row, where):
        return [refused]
    limits = (curation.min_margin, curation.min_chosen, curation.agree)
    try:
        if mark and mark.mark == "swap":
            choices, limits = [_marked_pair(rated, mark, curation.rule)], (None, None, False)
        else:
            choices = choose_pairs(rated, curation.rule, seed, curation.rejected)
        if isinstance(choices, str):
            return [Dropped(choices)]
        reasons = [shortcoming(choice, *limits) for choice in choices]
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for choice in choices:
        for completion in (choice.chosen, choice.rejected):
            read_text(completion, "response", where)
    if None in reasons and (repeated := screen.repeated(rated.prompt, where)):
        return [repeated]
    both = zip(choices, reasons, strict=True)
    return [choice if reason is None else Dropped(reason) for choice, reason in both]


def texts_of(rated: RatedRow) -> list[str]:
    """The responses that are text."""
    texts = (completion.get("response") for completion in rated.completions)
    return [text for text in texts if isinstance(text, str)]


def _marked_pair(rated: RatedRow, mark: Mark, rule: str) -> Choice:
    """The pair that a mark "swap" asks for, the second response over the first."""
    by_text = {}
    for one in rated.completions:
        if isinstance(one.get("response"), str):
            by_text.setdefault(fingerprint(one["response"]), one)
    pair = [by_text[response] for response in reversed(mark.responses)]
    scores = [RULES[rule](completion) for completion in pair]
    if None in scores or any(map(math.isnan, scores)):
        raise UserError(
            f'the mark swaps a response that the rule "{rule}" does not rate; expected a mark of '
            "two rated ones"
        )
    return Choice(*pair, *scores)


def screen_ready(pair: Pair, name: str, row: Row, screen: Screen) -> tuple[Pair, Dropped | None]:
    """A ready pair with its mark applied, and the reason why it is left out, if it is.

    name: of the row's format. A mark is of the complete prompt, which has the row's system turn.
    """
    asked = complete(pair, name, row, pair.where).prompt if screen.marks else pair.prompt
    mark = screen.marks.find(asked, (pair.chosen, pair.rejected), pair.where)
    if mark and mark.mark == "drop":
        return pair, Dropped(MARKED)
    if mark and mark.mark == "swap" and mark.responses[0] == fingerprint(pair.chosen):
        pair = replace(
            pair,
            chosen=pair.rejected,
            rejected=pair.chosen,
            chosen_score=pair.rejected_score,
            rejected_score=pair.chosen_score,
        )
    refused = screen.refuse(pair.prompt, row, pair.where)
    return pair, refused or screen.repeated(pair.prompt, pair.where)


def check_rule(path: str, name: str, rule: str | None) -> None:
    """Raise UserError unless the rule reads rated rows of the format `name`, a key of `RATED`."""
    rules = RATED[name].rules
    if rule is None:
        raise UserError(
            f"{path}: the rows hold ratings and no pairs yet; "
            f'give the source "curation": {{"rule": "{rules[0]}"}}'
        )
    if rule not in rules:
        expected = " or ".join(f'"{known}"' for known in rules)
        raise UserError(
            f'{path}: the rule "{rule}" does not read rows of the format "{name}"; expected '
            f"{expected}"
        )


def check_ready(path: str, name: str, curation: Curation) -> None:
    """Raise UserError if rows of the format `name`, which hold no ratings, cannot be curated so."""
    if name in ("unpaired", *ONLY_ANSWERS):
        raise UserError(
            f'{path}: found rows of one response each (the format "{name}"); curation is for '
            "pairs, and for prompts with several rated responses"
        )
    if curation.rule is not None:
        raise UserError(
            f'{path}: "curation" does nothing with a rule for rows in the format "{name}", '
            "which are pairs already; remove it"
        )
    if curation.decides or curation.rejected != "random":
        raise UserError(
            f'{path}: "rejected", "min_margin", "min_chosen" and "agree" do nothing for rows in '
            f'the format "{name}", which are pairs already; remove them'
        )


def reason_to_drop(prompt: Prompt, chosen: Prompt, rejected: Prompt | None) -> str | None:
    """The reason why nothing can be learned from a pair, or without `rejected` from an answer."""
    if not whole_text(chosen).strip():
        return "empty chosen response"
    if rejected is not None and not whole_text(rejected).strip():
        return "empty rejected response"
    if chosen == rejected:
        return "identical responses"
    return None if whole_text(prompt).strip() else "empty prompt"
