"""Prompts that must not be trained on: those of benchmarks and held-out rows, and repeated ones.

Texts are compared word by word, without case, punctuation and spacing. `BenchmarkPrompts` finds
the prompts of a test set, also inside longer ones; `SeenPrompts` finds repeated prompts.
"""

import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from notus.curation.rows import Row, kind_of, read_rows, read_text
from notus.errors import UserError

# Tülu 3's measure (https://arxiv.org/abs/2411.15124, section 3.2): a training prompt is
# contaminated if its 8-grams cover more than half of a benchmark prompt's tokens, here words.
NGRAM = 8
COVERAGE = 0.5

# Near duplicates: the sets of 5-word shingles share this part of their union (Jaccard index).
# Of two prompts at exactly 0.8, 25 bands of 8 minima find 99 %, and more than 99.99 % at 0.9.
SHINGLE = 5
JACCARD = 0.8
BANDS, MINIMA = 25, 8

Prompt = str | list[dict[str, Any]]  # text, or messages with their role and content

# Chinese and Japanese put no space between words, so each of their characters counts as one.
_WORD = re.compile("[^\\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]")
_PRIME = np.uint64(0x100000001B3)


def words_of(text: str) -> list[str]:
    """The words of a text, without case, punctuation and differences of Unicode spelling."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def whole_text(prompt: Prompt) -> str:
    """A text, or the contents of messages as one text, tool calls as JSON."""
    if isinstance(prompt, str):
        return prompt
    texts = []
    for message in prompt:
        calls = message.get("tool_calls")
        texts += [message["content"], *([json.dumps(calls, ensure_ascii=False)] if calls else [])]
    return "\n".join(texts)


class Hit(NamedTuple):
    """A benchmark prompt found in a training prompt.

    kind: "exact prompt", "normalised prompt" (the same words) or "8-grams". benchmark: the file's
    path as given; where: the row in it. overlap: the covered share of `prompt`'s words, 0 to 1.
    """

    kind: str
    benchmark: str
    where: str
    prompt: str
    overlap: float


class Dropped(NamedTuple):
    """The reason why a row gives no pair.

    hit: the benchmark prompt that it holds, if that is why. is_row: whether it still counts as a
    row of its source when held-out rows are drawn.
    """

    reason: str
    hit: Hit | None = None
    is_row: bool = False


class BenchmarkPrompts:
    """An index of the prompts of benchmark files, to find them in training prompts.

    It maps every 8-gram to the prompts that hold it, so the time of a look-up hardly depends on the
    benchmarks' size. Prompts of fewer than 8 words are found only as complete prompts.
    """

    def __init__(self, paths: Sequence[str], match: str) -> None:
        """match: "exact", "normalised" (exact too) or "n-grams" (all three are looked for).

        Raises UserError as `read_prompts` does.
        """
        self._prompts = [(path, *found) for path in paths for found in read_prompts(path)]
        # Text, or words, -> the first prompt that has them: (file, place in it, text).
        self._exact: dict[str, tuple[str, str, str]] = {}
        self._normalised: dict[str, tuple[str, str, str]] = {}
        self._grams: list[np.ndarray] = []  # of each prompt, hashes in order
        self._holders: dict[int, list[int]] = defaultdict(list)  # hash of an 8-gram -> prompts
        for number, prompt in enumerate(self._prompts):
            words = words_of(prompt[2])
            self._exact.setdefault(prompt[2], prompt)
            if words and match != "exact":
                self._normalised.setdefault(" ".join(words), prompt)
            self._grams.append(_ngrams(words if match == "n-grams" else (), NGRAM))
            for gram in set(self._grams[-1].tolist()):
                self._holders[gram].append(number)

    def find(self, prompt: Prompt) -> Hit | None:
        """A benchmark prompt in a text or the user's messages, the surest kind first, or None."""
        texts = [prompt]
        if not isinstance(prompt, str):
            texts = [message["content"] for message in prompt if message["role"] == "user"]
        for text in texts:
            if text in self._exact:
                return Hit("exact prompt", *self._exact[text], 1.0)
        all_words = [words_of(text) for text in texts if self._normalised]
        for words in map(" ".join, all_words):
            if words in self._normalised:
                return Hit("normalised prompt", *self._normalised[words], 1.0)
        for words in all_words if self._holders else ():
            covered, number = self._most_covered(words)
            if covered > COVERAGE:
                return Hit(f"{NGRAM}-grams", *self._prompts[number], covered)
        return None

    def _most_covered(self, words: list[str]) -> tuple[float, int]:
        """(covered share of its words, number) of the benchmark prompt that is covered most."""
        grams = _ngrams(words, NGRAM)
        best = (0.0, 0)
        for number in {n for gram in grams.tolist() for n in self._holders.get(gram, ())}:
            starts = np.flatnonzero(np.isin(self._grams[number], grams))
            covered = len(np.unique(starts[:, None] + np.arange(NGRAM)))
            best = max(best, (covered / (len(self._grams[number]) + NGRAM - 1), -number))
        return best[0], -best[1]


