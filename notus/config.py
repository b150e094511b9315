"""The configuration: strict JSON in sections, read into frozen dataclasses.

The dataclasses are the documentation of the keys: what each means, its unit, its default and, as
its type, what it may hold. Adding a key means adding a field. `load_config` reads a file,
`to_dict` gives back what was resolved, and `INERT` says which keys do nothing under which settings.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from notus.errors import UserError


class Bound(NamedTuple):
    """What an annotated type accepts beyond its type: the words for a message, and the test."""

    expected: str
    holds: Callable[[Any], bool]


Text = Annotated[str, Bound("a non-empty string", lambda x: x != "")]
Count = Annotated[int, Bound("an integer of at least 1", lambda x: x >= 1)]
Seed = Annotated[int, Bound("an integer from 0 to 4294967295", lambda x: 0 <= x < 2**32)]
Positive = Annotated[float, Bound("a number above 0", lambda x: x > 0)]
NonNegative = Annotated[float, Bound("a number of at least 0", lambda x: x >= 0)]
Fraction = Annotated[float, Bound("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Decay = Annotated[float, Bound("a number from 0 to below 1", lambda x: 0 <= x < 1)]


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: they alone are trained, the base rests in compute_dtype."""

    rank: Count  # of a layer's change B A: rows of A, columns of B
    alpha: Positive  # the adapters' product is scaled by alpha / rank
    dropout: Decay = 0.0  # probability that an entry of an adapter's input is left out in training
    # linear layers by the end of their name, or "all-linear" for all of the blocks'
    target_modules: tuple[Text, ...] | Literal["all-linear"] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    rslora: bool = False  # scaled by alpha / sqrt(rank) instead
    merge: bool = False  # final/ also gets base and adapters as one model


@dataclass(frozen=True, kw_only=True)
class Model:
    policy: Text  # path or hub id of a Mistral-architecture causal LM (safetensors + tokenizer)
    reference: Text | None = None  # path or hub id; null: the policy's initial weights
    lora: Lora | None = None  # null: every parameter is trained
    # dtype of forward and backward; parameters and optimiser state are float32 either way
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Curation:
    """How rated completions become pairs, and which prompts stay out (of ready pairs too)."""

    # what ranks a row's completions: the mean of UltraFeedback's aspects (Notus), its overall
    # score (Zephyr) as published or corrected, or each response's own rating; null: ready pairs
    rule: Literal["mean-rating", "overall-score", "overall-score-fixed", "rating"] | None = None
    # drawn among the lower ones, the lowest, or drawn among all others, ties too, as for Zephyr
    rejected: Literal["random", "lowest", "zephyr"] = "random"
    decontaminate: tuple[Text, ...] | None = None  # files of benchmark prompts to leave out
    # a benchmark prompt is recognised by its text, also by its words, also by runs of 8 words
    match: Literal["exact", "normalised", "n-grams"] = "n-grams"
    drop_sources: tuple[Text, ...] | None = None  # rows to leave out by their "source"
    # of pairs with the same prompt, or nearly the same, the first alone stays
    duplicates: Literal["keep", "exact", "near"] = "keep"


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of preferences."""

    path: Text  # a .json, .jsonl or .parquet file, a saved dataset, a folder of these, or a hub id
    split: Text | None = None  # null: "train", where the dataset has splits
    weight: Positive = 1.0  # times its rows enter an epoch: 2 = twice, 0.5 = a random half
    format: Text | None = None  # a name from notus/data/preferences.py; null: seen from the rows
    curation: Curation | None = None  # null: the rows are pairs, and all of them enter


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """Evaluation pairs taken out of the training data."""

    holdout: Count  # rows
    seed: Seed | None = None  # of the draw; null: train.seed (the published Notus split: 42)


@dataclass(frozen=True, kw_only=True)
class Data:
    train: tuple[Source, ...]  # what is trained on, mixed by weight; each of them as below
    eval: tuple[Source, ...] | Holdout | None = None  # null: no evaluation
    # training pairs whose prompt is an evaluation pair's, or nearly: kept, or left out
    leaks: Literal["keep", "drop"] = "keep"
    max_length: Count = 1024  # tokens of prompt and response together
    max_prompt_length: Count = 512  # tokens left of a prompt whose pair is too long
    # a pair over max_length: "pair" shortens the prompt from its start, then both responses from
    # their end; "sequence" keeps each sequence's first max_length tokens; "drop" leaves it out
    truncation: Literal["pair", "sequence", "drop"] = "pair"
    # "trl-0.7.4" is the tokenization that Zephyr and Notus were trained with, to the token
    tokenization: Literal["clean", "trl-0.7.4"] = "clean"
    system_prompt: str | None = None  # system turn of rows without one ("": empty); null: none
    shuffle: bool = True  # a new order of pairs in each epoch; false: the files' order in each
    prefix_sharing: bool = True  # a pair's prompt is computed once for both of its responses
    tokens_per_microbatch: Count = 8192  # token slots of one forward pass on one rank


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Every other key of the section is a parameter of the loss, which checks it itself."""

    name: Text = "sigmoid"  # a name from notus/objective/losses.py
    # a weighted sum of losses instead of one: [{"name": ..., "weight": ..., parameters}, ...]
    mix: tuple[dict[str, Any], ...] | None = None
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"other_keys_such_as": ("beta", "label_smoothing")}
    )

    @property
    def section(self) -> dict[str, Any]:
        """The section as written: {"name", **options}, or {"mix": [...], **options}."""
        chosen = {"name": self.name} if self.mix is None else {"mix": list(self.mix)}
        return chosen | self.options


