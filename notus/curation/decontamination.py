"""Prompts that must not be trained on: those of benchmarks and held-out rows, and repeated ones.

Texts are compared word by word, without case, punctuation and spacing. `BenchmarkPrompts` finds
the prompts of a test set, also inside longer ones; `SeenPrompts` finds repeated prompts.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from notus.curation.rows import Row, kind_of, read_rows, read_text
from notus.errors import UserError

# Tülu 3's measure (https://arxiv.org/abs/2411.15124, section 3.2): a training prompt is
# contaminated if its 8-grams cover more than half of a benchmark prompt's tokens, here words.
NGRAM = 8
COVERAGE = 0.5
MATCHES = ("exact", "normalised", "n-grams")

# Near duplicates: the sets of 5-word shingles share this part of their union (Jaccard index).
# Of two prompts at exactly 0.8, 25 bands of 8 minima find 99 %, and more than 99.99 % at 0.9.
SHINGLE = 5
JACCARD = 0.8
BANDS, MINIMA = 25, 8

# Chinese and Japanese put no space between words, so each of their characters counts as one.
_WORD = re.compile("[^\\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]")
_PRIME = np.uint64(0x100000001B3)


def words_of(text: str) -> list[str]:
    """The words of a text, without case, punctuation and differences of Unicode spelling."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def asked(prompt: str | list[dict[str, str]]) -> list[str]:
    """The texts that a prompt asks: the text itself, or the content of each turn of the user."""
    if isinstance(prompt, str):
        return [prompt]
    return [message["content"] for message in prompt if message["role"] == "user"]


def whole_text(prompt: str | list[dict[str, str]]) -> str:
    """A prompt as one text, that of all its turns."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)


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

    It holds every 8-gram of the benchmarks, so the time of a look-up depends on the training
    prompt's length and not on the benchmarks' size. Prompts of fewer than 8 words are found only
    as complete prompts.
    """

    def __init__(self, paths: Sequence[str], match: str) -> None:
        """match: a name in `MATCHES`; those before it are looked for too.

        Raises:
            UserError: a file cannot be read, or holds no prompts (see `read_prompts`).
        """
        self._match = MATCHES.index(match)
        self._prompts = [(path, *found) for path in paths for found in read_prompts(path)]
        words = [words_of(prompt) for _, _, prompt in self._prompts]
        numbered = np.arange(len(self._prompts))
        # Backwards, so that the first of equal prompts is the one that is named.
        self._exact = {self._prompts[number][2]: number for number in numbered[::-1]}
        self._normalised = {
            " ".join(words[number]): number for number in numbered[::-1] if words[number]
        }
        self._lengths = [len(prompt_words) for prompt_words in words]
        grams = [_ngrams(prompt_words, NGRAM) for prompt_words in words]
        keys = np.concatenate([*grams, np.empty(0, np.uint64)])
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        counts = np.array([len(found) for found in grams], np.int64)
        self._owners = np.repeat(numbered, counts)[order]
        starts = [np.arange(len(found)) for found in grams]
        self._starts = np.concatenate([*starts, np.empty(0, np.int64)])[order]

    def find(self, texts: Sequence[str]) -> Hit | None:
        """A benchmark prompt that one of `texts` holds, the surest kind of hit first, or None."""
        for text in texts:
            if text in self._exact:
                return self._hit("exact prompt", self._exact[text], 1.0)
        if not self._prompts or self._match == 0:
            return None
        all_words = [words_of(text) for text in texts]
        for words in all_words:
            if (joined := " ".join(words)) in self._normalised:
                return self._hit("normalised prompt", self._normalised[joined], 1.0)
        for words in all_words if self._match == 2 else ():
            covered = self._coverage(words)
            if covered and covered[0] > COVERAGE:
                return self._hit(f"{NGRAM}-grams", covered[1], covered[0])
        return None

    def _hit(self, kind: str, number: int, overlap: float) -> Hit:
        return Hit(kind, *self._prompts[number], overlap)

    def _coverage(self, words: list[str]) -> tuple[float, int] | None:
        """(covered share of its words, number) of the benchmark prompt that is covered most."""
        grams = np.unique(_ngrams(words, NGRAM))
        left = np.searchsorted(self._keys, grams, "left")
        right = np.searchsorted(self._keys, grams, "right")
        covered: dict[int, set[int]] = {}
        for first, last in zip(left[left < right], right[left < right], strict=True):
            places = zip(self._owners[first:last], self._starts[first:last], strict=True)
            for owner, start in places:
                covered.setdefault(int(owner), set()).update(range(start, start + NGRAM))
        parts = [(len(found) / self._lengths[owner], -owner) for owner, found in covered.items()]
        part, owner = max(parts, default=(0.0, 0))
        return (part, -owner) if parts else None


