"""JSON read by annotation: every value that a user writes is checked here, and nothing is guessed.

`parse` reads a JSON value as a type: frozen dataclasses, bool, int, float, str, None, unions,
Literal, tuples (of a fixed length or with `...`), dict, Any, and Annotated with a Bound. A key that
the annotation does not know, a missing key, a value of another type or out of bounds, a NaN and a
key given twice raise `Invalid`, which names the dotted key, what was found and what was expected.
`plain` is the inverse of `parse`.
"""

import difflib
import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from notus.errors import UserError

Built = TypeVar("Built")


class Bound(NamedTuple):
    """A restriction on an Annotated type: the words for a message, and the test."""

    expected: str
    holds: Callable[[Any], bool]


Text = Annotated[str, Bound("a non-empty string", lambda x: x != "")]
Count = Annotated[int, Bound("an integer of at least 1", lambda x: x >= 1)]
Seed = Annotated[int, Bound("an integer from 0 to 4294967295", lambda x: 0 <= x < 2**32)]
Positive = Annotated[float, Bound("a number above 0", lambda x: x > 0)]
NonNegative = Annotated[float, Bound("a number of at least 0", lambda x: x >= 0)]
Fraction = Annotated[float, Bound("a number from 0 to 1", lambda x: 0 <= x <= 1)]
FractionBelowOne = Annotated[float, Bound("a number from 0 to below 1", lambda x: 0 <= x < 1)]
PositiveFraction = Annotated[float, Bound("a number above 0 and at most 1", lambda x: 0 < x <= 1)]
Smoothing = Annotated[float, Bound("a number from 0 to below 0.5", lambda x: 0 <= x < 0.5)]
PositiveSmoothing = Annotated[float, Bound("a number above 0 and below 0.5", lambda x: 0 < x < 0.5)]


class Invalid(UserError):
    """A problem at a dotted key; the message begins with the key."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}" if key else problem)
        self.key = key


def parse(value: Any, annotation: Any, key: str = "") -> Any:
    """A JSON value as the annotated type; `key` is its own dotted key. Raises Invalid.

    Lists become tuples and whole numbers floats where the annotation says so. A dataclass in a
    dataclass may be left out if none of its keys is required. A dataclass may have one field with
    the metadata "other_keys_such_as", a dict that takes all other keys of its object unchecked. A
    function as the annotation gives a dict of all its keyword-only parameters.
    """
    try:
        _reject_malformed(value, key)
        if inspect.isfunction(annotation):
            keys = keys_of(annotation)
            given = _parse_keys(value, keys, key)
            return {name: given.get(name, default) for name, (_, default) in keys.items()}
        return _parse(value, annotation, key)
    except _UnknownKey as unknown:
        nearest = _nearest(unknown.key, list(dict.fromkeys(_valid_keys(annotation, key))))
        raise Invalid(unknown.key, f"unknown key; {nearest}") from None
    except RecursionError:
        raise Invalid(key, "nested too deeply") from None


def parse_part(value: Mapping[str, Any], build: Callable[..., Built], where: object) -> Built:
    """`build` of an object's values for its fields or keyword-only parameters, which are checked.

    build: a dataclass or a function. Other keys are ignored; `where` begins an error.
    """
    try:
        known = {name: value[name] for name in keys_of(build) if name in value}
        found = parse(known, build)
        return build(**found) if inspect.isfunction(build) else found
    except Invalid as error:
        raise UserError(f"{where}: {error}") from None


def keys_of(owner: Any) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each field of a dataclass, or keyword-only parameter of a function.

    The default is MISSING if the key is required.
    """
    hints = get_type_hints(owner, include_extras=True)
    if is_dataclass(owner):
        defaults = {
            entry.name: (
                entry.default if entry.default_factory is MISSING else entry.default_factory()
            )
            for entry in fields(owner)
        }
        defaults.pop(_rest_field(owner), None)
    else:
        defaults = {
            entry.name: MISSING if entry.default is entry.empty else entry.default
            for entry in inspect.signature(owner).parameters.values()
            if entry.kind is entry.KEYWORD_ONLY
        }
    return {name: (hints[name], default) for name, default in defaults.items()}