@dataclass(frozen=True, kw_only=True)
class Reference:
    # "cached": computed in one pass and kept on disk; "online": the frozen model runs in every
    # step; "none": for losses that use no reference
    log_probs: Literal["cached", "online", "none"] = "cached"
    # TR-DPO: every so many steps the online reference moves towards the policy by this share
    sync_every: Count | None = None
    sync_share: Fraction = 0.6  # 0: stays where it is; 1: becomes the policy


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The defaults of betas, alpha and eps are torch's own."""

    name: Literal["adamw", "rmsprop"] = "adamw"  # two moments for each parameter, or one
    learning_rate: NonNegative = 5e-7  # the highest of the schedule
    # adamw: each step takes this x the rate off a parameter; rmsprop: adds it to the gradient
    weight_decay: NonNegative = 0.0
    betas: tuple[Decay, Decay] = (0.9, 0.999)  # adamw: decay of the first and second moment
    alpha: Decay = 0.99  # rmsprop: decay of the squared gradient
    eps: NonNegative = 1e-8  # added to the root of the squared gradient's mean, the divisor
    # dtype of the moments; bfloat16 is rounded stochastically. Weights and gradients stay float32.
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    max_grad_norm: Positive = 1.0  # a longer gradient (2-norm over all parameters) is scaled to it


@dataclass(frozen=True, kw_only=True)
class Schedule:
    # what follows the warmup: a fall to 0 at the last step ("linear", "cosine"), or no change
    name: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1  # share of all steps over which the rate rises from 0


@dataclass(frozen=True, kw_only=True)
class Train:
    # "dpo": preference optimisation by `loss`; "sft": negative log-likelihood of the chosen
    # responses (of every answer, in rows that hold a conversation), averaged over their tokens
    objective: Literal["dpo", "sft"] = "dpo"
    pairs_per_step: Count = 64  # pairs of one optimiser step, over all ranks
    epochs: Count = 1  # times that every pair is seen; an epoch's last step takes what is left
    max_steps: Count | None = None  # the run ends here if the epochs hold more; null: no limit
    # updates skipped in a row, because loss or gradient was not finite, after which the run ends
    max_nonfinite: Count = 3
    seed: Seed = 42  # of the order of pairs, adapters, dropout, curation's draws and samples

    @property
    def unit(self) -> str:
        """What a step counts, in words."""
        return "responses" if self.objective == "sft" else "pairs"


