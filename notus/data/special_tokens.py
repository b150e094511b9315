"""Added tokens that a data set spells out: found, and read as text in conversations.

A message that contains "</s>" could end its turn and begin another. In a conversation only the
chat template makes turns, so the texts of added tokens, special or not, are read as ordinary
characters in messages, in tool calls and in tools. The tokenizer itself says which texts become
tokens: its normaliser may also make one of "</S>" or of full-width characters.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from notus.data.formats import PARTS, Message, Pair
from notus.errors import UserError

# Noncharacters, which no text should contain; messages lose theirs, so that none can forge marks.
# The template's own added tokens become OPEN, their id, CLOSE. While the template renders, each
# character of a message that must not join a token is HIDDEN and its code point in DIGITS.
NONCHARACTERS = {code: None for code in range(0xFDD0, 0xFDF0)}
OPEN, CLOSE, HIDDEN = "\ufdd0", "\ufdd1", "\ufdd2"
DIGITS = {ord(digit): chr(0xFDE0 + int(digit, 16)) for digit in "0123456789abcdef"}


def spells_added(pair: Pair, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the text of an added token occurs in a prompt, a response or a message."""
    guard = guard_of(tokenizer)
    return any(guard.is_spelled_in(text) for text in _contents(pair))


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


def _contents(pair: Pair) -> list[str]:
    """Every text of a pair: its parts, or all that its messages, tools and options hold."""
    found: list[str] = []
    for value in (pair.prompt, pair.chosen, pair.rejected, pair.tools, pair.template_options):
        _map_texts(found.append, value)
    return found


def _map_texts(change: Callable[[str], Any], value: Any) -> Any:
    """The value with every text in it changed, the names of objects' fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(change, k): _map_texts(change, v) for k, v in value.items()}
    return [_map_texts(change, one) for one in value] if isinstance(value, list) else value


def _any_of(texts: Iterator[str]) -> re.Pattern[str]:
    """A pattern of any of the texts, the longest first; of nothing without texts."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