def plain(value: Any) -> Any:
    """A parsed value as JSON-able objects, the inverse of `parse`."""
    if is_dataclass(value):
        entries = {entry.name: plain(getattr(value, entry.name)) for entry in fields(value)}
        return entries | entries.pop(_rest_field(type(value)), {})
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def describe(annotation: Any) -> str:
    """The values that an annotation accepts, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return args[1].expected
    if origin in (Union, UnionType, Literal):
        words = [show(arg) if origin is Literal else describe(arg) for arg in args]
        return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if origin is tuple:
        size = "one or more values" if args[-1] is Ellipsis else f"{len(args)} values"
        return f"a list of {size}, each {describe(args[0])}"
    if is_dataclass(annotation):
        return f"an object with the keys {', '.join(entry.name for entry in fields(annotation))}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return {**words, NoneType: "null"}.get(annotation, "an object")


def show(value: Any) -> str:
    """A value as JSON for a message, at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=lambda _: "...")
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(text: str) -> Any:
    """JSON for `parse`, which rejects a key that one object holds twice. Raises JSONDecodeError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            found[name] = _REPEATED if name in found else value
        return found

    # Python limits the digits of an integer with an error of its own; no key needs over 64 bits.
    def integer(digits: str) -> int | float:
        return int(digits) if len(digits) < 20 else float(digits)

    return json.loads(text, object_pairs_hook=unique, parse_int=integer)


def read_option(name: str, text: str | None) -> Any:
    """The value of an option that takes an object. Raises UserError if it is not JSON."""
    try:
        return None if text is None else read_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{name}: not JSON: {error}; expected {{"name": ...}}') from None


_REPEATED = object()  # the value of a repeated key, until `parse` knows its dotted key


class _UnknownKey(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _reject_malformed(node: Any, key: str) -> None:
    """Raise Invalid for repeated keys, NaN, infinities and broken text anywhere in the tree."""
    if node is _REPEATED:
        raise Invalid(key, "occurs twice in one object, expected once")
    if isinstance(node, float) and not math.isfinite(node):
        raise Invalid(key, f"found {show(node)}, expected a finite number")
    if isinstance(node, str) and re.search("[\0\ud800-\udfff]", node):  # no path or UTF-8 text
        raise Invalid(key, f"found {node!a}, expected text without NUL and lone surrogates")
    if isinstance(node, Mapping | list | tuple):
        for name, child in node.items() if isinstance(node, Mapping) else enumerate(node):
            _reject_malformed(child, _join(key, name))


def _parse(value: Any, annotation: Any, key: str) -> Any:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        for member in args:
            if _fits(value, member):
                return _parse(value, member, key)
    elif _fits(value, annotation):
        if is_dataclass(annotation):
            return _parse_dataclass(value, annotation, key)
        if origin is Annotated:
            value = _parse(value, args[0], key)
            if args[1].holds(value):
                return value
        elif origin is tuple:
            members = args[:1] * len(value) if args[-1] is Ellipsis else args
            if value and len(value) == len(members):
                items = enumerate(zip(value, members, strict=True))
                return tuple(_parse(item, member, _join(key, i)) for i, (item, member) in items)
        elif origin is dict:
            return {name: _parse(item, args[1], _join(key, name)) for name, item in value.items()}
        else:
            return float(value) if annotation is float else value
    raise Invalid(key, f"found {show(value)}, expected {describe(annotation)}")


def _fits(value: Any, annotation: Any) -> bool:
    """Whether the value is of the JSON type that the annotation is read from."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True
    if origin is Annotated:
        return _fits(value, args[0])
    if origin is Literal:  # 1 equals True in Python, but not in JSON
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin is tuple:
        return isinstance(value, list | tuple)
    if origin is dict:
        return isinstance(value, Mapping) and all(_fits(item, args[1]) for item in value.values())
    if is_dataclass(annotation):
        return isinstance(value, Mapping)
    if annotation is float and type(value) is int:
        return abs(value) < 2**1023  # larger ones overflow a float
    return type(value) is (NoneType if annotation is None else annotation)


def _parse_dataclass(value: Mapping[str, Any], cls: type, key: str) -> Any:
    keys, rest = keys_of(cls), _rest_field(cls)
    others = {name: value[name] for name in value if rest and name not in keys}
    known = {name: value[name] for name in value if name not in others}
    return cls(**_parse_keys(known, keys, key), **({rest: others} if rest else {}))


def _parse_keys(value: Mapping[str, Any], keys: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The given keys, parsed, and the dataclasses left out; the defaults are the caller's."""
    for name in value:
        if name not in keys:
            raise _UnknownKey(_join(key, name))
    parsed = {}
    for name, (annotation, default) in keys.items():
        at = _join(key, name)
        if name in value:
            parsed[name] = _parse(value[name], annotation, at)
        elif default is MISSING and is_dataclass(annotation):
            parsed[name] = _parse_dataclass({}, annotation, at)
        elif default is MISSING:
            raise Invalid(at, f"missing, expected {describe(annotation)}")
    return parsed


def _rest_field(cls: type) -> str | None:
    """The field that takes an object's other keys."""
    return next((e.name for e in fields(cls) if "other_keys_such_as" in e.metadata), None)


def _nearest(unknown: str, valid: list[str]) -> str:
    """The valid key most like an unknown one: in its object, else one whose name is like its."""
    section, _, name = re.sub(r"\.\d+\.", ".0.", unknown).rpartition(".")
    sections = {key: re.escape(key.rpartition(".")[0]).replace("NAME", "[^.]+") for key in valid}
    same_section = [key for key in valid if re.fullmatch(sections[key], section)]

    def likeness(key: str) -> tuple[float, float]:  # of the names, then of the dotted keys
        pairs = (key.rpartition(".")[2], name), (key, unknown)
        return tuple(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    for pool, least in ((same_section, 0.6), (valid, 0.8)):
        best = max(pool, key=likeness, default=None)
        if best is not None and likeness(best)[0] >= least:
            return f"nearest valid key: {best}"
    return f"valid keys here: {', '.join(same_section) or 'none'}"


def _valid_keys(annotation: Any, key: str) -> Iterator[str]:
    """Every dotted key below an annotation, with 0 for an index into a list and NAME for a name."""
    if is_dataclass(annotation):
        for entry in fields(annotation):
            for name in entry.metadata.get("other_keys_such_as", ()):
                yield _join(key, name)
    if is_dataclass(annotation) or inspect.isfunction(annotation):
        for name, (inner, _) in keys_of(annotation).items():
            yield _join(key, name)
            yield from _valid_keys(inner, _join(key, name))
    inside = {tuple: _join(key, 0), dict: _join(key, "NAME")}.get(get_origin(annotation), key)
    for member in get_args(annotation):
        yield from _valid_keys(member, inside)


def _join(key: str, name: str | int) -> str:
    return f"{key}.{name}" if key else str(name)