@dataclass(frozen=True, kw_only=True)
class Parallel:
    device: Literal["auto", "cpu", "cuda"] = "auto"  # "auto": CUDA where there is a GPU
    shard: Count | None = None  # ranks that divide one copy; null: all ranks / replicate
    replicate: Count = 1  # copies of the sharded model (above 1: hybrid sharding)
    cpu_offload: bool = False  # parameters and optimiser state rest in the host's memory
    keep_gathered: bool = False  # the whole model stays gathered between a step's microbatches
    # what the backward pass computes again: nothing, a block's cheap operations, whole blocks
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    compile: Literal["auto", True, False] = "auto"  # "auto": on CUDA
    # FlexAttention, causal segments (by FlashAttention on CUDA, which does not repeat to the bit),
    # or a whole mask; "auto": "flex" on CUDA; on the CPU "varlen", or "dense" if compiled
    attention: Literal["auto", "flex", "varlen", "dense"] = "auto"
    # the head (kernels/): "triton", "plain" for PyTorch's own operations, "auto": Triton on CUDA
    kernels: Literal["auto", "triton", "plain"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Responses of policy and reference to the same prompts, at each evaluation and at the end."""

    # a JSONL file, each line {"prompt": text or messages} and perhaps "answer", the right response
    prompts: Text
    count: Count = 3  # prompts shown side by side; all are answered
    max_new_tokens: Count = 64  # of one answer
    temperature: NonNegative = 1.0  # 0: the likeliest token each time


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    every: Count | None = 100  # steps; null: at the start and the end only
    samples: Samples | None = None  # null: none


@dataclass(frozen=True, kw_only=True)
class Log:
    every: Count = 1  # steps


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    every: Count | None = 500  # steps; null: never before the end
    keep: Count = 2  # complete checkpoints on disk; older ones are removed


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    data: Data
    loss: Loss
    reference: Reference
    optimizer: Optimizer
    schedule: Schedule
    train: Train
    parallel: Parallel
    evaluation: Evaluation
    log: Log
    checkpoint: Checkpoint
    output_dir: Text  # relative to the working directory


# (key, does it do nothing?, why): an error where the key is given, and left out of `to_dict`.
# `{0}` in the words is the configuration.
Rule = tuple[str, Callable[[Config], bool], str]
# fmt: off
INERT: tuple[Rule, ...] = (
    ("model.reference", lambda c: c.reference.log_probs == "none", 'reference.log_probs is "none"'),
    ("reference.sync_share", lambda c: c.reference.sync_every is None,
     "reference.sync_every is null"),
    ("data.max_prompt_length", lambda c: c.data.truncation != "pair",
     'data.truncation is "{0.data.truncation}", and only "pair" shortens prompts by themselves'),
    ("loss.name", lambda c: c.loss.mix is not None, "loss.mix names the losses"),
    ("loss.name", lambda c: c.train.objective == "sft" and c.loss.name != "sft",
     'train.objective is "sft"'),
    ("data.prefix_sharing", lambda c: c.train.objective == "sft",
     'train.objective is "sft", and its prompts have one response'),
    ("optimizer.betas", lambda c: c.optimizer.name != "adamw", "only adamw uses it"),
    ("optimizer.alpha", lambda c: c.optimizer.name != "rmsprop", "only rmsprop uses it"),
    ("evaluation.every", lambda c: c.data.eval is None, "data.eval is null"),
    ("data.leaks", lambda c: c.data.eval is None, "data.eval is null"),
)

# (key, do the settings contradict each other?, what was found and expected)
CONFLICTS: tuple[Rule, ...] = (
    ("model.lora",
     lambda c: c.model.lora is not None and c.reference.sync_every is not None,
     "found beside reference.sync_every {0.reference.sync_every}, expected one of them: the "
     "reference is the base without adapters, which cannot follow the policy"),
    ("data.train",
     lambda c: any(source.curation == Curation() for source in c.data.train),
     "found a curation that does nothing, expected a rule, or prompts to leave out"),
    ("data.train",
     lambda c: any(s.curation and not s.curation.rule and s.curation.rejected != "random"
                   for s in c.data.train),
     'found a curation with "rejected" and no "rule", expected both, or neither'),
    ("data.train",
     lambda c: any(s.curation and not s.curation.decontaminate and s.curation.match != "n-grams"
                   for s in c.data.train),
     'found a curation with "match" and no "decontaminate", expected both, or neither'),
    ("loss",
     lambda c: c.train.objective == "sft" and (c.loss.mix is not None or bool(c.loss.options)),
     'found {0.loss.section} with train.objective "sft", which has a loss of its own; leave it '
     "out"),
    ("reference.sync_every",
     lambda c: c.reference.sync_every is not None and c.reference.log_probs != "online",
     'found {0.reference.sync_every} with reference.log_probs "{0.reference.log_probs}", expected '
     '"online": cached log-probs cannot follow the policy'),
    ("data.tokenization",
     lambda c: c.data.tokenization == "trl-0.7.4" and c.data.truncation != "pair",
     'found "trl-0.7.4" with data.truncation "{0.data.truncation}", expected "pair", the only '
     "rule of that version"),
    ("data.max_prompt_length",
     lambda c: c.data.truncation == "pair" and c.data.max_prompt_length >= c.data.max_length,
     "found {0.data.max_prompt_length} (the default is 512), expected less than data.max_length, "
     "{0.data.max_length}"),
)
# fmt: on


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a JSON file, with `section.key=value` overrides that win over it.

    An override's value is JSON or, failing that, a plain string; `data.train.0.path=x` reaches into
    lists, and the index one past the end appends. Raises UserError, which names the file or the
    override, the dotted key, what was found and what was expected.
    """
    try:
        tree = _read_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found bytes that are not UTF-8 at {error.start}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not valid JSON at {where}: {error.msg}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {_show(tree)}, expected an object of sections")

    origins: dict[str, str] = {}
    before = _config_or_none(tree)
    for override in overrides:
        _apply_override(tree, override, origins)
    try:
        _reject_malformed(tree, "")
        config = _parse(tree, Config, "")
        _reject_contradictions(config)
        _reject_inert(config, tree, before, origins)
    except _Invalid as error:
        raise UserError(f"{_origin(error.key, origins, path)}: {error.key}: {error}") from None
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as JSON-able objects, without the keys that do nothing in it.

    Written as JSON and read by `load_config`, it gives an equal Config.
    """
    sections = _plain(config)
    for key, is_inert, _ in INERT:
        section, name = key.split(".")
        if is_inert(config):
            del sections[section][name]
    return sections


class _Invalid(Exception):
    """A problem at a dotted key; `load_config` adds where that key was given."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(problem)
        self.key = key


_REPEATED = object()  # the value of a key that occurs twice, until its dotted key is known


def _read_json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        return {name: _REPEATED if names.count(name) > 1 else value for name, value in pairs}

    # Python bounds the digits of an integer by an error of its own; no key needs more than 64 bits.
    def integer(digits: str) -> int | float:
        return int(digits) if len(digits) < 20 else float(digits)

    return json.loads(text, object_pairs_hook=unique, parse_int=integer)


def _apply_override(tree: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    """Sets one key of the tree; `origins` gains that key and every container made on the way."""
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise UserError(f'command line: found "{override}", expected section.key=value')
    try:
        value = _read_json(text)
    except json.JSONDecodeError:
        value = text

    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts, start=1):
        at = ".".join(parts[:depth])
        if isinstance(node, dict):
            index: Any = part
            node.setdefault(index, None)
        elif isinstance(node, list) and part.isdecimal() and int(part) <= len(node):
            index = int(part)
            node.extend([None] * (index == len(node)))
        else:
            problem = f"found {_show(node)} around it, which has no such key or index"
            raise UserError(f"command line, {override}: {at}: {problem}")
        if depth == len(parts):
            node[index] = value
            origins[at] = override
        elif node[index] is None:
            node[index] = [] if parts[depth].isdecimal() else {}
            origins[at] = override
        node = node[index]


def _origin(key: str, origins: dict[str, str], path: str | Path) -> str:
    """The override that gave the key, or the value around it; else the file."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        override = origins.get(prefix, "")
        if override and (prefix == key or override.startswith(f"{prefix}=")):
            return f"command line, {override}"
    return str(path)


def _reject_malformed(node: Any, key: str) -> None:
    """What JSON should not hold, anywhere in the tree: repeated keys, NaN and infinities."""
    if node is _REPEATED:
        raise _Invalid(key, "occurs twice in one object, expected once")
    if isinstance(node, float) and not math.isfinite(node):
        raise _Invalid(key, f"found {_show(node)}, expected a finite number")
    if isinstance(node, dict | list):
        for name, child in node.items() if isinstance(node, dict) else enumerate(node):
            _reject_malformed(child, _join(key, name))


def _config_or_none(tree: dict[str, Any]) -> Config | None:
    """The file's own configuration; None where it is not one before overrides complete it."""
    try:
        return _parse(tree, Config, "")
    except _Invalid:
        return None


def _reject_contradictions(config: Config) -> None:
    for key, contradicts, problem in CONFLICTS:
        if contradicts(config):
            raise _Invalid(key, problem.format(config))


def _reject_inert(
    config: Config, tree: dict[str, Any], before: Config | None, origins: dict[str, str]
) -> None:
    """before: the file without overrides. What an override made inert in it cannot be left out."""
    for key, is_inert, reason in INERT:
        section, name = key.split(".")
        if name not in tree.get(section, {}) or not is_inert(config):
            continue
        overridden = {section, key} & origins.keys()
        if overridden or before is None or is_inert(before):
            raise _Invalid(key, f"has no effect, as {reason.format(config)}; leave it out")


def _parse(value: Any, expected: Any, key: str) -> Any:
    """A JSON value read as the annotation `expected`; raises _Invalid where it does not fit."""
    origin, args = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        for member in args:
            if _fits(value, member):
                return _parse(value, member, key)
    elif _fits(value, expected):
        if is_dataclass(expected):
            return _parse_section(value, expected, key)
        if origin is Annotated:
            value = _parse(value, args[0], key)
            if args[1].holds(value):
                return value
        elif origin is tuple:
            members = args[:1] * len(value) if args[-1] is Ellipsis else args
            if value and len(value) == len(members):
                items = enumerate(zip(value, members, strict=True))
                return tuple(_parse(item, member, _join(key, i)) for i, (item, member) in items)
        else:
            return float(value) if expected is float else value
    raise _Invalid(key, f"found {_show(value)}, expected {describe(expected)}")


def _fits(value: Any, expected: Any) -> bool:
    """Whether the value is of the JSON type that the annotation is read from."""
    origin, args = get_origin(expected), get_args(expected)
    if origin is Annotated:
        return _fits(value, args[0])
    if origin is Literal:  # 1 equals True in Python, and not in JSON
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin is tuple:
        return isinstance(value, list)
    if origin is dict or is_dataclass(expected):
        return isinstance(value, dict)
    return type(value) is expected or (expected is float and type(value) is int)


def _parse_section(value: dict[str, Any], cls: type, key: str) -> Any:
    hints, rest = get_type_hints(cls, include_extras=True), _rest_field(cls)
    known = {entry.name: entry for entry in fields(cls) if entry is not rest}
    others = {name: value[name] for name in value if name not in known}
    if others and rest is None:
        unknown = _join(key, next(iter(others)))
        raise _Invalid(unknown, f"unknown key; {_suggest(unknown)}")
    arguments = {rest.name: others} if rest else {}
    for name, entry in known.items():
        at = _join(key, name)
        if name in value:
            arguments[name] = _parse(value[name], hints[name], at)
        elif is_dataclass(hints[name]):  # a section left out has its defaults, or misses a key
            arguments[name] = _parse_section({}, hints[name], at)
        elif entry.default is MISSING:
            raise _Invalid(at, f"missing, expected {describe(hints[name])}")
    return cls(**arguments)


def _suggest(unknown: str) -> str:
    """The valid key nearest to an unknown one: in its section, else with a name like its own."""
    section, _, name = re.sub(r"\.\d+\.", ".0.", unknown).rpartition(".")
    names = {key: key.rpartition(".")[2] for key in _valid_keys(Config, "")}
    same_section = [key for key in names if key.rpartition(".")[0] == section]
    for pool, cutoff in ((same_section, 0.6), (list(names), 0.8)):
        for near in get_close_matches(name, [names[key] for key in pool], 1, cutoff):
            keys = [key for key in pool if names[key] == near]
            nearest = max(keys, key=lambda key: SequenceMatcher(None, key, unknown).ratio())
            return f"nearest valid key: {nearest}"
    return f"valid keys here: {', '.join(same_section)}"


def _valid_keys(expected: Any, key: str) -> Iterator[str]:
    """Every dotted key below an annotation, with 0 for the index into a list."""
    if is_dataclass(expected):
        rest = _rest_field(expected)
        for name in rest.metadata["other_keys_such_as"] if rest else ():
            yield _join(key, name)
        for name, hint in get_type_hints(expected, include_extras=True).items():
            if rest is None or name != rest.name:
                yield _join(key, name)
                yield from _valid_keys(hint, _join(key, name))
    for member in get_args(expected):
        yield from _valid_keys(member, _join(key, 0) if get_origin(expected) is tuple else key)


def _rest_field(cls: type) -> Field | None:
    """The field that takes a section's other keys, unchecked."""
    return next((entry for entry in fields(cls) if "other_keys_such_as" in entry.metadata), None)


def describe(expected: Any) -> str:
    """What an annotation accepts, in words."""
    origin, args = get_origin(expected), get_args(expected)
    if origin is Annotated:
        return args[1].expected
    if origin in (Union, UnionType, Literal):
        words = [_show(arg) if origin is Literal else describe(arg) for arg in args]
        return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    if origin is tuple:
        size = "one or more values" if args[-1] is Ellipsis else f"{len(args)} values"
        return f"a list of {size}, each {describe(args[0])}"
    if is_dataclass(expected):
        return f"an object with the keys {', '.join(entry.name for entry in fields(expected))}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return {**words, NoneType: "null"}.get(expected, "an object")


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=lambda _: "...")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _join(key: str, name: str | int) -> str:
    return f"{key}.{name}" if key else str(name)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        entries = {entry.name: _plain(getattr(value, entry.name)) for entry in fields(value)}
        rest = _rest_field(type(value))
        others = entries.pop(rest.name) if rest else {}
        return entries | others
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