class SeenPrompts:
    """The prompts seen so far, each with its origin, to find those that differ in few words.

    Texts are nearly equal if they have the same words or if their sets of 5-word shingles have
    a Jaccard index of at least 0.8. Candidates come from minima of hash functions in bands
    (Broder, 1997: On the resemblance and containment of documents) and are then compared.
    """

    def __init__(self) -> None:
        self._origins: dict[str, str] = {}
        self._shingles: list[tuple[np.ndarray, str]] = []
        self._bands: dict[tuple[int, int], list[int]] = defaultdict(list)
        draws = np.random.default_rng(0)
        self._factors = draws.integers(0, 2**63, (BANDS, MINIMA, 1), np.uint64) * 2 + 1

    def find(self, text: str) -> str | None:
        """The origin of an earlier prompt that is (nearly) equal to `text`, or None."""
        return self._look_up(text)[0] if self._origins else None

    def add(self, text: str, where: str) -> str | None:
        """`find`; a prompt that is not found is noted as seen."""
        found, key, shingles, bands = self._look_up(text)
        if found is None:
            self._origins[key] = where
            for band in bands:
                self._bands[band].append(len(self._shingles))
            self._shingles.append((shingles, where))
        return found

    def _look_up(self, text: str) -> tuple[str | None, str, np.ndarray, list[tuple[int, int]]]:
        """(the origin found, the text's words, its shingles' hashes, its bands' hashes)."""
        words = words_of(text)
        key = " ".join(words) or text  # "?!" has no words
        shingles, bands = np.unique(_ngrams(words, SHINGLE)), []
        if len(shingles):
            minima = (self._factors * shingles).min(-1)  # [BANDS, MINIMA]
            bands = list(enumerate(_polynomial(minima.T, MINIMA)[0].tolist()))
        found = self._origins.get(key)
        candidates = {n for band in bands for n in self._bands.get(band, ())} if not found else ()
        for number in sorted(candidates):
            other, where = self._shingles[number]
            common = len(np.intersect1d(shingles, other, assume_unique=True))
            if common >= JACCARD * (len(shingles) + len(other) - common):
                found = where
                break
        return found, key, shingles, bands


def _ngrams(words: Sequence[str], size: int) -> np.ndarray:
    """Hashes (uint64) of every run of `size` words, in order; none if there are fewer words."""
    hashes = np.fromiter(map(_word_hash, words), np.uint64, len(words))
    return _polynomial(hashes, size)


def _polynomial(values: np.ndarray, size: int) -> np.ndarray:
    """Hashes of every run of `size` along the first axis of uint64 values, modulo 2**64."""
    count = max(len(values) - size + 1, 0)
    total = np.zeros((count, *values.shape[1:]), np.uint64)
    for offset in range(size):
        total = total * _PRIME + values[offset : offset + count]
    return total


@lru_cache(maxsize=2**18)
def _word_hash(word: str) -> int:
    # Python's own hash of a string changes with every process.
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "big")


# ------------------------------------------------------------------------- files of prompts

# A row's prompt is in the first of these columns that it has: text, a list of texts (the turns of
# MT-Bench), or a list of messages, of which only the user's are read.
PROMPT_COLUMNS = (
    *("instruction", "prompt", "question", "query", "goal", "problem", "text", "input"),
    *("turns", "conversations", "messages", "chosen"),
)


def read_prompts(path: str) -> Iterator[tuple[str, str]]:
    """(where, prompt) of every prompt in a file, folder or dataset, except blank ones.

    Raises UserError if the file cannot be read or holds no prompt, a row has none of
    `PROMPT_COLUMNS`, or its prompt is neither text nor a list of texts or messages.
    """
    blank = True
    for where, row in read_rows(path):
        column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
        if column is None:
            raise UserError(
                f"{where}: no column holds a prompt; found the columns {', '.join(row)}; "
                f"expected one of {', '.join(PROMPT_COLUMNS)}"
            )
        for text in filter(str.strip, _texts(row, column, where)):
            blank = False
            yield where, text
    if blank:
        raise UserError(f"{path}: every prompt is blank; expected prompts to compare with")


def _texts(row: Row, column: str, where: str) -> Iterator[str]:
    value = row[column]
    if not isinstance(value, list):
        yield read_text(row, column, where)
        return
    for item in value:
        if isinstance(item, str):
            yield read_text({column: item}, column, where)
        elif not isinstance(item, dict) or not {"role", "from"} & item.keys():
            raise UserError(f'{where}: "{column}" holds {kind_of(item)}; expected text or messages')
        elif item.get("role", item.get("from")) in ("user", "human"):
            yield read_text(item, "content" if "role" in item else "value", f"{where}, {column}")
