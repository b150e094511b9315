"""What a run will be trained on, as text for `--dry-run`: pairs as the model sees them, and counts.

The functions that count return numbers; `token_report` puts them together. Lengths are tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from notus.curation.decontamination import whole_text, words_of
from notus.data.formats import Pair
from notus.data.preferences import find_leaks
from notus.data.tokenization import AS_SPECIAL, AS_TEXT, Tokenized, TokenizedPairs

PARTS = ("prompt", "chosen", "rejected")
PERCENTS = (50, 90, 99)
NEARLY = 0.9  # the share of the longer response that nearly identical ones have in common
LONG = 500  # characters of a stretch of text that are shown before its middle is left out
# ANSI: what each kind of piece is shown in, in a terminal
COLOURS = {
    "prompt": "\033[36m",
    "chosen": "\033[32m",
    "rejected": "\033[31m",
    "special": "\033[7m",
    "cut": "\033[33m",
}
RESET = "\033[0m"


class DataSet(NamedTuple):
    """Pairs as they were read, what became of them, and rows dropped before, by reason.

    In supervised fine-tuning they are prompts with one response, `chosen`.
    """

    rows: Sequence[Pair]
    tokenized: Tokenized
    dropped: Mapping[str, int]

    @property
    def kept(self) -> list[Pair]:
        """The pairs that have tokens, in their order."""
        return [self.rows[place] for place in self.tokenized.kept]

    @property
    def in_pairs(self) -> bool:
        """Whether there are rejected responses."""
        return bool(self.tokenized.pairs.lengths[:, 2].any())

    @property
    def unit(self) -> str:
        """What is counted."""
        return "pairs" if self.in_pairs else "responses"


class Lengths(NamedTuple):
    """One quantity over all pairs, in tokens before truncation.

    percentiles: by nearest rank, at PERCENTS. cut: pairs in which it was cut. lost: tokens so cut.
    """

    total: int
    percentiles: tuple[int, ...]
    longest: int
    cut: int
    lost: int


# ------------------------------------------------------------------------------------ counting


def nearest_rank(values: np.ndarray, percent: float) -> int:
    """The smallest of the values (not none) that at least `percent` of them do not exceed."""
    return int(np.percentile(values, percent, method="inverted_cdf"))


def lengths_of(tokenized: Tokenized) -> dict[str, Lengths]:
    """Of prompt, chosen, rejected and "sequence": the prompt with the longer response.

    A sequence has lost what its whole pair has.
    """
    whole, lost = tokenized.whole_lengths, tokenized.whole_lengths - tokenized.pairs.lengths
    columns = {name: (whole[:, i], lost[:, i]) for i, name in enumerate(PARTS)}
    columns["sequence"] = (whole[:, 0] + whole[:, 1:].max(1), lost.sum(1))
    return {
        name: Lengths(
            total=int(values.sum()),
            percentiles=tuple(nearest_rank(values, percent) for percent in PERCENTS),
            longest=int(values.max()),
            cut=int((gone > 0).sum()),
            lost=int(gone.sum()),
        )
        for name, (values, gone) in columns.items()
    }


def common_shares(pairs: TokenizedPairs) -> np.ndarray:
    """What part of each pair's longer response is common to both: float64 [pairs].

    Counted from both ends: the tokens of the longest common beginning and end. Identical: 1.
    """
    shares = np.empty(len(pairs))
    for index in range(len(pairs)):
        _, chosen, rejected = (pairs.tokens[part] for part in pairs.parts(index))
        shorter = min(len(chosen), len(rejected))
        front = _first_difference(chosen[:shorter], rejected[:shorter])
        rest = shorter - front
        back = _first_difference(chosen[::-1][:rest], rejected[::-1][:rest])
        shares[index] = (front + back) / max(len(chosen), len(rejected))
    return shares


def _first_difference(a: np.ndarray, b: np.ndarray) -> int:
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else len(a)


def repeated_prompts(rows: Sequence[Pair]) -> int:
    """Pairs whose prompt, without case, punctuation and spacing, an earlier pair has."""
    texts = (whole_text(row.prompt) for row in rows)
    return len(rows) - len({" ".join(words_of(text)) or text for text in texts})


# -------------------------------------------------------------------------------- pairs as text


class Piece(NamedTuple):
    """Some tokens of a part as text; kind: a name in PARTS, "special" or "cut"."""

    kind: str
    text: str


def part_pieces(
    name: str,
    tokens: np.ndarray,
    hidden: np.ndarray,
    tokenizer: PreTrainedTokenizerFast,
    before: np.ndarray,
) -> list[Piece]:
    """The tokens of one part as stretches of text and special tokens, which stand in brackets.

    A special token's characters in a message are text, and have no brackets. hidden: bool, as long
    as `tokens`. before: tokens that were encoded together with these and stand in front of them.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces, earlier = [], []
    for token in before.tolist():
        earlier = [] if token in special else [*earlier, token]
    marked = zip(tokens.tolist(), hidden.tolist(), strict=True)
    for is_special, run in groupby(marked, key=lambda item: item[0] in special):
        if is_special:
            earlier = []
            for token, is_hidden in run:
                note = ", hidden" if is_hidden else ""
                text = tokenizer.convert_ids_to_tokens(token)
                pieces.append(Piece("special", f"⟦{text}{note}⟧"))
        else:
            # A text's first token is decoded without the space that was put in front of it.
            front = tokenizer.decode(earlier)
            text = tokenizer.decode([*earlier, *(token for token, _ in run)])
            pieces.append(Piece(name, text[len(front) :]))
            earlier = []
    return pieces


