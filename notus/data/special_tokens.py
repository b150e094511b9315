"""Special tokens that a data set spells out: found, and read as text in conversations.

A message that contains "</s>" could end its turn and begin another. In a conversation only the
chat template makes turns, so special tokens in messages are read as ordinary characters.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from notus.data.formats import PARTS, Message, Pair

# Noncharacters, which no text should contain. BREAK splits a special token's text in a message
# while the template renders it; the template's own special tokens become OPEN, their id, CLOSE.
BREAK, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"
REMOVED = dict.fromkeys(map(ord, (BREAK, OPEN, CLOSE)))  # so that no message can forge marks


def spells_special(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the text of a special token occurs in a prompt, a response or a message."""
    return any(_pattern(tokenizer).search(text) for text in _contents(pair))


def without_ends(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> Pair:
    """The pair without a BOS at the beginning of plain text and without EOS that end a response.

    The tokenizer and the template put their own there, so these add nothing.
    """

    def trimmed(response: str | list[Message]) -> str | list[Message]:
        if not response:  # in supervised fine-tuning there is no rejected one
            return response
        if not isinstance(response, str):
            *first, last = response
            return [*first, {**last, "content": trimmed(last["content"])}]
        while response.rstrip().endswith(tokenizer.eos_token):
            response = response.rstrip().removesuffix(tokenizer.eos_token)
        return response

    prompt = pair.prompt
    if isinstance(prompt, str):
        prompt = prompt.removeprefix(tokenizer.bos_token or "")
    return replace(
        pair, prompt=prompt, chosen=trimmed(pair.chosen), rejected=trimmed(pair.rejected)
    )


def _contents(pair: Pair) -> Iterator[str]:
    for part in (pair.prompt, pair.chosen, pair.rejected):
        yield from [part] if isinstance(part, str) else (message["content"] for message in part)


@lru_cache(maxsize=4)
def _pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """A pattern of the text of any special token, the longest first."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


@dataclass(frozen=True)
class Guard:
    """Encodes a rendered conversation so that only the template makes special tokens.

    backend: a copy of the tokenizer that reads special tokens' texts as text and has tokens of its
    own, OPEN id CLOSE, in their place. original: those tokens' ids -> the special tokens' ids.
    """

    backend: Tokenizer
    pattern: re.Pattern[str]
    ids: dict[str, int]
    original: dict[int, int]
    unknown: int | None

    def break_up(self, pair: Pair) -> Pair:
        """The conversation with a BREAK in every special token's text, ready to be rendered."""

        def broken(message: Message) -> Message:
            content = message["content"].translate(REMOVED)
            halves = self.pattern.sub(lambda m: m[0][0] + BREAK + m[0][1:], content)
            return {**message, "content": halves}

        parts = {name: list(map(broken, getattr(pair, name))) for name in PARTS}
        return replace(pair, **parts)

    def mark(self, rendered: str) -> str:
        """The rendered text, ready to be encoded: the template's tokens marked, BREAKs removed."""
        marked = self.pattern.sub(lambda match: f"{OPEN}{self.ids[match[0]]}{CLOSE}", rendered)
        return marked.replace(BREAK, "")

    def is_tight(self, ids: Sequence[int]) -> bool:
        """Whether the backend, given marked text, made no special token of a message's text.

        Merges may lead from a special token's characters to the token itself.
        """
        return not (set(self.original.values()) - {self.unknown}) & set(ids)

    def restore(self, ids: Sequence[int]) -> list[int]:
        """The backend's ids, its marks replaced by the special tokens' ids."""
        return [self.original.get(token, token) for token in ids]


@lru_cache(maxsize=4)
def guard_of(tokenizer: PreTrainedTokenizerFast) -> Guard:
    """The guard of a tokenizer; the tokenizer must not change afterwards."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # the library's words for: as text
    special = {id: t for id, t in tokenizer.added_tokens_decoder.items() if t.special}
    marks = {id: f"{OPEN}{id}{CLOSE}" for id in special}
    options = ("single_word", "lstrip", "rstrip", "normalized")
    for id, token in special.items():
        same = {name: getattr(token, name) for name in options}
        backend.add_tokens([AddedToken(marks[id], **same)])
    return Guard(
        backend,
        _pattern(tokenizer),
        {token.content: id for id, token in special.items()},
        {backend.token_to_id(mark): id for id, mark in marks.items()},
        tokenizer.unk_token_id,
    )
