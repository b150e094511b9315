"""A run's data as text for `--dry-run`: pairs as the model sees them, lengths, drops and leaks.

Lengths are tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
from transformers import PreTrainedTokenizerFast

from notus.console import counted, width, wrap
from notus.curation.decontamination import whole_text, words_of
from notus.data.dataset import Dataset
from notus.data.formats import PARTS, Pair
from notus.data.preferences import find_leaks
from notus.data.tokenization import Tokenized
from notus.tables import text_table

PERCENTS = (50, 90, 99)
LONG = 500  # characters of a text that are shown before its middle is left out


def token_report(
    datasets: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerFast, style: str, unit: str
) -> str:
    """The report on the data sets "train" and perhaps "eval", wrapped but for the pairs' texts.

    style: of the tokenization. unit: what a data set consists of, "pairs" or "responses".
    """
    train = datasets["train"]
    examples = telling_pairs(train.tokenized, 3)
    shown = [f"{len(examples)} of {len(train.pairs):,} training {unit}; special tokens: ⟦…⟧"]
    shown += [pair_text(train, index, tokenizer, style) for index in examples]
    found = ["\n".join(_dataset_lines(name, data, unit)) for name, data in datasets.items()]
    if "eval" in datasets:
        found.append("\n".join(_leak_lines(train.kept, datasets["eval"].kept)))
    return "\n\n".join([*shown, wrap("\n\n".join(found), width())])


def telling_pairs(tokenized: Tokenized, count: int) -> list[int]:
    """Indices of kept pairs to show: the first, and the first of each count, the cut ones last."""
    place = {int(kept): index for index, kept in enumerate(tokenized.kept)}
    names = sorted(tokenized.examples, key=lambda name: name.startswith("cut: "))
    found = [place[i] for i in (tokenized.examples[name] for name in names) if i in place]
    return sorted(list(dict.fromkeys([0, *found]))[:count])


def pair_text(data: Dataset, index: int, tokenizer: PreTrainedTokenizerFast, style: str) -> str:
    """Kept pair `index` as the model sees it: the text of its prompt and of its responses."""
    tokenized, pairs = data.tokenized, data.tokenized.pairs
    prompt = pairs.tokens[pairs.parts(index)[0]]
    lost = tokenized.whole_lengths[index] - pairs.lengths[index]
    lines = [data.rows[tokenized.kept[index]].where]
    for name, part, cut in zip(PARTS, pairs.parts(index), lost, strict=True):
        tokens = pairs.tokens[part]
        if not len(tokens):  # in supervised fine-tuning there is no rejected response
            continue
        before = prompt if style == "clean" and name != "prompt" else prompt[:0]
        texts = part_texts(tokens, pairs.hidden[part], tokenizer, before)
        texts = [_shortened(text) for text in texts]
        if cut:  # a prompt loses its start, which under "clean" follows the BOS
            starts = int(tokens[0] == tokenizer.bos_token_id)
            texts.insert(starts if name == "prompt" else len(texts), f"[{cut:,} tokens cut]")
        lines += [f"--- {name}, {len(tokens):,} tokens", "".join(texts)]
    return "\n".join(lines)


def part_texts(
    tokens: np.ndarray,
    hidden: np.ndarray,
    tokenizer: PreTrainedTokenizerFast,
    before: np.ndarray,
) -> list[str]:
    """The tokens of one part as stretches of text and special tokens, which are in brackets.

    A special token's characters in a message are text, and have no brackets. hidden: bool, as long
    as `tokens`. before: the tokens in front of these that were encoded together with them.
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    texts, earlier = [], []
    for token in before.tolist():
        earlier = [] if token in special else [*earlier, token]
    marked = zip(tokens.tolist(), hidden.tolist(), strict=True)
    for is_special, run in groupby(marked, key=lambda item: item[0] in special):
        if is_special:
            for token, is_hidden in run:
                note = ", hidden" if is_hidden else ""
                texts.append(f"⟦{tokenizer.convert_ids_to_tokens(token)}{note}⟧")
        else:
            # A text's first token is decoded without the space that was put in front of it.
            text = tokenizer.decode([*earlier, *(token for token, _ in run)])
            texts.append(text[len(tokenizer.decode(earlier)) :])
        earlier = []
    return texts


def _shortened(text: str) -> str:
    if len(text) <= LONG:
        return text
    left_out = len(text) - 2 * (LONG // 2)
    return f"{text[: LONG // 2]} […{left_out:,} characters…] {text[-LONG // 2 :]}"


def _dataset_lines(name: str, data: Dataset, unit: str) -> Iterator[str]:
    tokenized = data.tokenized
    yield f"{name}: {counted(len(data.pairs), unit)}"
    yield from (f"  {line}" for line in length_table(tokenized, unit).splitlines())
    for reason, number in data.dropped.items():
        yield f"  {number:,} dropped: {reason}"
    for reason, number in tokenized.counts.items():
        if not reason.startswith("cut: "):
            yield f"  {number:,} {reason}, first {data.rows[tokenized.examples[reason]].where}"
    yield f"  {repeated_prompts(data.kept):,} with the prompt of an earlier one"


def length_table(tokenized: Tokenized, unit: str) -> str:
    """Each part's length before truncation, and what truncation took, in columns.

    Percentiles are by nearest rank. The last row is the prompt with the longer response; cut are
    the pairs of which any part was.
    """
    whole, lost = tokenized.whole_lengths, tokenized.whole_lengths - tokenized.pairs.lengths
    parts = PARTS if unit == "pairs" else PARTS[:2]
    rows = {name: (whole[:, i], lost[:, i]) for i, name in enumerate(parts)}
    longer = "prompt + longer response" if unit == "pairs" else "prompt + response"
    rows[longer] = (whole[:, 0] + whole[:, 1:].max(1), lost.sum(1))
    table = []
    for name, (values, gone) in rows.items():
        ranks = np.percentile(values, (*PERCENTS, 100), method="inverted_cdf").astype(int)
        taken = "" if name == longer else _share(gone.sum(), values.sum())
        table.append([name, *ranks.tolist(), _share((gone > 0).sum(), len(whole)), taken])
    heads = [*(f"{percent}%" for percent in PERCENTS), "longest", f"{unit} cut", "tokens lost"]
    return text_table(["tokens before truncation", *heads], table)


def _share(part: int, total: int) -> str:
    return f"{part:,} ({part / total if total else 0:.1%})"


def repeated_prompts(rows: Sequence[Pair]) -> int:
    """Pairs whose prompt, without case, punctuation and spacing, an earlier pair has."""
    texts = (whole_text(row.prompt) for row in rows)
    return len(rows) - len({" ".join(words_of(text)) or text for text in texts})


def _leak_lines(train: Sequence[Pair], held_out: Sequence[Pair]) -> Iterator[str]:
    found = zip(train, find_leaks(train, held_out), strict=True)
    leaks = [(pair.where, other) for pair, other in found if other is not None]
    yield (
        f"leakage: {len(leaks):,} of {len(train):,} training prompts are (nearly) held-out ones "
        f"({len({other for _, other in leaks}):,} of {len(held_out):,})"
    )
    for where, other in leaks[:3]:
        yield f"  {where} is like {other}"