def pair_pieces(
    tokenized: Tokenized, index: int, tokenizer: PreTrainedTokenizerFast, style: str
) -> dict[str, list[Piece]]:
    """Kept pair `index`, each part in pieces, with the place and number of the tokens cut."""
    pairs = tokenized.pairs
    slices = dict(zip(PARTS, pairs.parts(index), strict=True))
    lost = dict(zip(PARTS, tokenized.whole_lengths[index] - pairs.lengths[index], strict=True))
    shown = {}
    for name, part in slices.items():
        continues = style == "clean" and name != "prompt"
        before = pairs.tokens[slices["prompt"]] if continues else pairs.tokens[:0]
        pieces = part_pieces(name, pairs.tokens[part], pairs.hidden[part], tokenizer, before)
        if lost[name]:
            cut = Piece("cut", f"[{lost[name]:,} tokens cut]")
            if name == "prompt":  # it keeps its end, and under "clean" the BOS in front
                place = int(pieces[0].text == f"⟦{tokenizer.bos_token}⟧")
                pieces.insert(place, cut)
            else:
                pieces.append(cut)
        shown[name] = pieces
    return shown


def telling_pairs(tokenized: Tokenized, count: int) -> list[int]:
    """Kept pairs: the first, and the first of each count, odd ones before cut ones."""
    place = {int(kept): index for index, kept in enumerate(tokenized.kept)}
    names = sorted(tokenized.examples, key=lambda name: name.startswith("cut: "))
    found = [place[i] for i in (tokenized.examples[name] for name in names) if i in place]
    return sorted(list(dict.fromkeys([0, *found]))[:count])


