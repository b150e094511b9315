"""A row of a source -> what the page shows of it, JSON-able.

A record holds:

    where      the row's origin, which names it in links
    source     the row's `source` or `subset`, or null
    turns      [role, text] of each message of the prompt
    responses  {"text"} of each, and of rated ones "model", "ratings" ([aspect, rating, rationale]
               of each), "mean", "overall", "rating", "critique" and "picks" (what each rule does)
    chosen, rejected  places in `responses`; null if the row gives no pair
    dropped    why curation leaves the row out, or null
    unusable   why the trainer drops the pair, or null
    flags      what is odd about the row, in words
    numbers    what the page sorts by, by name
    key        {"prompt", "responses"} of a mark for the row; see notus/curation/marks.py
    mark       {"mark", "note"}, if the curation's file has one for the row
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from notus.curation.curate import Curation, reason_to_drop, texts_of
from notus.curation.decontamination import Dropped, Prompt
from notus.curation.marks import Marks, fingerprint
from notus.curation.rated_rows import Completion, RatedRow
from notus.curation.ratings import (
    RULES,
    choose_pairs,
    mean_rating,
    overall_score,
    rating,
)
from notus.data.messages import Message
from notus.data.pairs import LABELS, Pair
from notus.data.sources import Found
from notus.errors import UserError

Record = dict[str, Any]

SIDES = ("chosen", "rejected")
RULES_DISAGREE = "the rules disagree"
TEN_BELOW_THREE = "overall score 10 and mean below 3"
# What a response may be rated by: the name of its key and of its numbers, and the measure.
MEASURES = {"mean rating": mean_rating, "overall score": overall_score, "rating": rating}


def make_record(
    found: Found,
    pair: Pair | None,
    dropped: Dropped | None,
    curation: Curation | None,
    seed: int,
    marks: Marks,
) -> Record:
    """The record of a row and of one of its outcomes (`pair`, `dropped`).

    seed: of the draws of rejected responses.
    """
    record = rated_part(found.rated, pair, curation, seed) if found.rated else pair_part(pair)
    prompt: Prompt = found.rated.prompt if found.rated else pair.prompt if pair else ""
    shown = [pair.chosen, pair.rejected] if pair else []
    held = texts_of(found.rated) if found.rated else shown
    key = {"prompt": fingerprint(prompt), "responses": list(map(fingerprint, shown or held))}
    if mark := marks.find(prompt, held, found.where):
        key["responses"] = list(mark.responses)
        record["mark"] = {"mark": mark.mark, "note": mark.note}
    labels = (found.row.get(name) for name in LABELS)
    unusable = None
    if pair and not dropped:
        unusable = reason_to_drop(pair.prompt, pair.chosen, pair.rejected)
    sides = [record["responses"][place] for place in map(record.get, SIDES) if place is not None]
    return record | {
        "where": found.where,
        "source": next((label for label in labels if isinstance(label, str)), None),
        "turns": turns_of(prompt),
        "dropped": dropped and dropped.reason,
        "unusable": unusable,
        "numbers": numbers_of(sides, pair) | mismatch(record["responses"]),
        "key": key,
    }


def pair_part(pair: Pair | None) -> Record:
    """The responses of a ready pair."""
    texts = [text_of(part) for part in (pair.chosen, pair.rejected)] if pair else []
    places = dict(zip(SIDES, (0, 1) if pair else (None, None), strict=True))
    return {"responses": [{"text": text} for text in texts], "flags": [], **places}


def rated_part(rated: RatedRow, pair: Pair | None, curation: Curation, seed: int) -> Record:
    """All responses of a row of rated ones, and what each rule makes of them."""
    responses = [rated_response(completion) for completion in rated.completions]
    best, rules = set(), {}
    for rule in RULES:
        outcome = _pick(rated, rule, seed, curation.rejected)
        if isinstance(outcome, str):
            rules[rule] = outcome
        elif outcome:
            best.add(responses[outcome[0]]["text"])
            for place in outcome:
                side = SIDES[place != outcome[0]]
                responses[place].setdefault("picks", []).append(f"{rule}: {side}")
    flags = [RULES_DISAGREE] if len(best) > 1 else []
    if any(r.get("overall score") == 10 and r.get("mean rating", 5) < 3 for r in responses):
        flags.append(TEN_BELOW_THREE)
    places = dict.fromkeys(SIDES)
    for side in SIDES if pair else ():
        text, score = text_of(getattr(pair, side)), getattr(pair, f"{side}_score")
        places[side] = next(
            place
            for place, completion in enumerate(rated.completions)
            if completion.get("response") == text and RULES[curation.rule](completion) == score
        )
    return {"responses": responses, "rules": rules, "flags": flags, **places}


def _pick(rated: RatedRow, rule: str, seed: int, rejected: str) -> list[int] | str | None:
    """The places of the chosen and the rejected responses under a rule, or why there is no pair.

    None if the rule's ratings are not in the row.
    """
    try:
        if all(RULES[rule](completion) is None for completion in rated.completions):
            return None
        choices = choose_pairs(rated, rule, seed, rejected)
    except UserError as error:  # a rating out of range, which the source's own rule does not use
        return str(error)
    if isinstance(choices, str):
        return choices
    ids = [id(completion) for completion in rated.completions]
    picked = [choices[0].chosen, *(choice.rejected for choice in choices)]
    return [ids.index(id(completion)) for completion in picked]


def rated_response(completion: Completion) -> Record:
    """A response with its ratings as they were found, and their rationales and critique."""
    text = completion.get("response")
    found: Record = {"text": text if isinstance(text, str) else json.dumps(text)}
    for name in ("model", "critique"):
        if isinstance(completion.get(name), str):
            found[name] = completion[name]
    for name, measure in MEASURES.items():
        with suppress(UserError):
            if (value := measure(completion)) is not None:
                found[name] = round(value, 4)
    aspects = completion.get("annotations")
    found["ratings"] = [
        [aspect, str(annotation.get("Rating"))[:20], _rationale(annotation)]
        for aspect, entry in (aspects.items() if isinstance(aspects, dict) else ())
        for annotation in (entry if isinstance(entry, list) else [entry])
        if isinstance(annotation, dict)
    ]
    return found


def _rationale(annotation: dict[str, Any]) -> str:
    texts = (annotation.get(name) for name in ("Rationale", "Rationale For Rating"))
    return "\n".join(text for text in texts if isinstance(text, str))


def numbers_of(sides: Sequence[Record], pair: Pair | None) -> dict[str, float]:
    """Lengths (characters), scores and ratings of a pair and what it differs by, by name.

    A difference that overflows is left out: the page's JSON has finite numbers only.
    """
    if len(sides) < 2:
        return {}
    measured = {
        name: [response[name] for response in sides]
        for name in MEASURES
        if all(name in response for response in sides)
    }
    scores = [pair.chosen_score, pair.rejected_score]
    if None not in scores and scores not in measured.values():
        measured["score"] = scores
    measured["length"] = [len(response["text"]) for response in sides]
    return {
        f"{name}, {side}": value
        for name, (chosen, rejected) in measured.items()
        for side, value in zip(
            ("difference", *SIDES), (chosen - rejected, chosen, rejected), strict=True
        )
        if math.isfinite(value)
    }


def mismatch(responses: Sequence[Record]) -> dict[str, float]:
    """How far a response's overall score, halved, is at most above its mean rating."""
    both = [r for r in responses if "overall score" in r and "mean rating" in r]
    above = [r["overall score"] / 2 - r["mean rating"] for r in both]
    return {"overall score / 2 - mean rating": max(above)} if above else {}


def turns_of(prompt: Prompt) -> list[tuple[str, str]]:
    """(role, text) of each message; plain text is one message of the role "prompt"."""
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    return [(message["role"], _content(message)) for message in prompt]


def text_of(part: str | Sequence[Message]) -> str:
    """A response as one text; the roles are in it where it has several messages."""
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return _content(part[0])
    return "\n\n".join(f"{message['role']}: {_content(message)}" for message in part)


def _content(message: Message) -> str:
    """A message's text, and whatever else it holds as JSON."""
    others = {k: v for k, v in message.items() if k not in ("role", "content") and v is not None}
    texts = [message.get("content") or "", json.dumps(others, ensure_ascii=False) if others else ""]
    return "\n".join(filter(None, texts))
