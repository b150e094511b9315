"""Secrets that got into settings or a command line, masked before they are written anywhere.

A value is a secret by its form (tokens of Hugging Face, OpenAI and GitHub; a user and password or a
key in a URL) or by its key (token, key, secret or password as the last word). Masking is
idempotent: settings that a file holds masked compare equal to today's.
"""

import re
from collections.abc import Iterator
from typing import Any

MASK = "***"
SECRET_WORDS = "(?:token|key|secret|password)"
SECRET_KEY = re.compile(rf"(?:.*[_.-])?{SECRET_WORDS}", re.IGNORECASE)  # no max_new_tokens
# Names that only begin like a token (hf_models, sk-learn) are shorter.
SECRET = re.compile(
    rf"""(?<![A-Za-z0-9])(?:
        (?: hf_ | gh[oprsu]_ ) [A-Za-z0-9]{{16,}}
      | sk- (?=[\w-]*\d) (?=[\w-]*[A-Za-z0-9]{{12}}) [\w-]{{16,}}
      | (?<= ://) [^\s/@"']+ : [^\s/@"']+ (?= @)
      | (?<= [?&]) (?P<name> [\w.-]*? {SECRET_WORDS} = ) [^\s&"']+
    )""",
    re.VERBOSE | re.IGNORECASE,
)


def mask_text(text: str) -> str:
    """The text with each secret in it replaced by MASK."""
    return SECRET.sub(lambda found: (found["name"] or "") + MASK, text)


def mask_word(word: str) -> str:
    """A word of a command line, KEY=VALUE or any other, without secrets."""
    key, equals, value = word.partition("=")
    return f"{key}={MASK}" if value and SECRET_KEY.fullmatch(key) else mask_text(word)


def masked(value: Any, key: str = "") -> Any:
    """A JSON value, which is under `key` in its object, without secrets."""
    if isinstance(value, dict):
        return {name: masked(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [masked(item, key) for item in value]
    if not isinstance(value, str) or not value:
        return value
    return MASK if SECRET_KEY.fullmatch(key) else mask_text(value)


def masked_keys(value: Any, key: str = "") -> Iterator[str]:
    """The dotted keys of a JSON value at which `masked` changes something."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from masked_keys(item, f"{key}.{name}" if key else str(name))
    elif masked(value, key) != value:
        yield key