@dataclass(frozen=True)
class Guard:
    """Encodes conversations so that only the template makes added tokens.

    ids: text -> id of each added token, without those of white space only (a vocabulary's runs of
    spaces make no turns). pattern: these texts. normalised: those that the normaliser's result is
    searched for. backend: a copy of the tokenizer that reads these texts as text and has tokens of
    its own, OPEN id CLOSE, in their place. original: their ids -> the added tokens' ids.
    """

    tokenizer: PreTrainedTokenizerFast
    ids: dict[str, int]
    pattern: re.Pattern[str]
    normalised: re.Pattern[str] | None
    backend: Tokenizer
    original: dict[int, int]

    def is_spelled_in(self, text: str) -> bool:
        """Whether the text, or what the normaliser makes of it, has an added token's text."""
        if self.pattern.search(text):
            return True
        if self.normalised is None:
            return False
        normaliser = self.tokenizer.backend_tokenizer.normalizer
        return bool(self.normalised.search(normaliser.normalize_str(text)))

    def written(self, rendered: str) -> list[int]:
        """The added tokens that a rendered text spells out, without the unknown token."""
        return self.added([self.ids[text] for text in self.pattern.findall(rendered)])

    def added(self, ids: Sequence[int]) -> list[int]:
        """The added tokens among `ids`, without the unknown token, which any text may give."""
        known = set(self.ids.values()) - {self.tokenizer.unk_token_id}
        return [token for token in ids if token in known]

    def hide(self, pair: Pair) -> Pair:
        """The conversation, ready to be rendered, its messages unable to make or join a token.

        The added tokens' texts and each content's first and last character are hidden. In tool
        calls, tools and other values, which a template may compare or quote, only the former are.
        """

        def hidden(message: Message) -> Message:
            content = message["content"].translate(NONCHARACTERS)
            inner = content.strip()
            first = content.find(inner)
            edges = {first, first + len(inner) - 1} if inner else set()
            others = {k: v for k, v in message.items() if k not in ("role", "content")}
            return {
                "role": message["role"],
                "content": without_tokens(content, edges),
                **{name: _map_texts(within, value) for name, value in others.items()},
            }

        def within(value: str) -> str:
            value = value.translate(NONCHARACTERS)
            return without_tokens(value, spelled_in(value))

        def spelled_in(content: str) -> set[int]:
            spans = [range(start, stop) for start, stop, _ in self._spans(content)]
            return set().union(*spans)

        def without_tokens(content: str, places: set[int]) -> str:
            while places:  # without the hidden characters, others may form a token
                content = "".join(
                    HIDDEN + f"{ord(c):x}".translate(DIGITS) if i in places else c
                    for i, c in enumerate(content)
                )
                places = spelled_in(content)
            return content

        parts = {name: list(map(hidden, getattr(pair, name))) for name in PARTS}
        given = ("tools", "template_options")
        return replace(
            pair, **parts, **{name: _map_texts(within, getattr(pair, name)) for name in given}
        )

    def mark(self, rendered: str) -> tuple[str, list[int]]:
        """A rendered text, ready to be encoded, and the ids of the added tokens in it.

        The template's tokens are marked, and what was hidden is shown.
        """
        marked, end, ids = "", 0, []
        for start, stop, token in self._spans(rendered):
            marked += f"{rendered[end:start]}{OPEN}{token}{CLOSE}"
            end = stop
            ids.append(token)
        marked += rendered[end:]
        values = {digit: chr(code) for code, digit in DIGITS.items()}
        hidden = re.compile(f"{HIDDEN}([{''.join(values)}]+)")
        back = str.maketrans(values)
        return hidden.sub(lambda m: chr(int(m[1].translate(back), 16)), marked), ids

    def encode(self, marked: Sequence[str]) -> tuple[list[Encoding], list[list[int]]]:
        """Marked texts' encodings, and their ids with the added tokens' in place of the marks."""
        encodings = self.backend.encode_batch(marked, add_special_tokens=False)
        return encodings, [[self.original.get(i, i) for i in e.ids] for e in encodings]

    def _spans(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, stop, id) of each added token that the tokenizer makes of a text's characters.

        Without the white space around it that a token may swallow.
        """
        encoding = self.tokenizer(text, add_special_tokens=False).encodings[0]
        known, unknown = set(self.ids.values()), self.tokenizer.unk_token_id
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            inner = text[start:stop].strip()
            if not inner or HIDDEN in inner or (token == unknown and inner not in self.ids):
                continue
            if token in known:
                start = text.index(inner, start)
                yield start, start + len(inner), token


@lru_cache(maxsize=4)
def guard_of(tokenizer: PreTrainedTokenizerFast) -> Guard:
    """The guard of a tokenizer, which must not change afterwards. Raises UserError."""
    added = tokenizer.added_tokens_decoder.items()
    known = {id: token for id, token in added if token.content.strip()}
    normaliser = tokenizer.backend_tokenizer.normalizer
    normalised = [t.content for t in known.values() if t.normalized and normaliser]
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    for entry in description["added_tokens"]:
        entry["special"] = entry["id"] in known
    try:
        backend = Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library's only class; it was lenient when it read the file
        raise UserError(f"{tokenizer.name_or_path}: not a sound tokenizer ({error})") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # the library's words for: as text
    marks = {id: f"{OPEN}{id}{CLOSE}" for id in known}
    options = ("single_word", "lstrip", "rstrip", "normalized")
    for id, token in known.items():
        same = {name: getattr(token, name) for name in options}
        backend.add_tokens([AddedToken(marks[id], **same)])
    return Guard(
        tokenizer,
        {token.content: id for id, token in known.items()},
        _any_of(token.content for token in known.values()),
        _any_of(map(normaliser.normalize_str, normalised)) if normalised else None,
        backend,
        {backend.token_to_id(mark): id for id, mark in marks.items()},
    )