class SeenPrompts:
    """The prompts seen so far, each with its origin."""

    def __init__(self, near: bool) -> None:
        """near: prompts that differ in few words count as seen; otherwise only equal texts do.

        Texts are nearly equal if they have the same words or if their sets of 5-word shingles have
        a Jaccard index of at least 0.8. Candidates come from minima of hash functions in bands
        (Broder, 1997: On the resemblance and containment of documents) and are then compared.
        """
        self._near = near
        self._texts: dict[str, str] = {}
        self._shingles: list[tuple[np.ndarray, str]] = []
        self._bands: dict[tuple[int, int], list[int]] = {}
        draws = np.random.default_rng(0)
        self._factors = draws.integers(0, 2**63, (BANDS, MINIMA, 1), np.uint64) * 2 + 1

    def find(self, text: str) -> str | None:
        """The origin of an earlier prompt that is (nearly) equal to `text`, or None."""
        if not self._texts:
            return None
        return self._texts.get(self._key(text)) or self._search(*self._describe(text))

    def add(self, text: str, where: str) -> str | None:
        """`find`; a prompt that is not found is noted as seen."""
        key = self._key(text)
        shingles, bands = self._describe(text)
        found = self._texts.get(key) or self._search(shingles, bands)
        if found is None:
            self._texts[key] = where
            for band in bands:
                self._bands.setdefault(band, []).append(len(self._shingles))
            self._shingles.append((shingles, where))
        return found

    def _key(self, text: str) -> str:
        # Texts without any word, such as "?!", are compared unchanged.
        return " ".join(words_of(text)) or text if self._near else text

    def _describe(self, text: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """A text's shingle hashes (uint64, sorted, unique) and bands; empty if not near."""
        shingles = np.unique(_ngrams(words_of(text) if self._near else (), SHINGLE))
        return shingles, self._signature(shingles) if len(shingles) else []

    def _search(self, shingles: np.ndarray, bands: list[tuple[int, int]]) -> str | None:
        for number in sorted({n for band in bands for n in self._bands.get(band, ())}):
            other, where = self._shingles[number]
            common = len(np.intersect1d(shingles, other, assume_unique=True))
            if common >= JACCARD * (len(shingles) + len(other) - common):
                return where
        return None

    def _signature(self, shingles: np.ndarray) -> list[tuple[int, int]]:
        """(band, a hash of the band's minima) for every band, from shingle hashes (uint64)."""
        minima = (self._factors * shingles).min(-1)  # [BANDS, MINIMA]
        return list(enumerate(_polynomial(minima.T, MINIMA)[0].tolist()))


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
    "instruction",
    "prompt",
    "question",
    "query",
    "goal",
    "problem",
    "text",
    "input",
    "turns",
    "conversations",
    "messages",
    "chosen",
)


def read_prompts(path: str) -> Iterator[tuple[str, str]]:
    """(where, prompt) of every prompt in a file, folder or dataset, except blank ones.

    Raises:
        UserError: the file cannot be read, a row has none of `PROMPT_COLUMNS`, or its prompt is
            neither text nor a list of texts or messages.
    """
    found = False
    for where, row in read_rows(path):
        column = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), None)
        if column is None:
            raise UserError(
                f"{where}: no column holds a prompt; found the columns {', '.join(row)}; "
                f"expected one of {', '.join(PROMPT_COLUMNS)}"
            )
        for text in _texts(row, column, where):
            if text.strip():
                found = True
                yield where, text
    if not found:
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