def _shortened(text: str) -> str:
    if len(text) <= LONG:
        return text
    left_out = len(text) - 2 * (LONG // 2)
    return f"{text[: LONG // 2]} […{left_out:,} characters…] {text[-LONG // 2 :]}"


def _coloured(piece: Piece, colours: bool) -> str:
    text = _shortened(piece.text)
    return f"{COLOURS[piece.kind]}{text}{RESET}" if colours else text


def pair_text(
    data: DataSet, index: int, tokenizer: PreTrainedTokenizerFast, style: str, colours: bool
) -> str:
    """Kept pair `index` as the model meets it: the prompt's text, then that of both responses."""
    lengths = data.tokenized.pairs.lengths[index]
    lines = [data.rows[data.tokenized.kept[index]].where]
    shown = pair_pieces(data.tokenized, index, tokenizer, style)
    for (name, pieces), length in zip(shown.items(), lengths, strict=True):
        if pieces:  # in supervised fine-tuning there is no rejected response
            text = "".join(_coloured(piece, colours) for piece in pieces)
            lines += [f"--- {name}, {length:,} tokens", text]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------- report


def token_report(
    sets: Mapping[str, DataSet],
    tokenizer: PreTrainedTokenizerFast,
    *,
    style: str,
    colours: bool,
    pairs_shown: int = 3,
) -> str:
    """The whole report; sets are named "train" and perhaps "eval"."""
    sections = [_pairs_section(sets["train"], tokenizer, style, colours, pairs_shown)]
    for name, data in sets.items():
        sections.append("\n".join(_set_section(name, data)))
    if "eval" in sets:
        sections.append("\n".join(_leak_section(sets["train"].kept, sets["eval"].kept)))
    return "\n\n".join(sections)


def _pairs_section(
    data: DataSet, tokenizer: PreTrainedTokenizerFast, style: str, colours: bool, pairs_shown: int
) -> str:
    shown = telling_pairs(data.tokenized, pairs_shown)
    count = len(data.tokenized.pairs)
    head = f"{len(shown)} of {count:,} training {data.unit}; special tokens: ⟦…⟧"
    texts = [pair_text(data, index, tokenizer, style, colours) for index in shown]
    return "\n\n".join([head, *texts])


def _set_section(name: str, data: DataSet) -> Iterator[str]:
    tokenized = data.tokenized
    count = len(tokenized.pairs)
    yield f"{name}: {count:,} {data.unit}"
    yield from _length_table(data)
    for reason, number in _drops(data).items():
        place = tokenized.examples.get(reason)
        example = "" if place is None else f", first {data.rows[place].where}"
        yield f"  {number:,} {reason}{example}"
    for remark in (AS_TEXT, AS_SPECIAL):
        if number := tokenized.counts.get(remark):
            where = data.rows[tokenized.examples[remark]].where
            yield f"  {number:,} {remark}, first {where}"
    yield f"  {repeated_prompts(data.kept):,} with the prompt of an earlier one"
    if data.in_pairs:
        yield from _likeness_section(data)


def _length_table(data: DataSet) -> Iterator[str]:
    heads = [f"{percent}%" for percent in PERCENTS]
    table = [["tokens before truncation", *heads, "longest", f"{data.unit} cut", "tokens lost"]]
    for part, row in lengths_of(data.tokenized).items():
        if part == "rejected" and not data.in_pairs:
            continue
        whole = "prompt + longer response" if data.in_pairs else "prompt + response"
        cells = [f"{value:,}" for value in (*row.percentiles, row.longest)]
        lost = "" if part == "sequence" else _share(row.lost, row.total)
        cut = _share(row.cut, len(data.tokenized.pairs))
        table.append([whole if part == "sequence" else part, *cells, cut, lost])
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    for label, *cells in table:
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))
        yield "  ".join(["", f"{label:{first}}", *padded]).rstrip()


def _likeness_section(data: DataSet) -> Iterator[str]:
    rows = data.kept
    shares = common_shares(data.tokenized.pairs)
    yield f"  {int((shares == 1).sum()):,} with identical responses"
    nearly = np.flatnonzero((shares >= NEARLY) & (shares < 1))
    example = f", first {rows[nearly[0]].where}" if len(nearly) else ""
    yield f"  {len(nearly):,} with nearly identical responses (≥ {NEARLY:.0%} in common){example}"
    scored = [row for row in rows if None not in (row.chosen_score, row.rejected_score)]
    if scored:
        ties = sum(row.chosen_score == row.rejected_score for row in scored)
        yield f"  {ties:,} of {len(scored):,} rated pairs with equal ratings"


def _drops(data: DataSet) -> dict[str, int]:
    counts = data.tokenized.counts.items()
    return {f"dropped: {reason}": number for reason, number in data.dropped.items()} | {
        reason: number for reason, number in counts if reason.startswith("dropped: ")
    }


def _leak_section(train: Sequence[Pair], held_out: Sequence[Pair]) -> Iterator[str]:
    found = zip(train, find_leaks(train, held_out), strict=True)
    leaks = [(pair.where, other) for pair, other in found if other is not None]
    yield (
        f"leakage: {len(leaks):,} of {len(train):,} training prompts are, or nearly are, held-out "
        f"prompts ({len({other for _, other in leaks}):,} of {len(held_out):,})"
    )
    for where, other in leaks[:3]:
        yield f"  {where} is like {other}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole if whole else 0:.1%})"
