"""The configuration: strict JSON in sections, read into frozen dataclasses.

The dataclasses are the documentation of the keys: the meaning, unit and default of each and, as its
type, the values that it accepts. Adding a key means adding a field. Sections that belong to a
library (adapters, sources, curation) are dataclasses there. INERT lists the keys that have no
effect under other settings.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from notus.curation.curate import Curation
from notus.curation.ratings import SEED
from notus.data.preferences import Source
from notus.errors import UserError
from notus.model.lora import LoraSettings
from notus.strict import (
    Bound,
    Count,
    Fraction,
    FractionBelowOne,
    Invalid,
    NonNegative,
    Positive,
    Seed,
    Text,
    parse,
    plain,
    read_json,
    show,
)


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    policy: Text  # path or hub id of a causal LM of a family in docs/models.md
    reference: Text | None = None  # path or hub id; null: the policy's initial weights
    lora: LoraSettings | None = None  # null: every parameter is trained
    # dtype of forward and backward; parameters and optimiser state are float32 either way
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """Evaluation pairs taken out of the training data."""

    holdout: Count  # rows
    seed: Seed | None = None  # of the draw; null: data.seed (the published Notus split: 42)


# Sources by name. The names become parts of metrics' names, some of which have a "/" themselves.
Named = Annotated[
    dict[str, Source],
    Bound(
        'sources by name, a name being of letters, digits, "_" and "-" and not holdout, seed, '
        "rewards, logps or displacement",
        lambda sources: bool(sources) and all(map(_is_set_name, sources)),
    ),
]


def _is_set_name(name: str) -> bool:
    taken = ("holdout", "seed", "rewards", "logps", "displacement")
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) is not None and name not in taken


@dataclass(frozen=True, kw_only=True)
class DataSection:
    train: tuple[Source, ...]  # the training data, mixed by weight; each source as below
    # null: no evaluation; sources by name have metrics of their own too, eval_NAME/...
    eval: tuple[Source, ...] | Named | Holdout | None = None
    # training pairs whose prompt is that of an evaluation pair, or nearly: kept, or left out
    leaks: Literal["keep", "drop"] = "keep"
    max_length: Count = 1024  # tokens of prompt and response together
    max_prompt_length: Count = 512  # tokens left of a prompt whose pair is too long
    # a pair over max_length: "pair" shortens the prompt from its start, then both responses from
    # their end; "sequence" keeps each sequence's first max_length tokens; "drop" leaves it out
    truncation: Literal["pair", "sequence", "drop"] = "pair"
    # "trl-0.7.4" is, token for token, the tokenization that Zephyr and Notus were trained with
    tokenization: Literal["clean", "trl-0.7.4"] = "clean"
    system_prompt: str | None = None  # system turn of rows without one ("": empty); null: none
    # of curation's draws, of parts of sources and of held-out rows; where it is set, runs with
    # another train.seed have the same pairs and share a reference pass; null: train.seed
    seed: Seed | None = None
    shuffle: bool = True  # a new order of pairs in each epoch; false: the files' order in each
    prefix_sharing: bool = True  # a pair's prompt is computed once for both of its responses
    tokens_per_microbatch: Count = 8192  # token slots of one forward pass on one rank

    @property
    def eval_sources(self) -> tuple[Source, ...] | dict[str, Source]:
        """The sources of evaluation pairs; none where those are taken out of the training data."""
        return () if self.eval is None or isinstance(self.eval, Holdout) else self.eval


@dataclass(frozen=True, kw_only=True)
class LossSection:
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
class ReferenceSection:
    # "cached": computed in one pass and kept on disk; "online": the frozen model runs in every
    # step; "none": for losses that use no reference
    log_probs: Literal["cached", "online", "none"] = "cached"
    # the folder of cached log-probs, which runs share; null: reference-cache next to output_dir, or
    # where that cannot be written, or output_dir is a mount point, output_dir/reference
    cache: Text | None = None
    # TR-DPO: every so many steps the online reference moves towards the policy by this share
    sync_every: Count | None = None
    sync_share: Fraction = 0.6  # 0: does not move; 1: becomes the policy


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """The defaults of betas, alpha and eps are torch's own."""

    name: Literal["adamw", "rmsprop"] = "adamw"  # two moments for each parameter, or one
    learning_rate: NonNegative = 5e-7  # the highest of the schedule
    # adamw: each step shrinks a parameter by this x the rate; rmsprop: adds this x the parameter
    # to its gradient
    weight_decay: NonNegative = 0.0
    # adamw: decay of the first and second moment
    betas: tuple[FractionBelowOne, FractionBelowOne] = (0.9, 0.999)
    alpha: FractionBelowOne = 0.99  # rmsprop: decay of the squared gradient
    eps: NonNegative = 1e-8  # added to the root of the squared gradient's mean, the divisor
    # dtype of the moments; bfloat16 is rounded stochastically. Weights and gradients stay float32.
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    max_grad_norm: Positive = 1.0  # a longer gradient (2-norm over all parameters) is scaled to it


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    # after the warmup: a fall to 0 at the last step ("linear", "cosine"), or no change
    name: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1  # share of all steps over which the rate rises from 0


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    # "dpo": preference optimisation by `loss`; "sft": negative log-likelihood of the chosen
    # responses (of every answer, in rows that hold a conversation), averaged over their tokens
    objective: Literal["dpo", "sft"] = "dpo"
    pairs_per_step: Count = 64  # pairs of one optimiser step, over all ranks
    epochs: Count = 1  # times that every pair is seen; an epoch's last step takes what is left
    max_steps: Count | None = None  # the run ends here if the epochs hold more; null: no limit
    # updates skipped in a row, because loss or gradient was not finite, after which the run ends
    max_nonfinite: Count = 3
    seed: Seed = SEED  # of the order of pairs, adapters, dropout, samples and, by default, data

    @property
    def unit(self) -> str:
        """The noun for the examples that a step counts."""
        return "responses" if self.objective == "sft" else "pairs"


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    device: Literal["auto", "cpu", "cuda"] = "auto"  # "auto": CUDA where there is a GPU
    shard: Count | None = None  # ranks that divide one copy; null: all ranks / replicate
    replicate: Count = 1  # copies of the sharded model (above 1: hybrid sharding)
    cpu_offload: bool = False  # parameters and optimiser state are kept in the host's memory
    # the model stays gathered between a step's microbatches; "auto": on GPUs with the memory for it
    keep_gathered: Literal["auto", True, False] = "auto"
    # recomputed in the backward pass: nothing, a block's cheap operations, or entire blocks
    activation_checkpointing: Literal["none", "selective", "full"] = "full"
    compile: Literal["auto", True, False] = "auto"  # "auto": on CUDA
    # FlexAttention, causal segments (by FlashAttention on CUDA, where repeated runs differ in
    # rounding), or a dense mask; "auto": "flex" on CUDA; on the CPU "varlen", "dense" if compiled
    attention: Literal["auto", "flex", "varlen", "dense"] = "auto"
    # the head (kernels/): "triton", "plain" for PyTorch's own operations, "auto": Triton on CUDA
    kernels: Literal["auto", "triton", "plain"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Responses of policy and reference to the same prompts, at each evaluation and at the end."""

    # a JSONL file, each line {"prompt": text or messages}, optionally "answer", the right response
    prompts: Text
    count: Count = 3  # prompts shown side by side; all are answered
    max_new_tokens: Count = 64  # of one answer
    temperature: NonNegative = 1.0  # 0: the likeliest token each time


@dataclass(frozen=True, kw_only=True)
class EvaluationSection:
    every: Count | None = 100  # steps; null: only at the start and the end
    samples: Samples | None = None  # null: none
    # a metric of the evaluation, such as "eval_loss" or "eval_NAME/loss": the best checkpoint by it
    # stays next to the newest ones; null: only those stay
    best: Text | None = None
    export_best: bool = False  # final/ holds the weights of the best checkpoint, not of the last


@dataclass(frozen=True, kw_only=True)
class LogSection:
    every: Count = 1  # steps
    # where metrics go besides metrics.jsonl; "wandb" and "trackio" are extras; null: nowhere
    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] | None = ("tensorboard",)
    project: Text = "notus"  # of the run in W&B and Trackio
    name: Text | None = None  # of the run there; null: the folder's
    tags: tuple[Text, ...] | None = None  # of the run there

    @property
    def has_service(self) -> bool:
        """Whether there is a sink that knows projects, names and tags."""
        return bool({"wandb", "trackio"} & {*(self.to or ())})


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    every: Count | None = 500  # steps; null: never before the end
    keep: Count = 2  # complete checkpoints on disk; older ones are removed


@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelSection
    data: DataSection
    loss: LossSection
    reference: ReferenceSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    train: TrainSection
    parallel: ParallelSection
    evaluation: EvaluationSection
    log: LogSection
    checkpoint: CheckpointSection
    output_dir: Text  # relative to the working directory; "~" is the home folder


def _curations(config: Config) -> list[Curation]:
    return [source.curation for source in config.data.train if source.curation]


# (key, has it no effect?, why): giving the key is an error, and `to_dict` leaves it out.
# `{0}` in the words is the configuration.
Rule = tuple[str, Callable[[Config], bool], str]
# fmt: off
INERT: tuple[Rule, ...] = (
    ("model.reference", lambda c: c.reference.log_probs == "none", 'reference.log_probs is "none"'),
    ("reference.cache", lambda c: c.reference.log_probs != "cached",
     'reference.log_probs is "{0.reference.log_probs}"'),
    ("reference.sync_share", lambda c: c.reference.sync_every is None,
     "reference.sync_every is null"),
    ("data.max_prompt_length", lambda c: c.data.truncation != "pair",
     'data.truncation is "{0.data.truncation}", and only "pair" shortens prompts separately'),
    ("loss.name", lambda c: c.loss.mix is not None, "loss.mix names the losses"),
    ("loss.name", lambda c: c.train.objective == "sft" and c.loss.name != "sft",
     'train.objective is "sft"'),
    ("data.prefix_sharing", lambda c: c.train.objective == "sft",
     'train.objective is "sft", and its prompts have one response'),
    ("optimizer.betas", lambda c: c.optimizer.name != "adamw", "only adamw uses it"),
    ("optimizer.alpha", lambda c: c.optimizer.name != "rmsprop", "only rmsprop uses it"),
    ("evaluation.every", lambda c: c.data.eval is None, "data.eval is null"),
    ("evaluation.best", lambda c: c.data.eval is None, "data.eval is null"),
    ("evaluation.export_best", lambda c: c.data.eval is None or c.evaluation.best is None,
     "evaluation.best is null"),
    ("log.project", lambda c: not c.log.has_service, 'log.to has neither "wandb" nor "trackio"'),
    ("log.name", lambda c: not c.log.has_service, 'log.to has neither "wandb" nor "trackio"'),
    ("log.tags", lambda c: not c.log.has_service, 'log.to has neither "wandb" nor "trackio"'),
    ("data.leaks", lambda c: c.data.eval is None, "data.eval is null"),
)

# (key, do the settings contradict each other?, what was found and expected)
CONFLICTS: tuple[Rule, ...] = (
    ("model.lora",
     lambda c: c.model.lora is not None and c.reference.sync_every is not None,
     "found with reference.sync_every {0.reference.sync_every}, expected only one of them: the "
     "reference is the base without adapters, which cannot follow the policy"),
    ("data.train", lambda c: Curation() in _curations(c),
     "found a curation that does nothing, expected a rule, or prompts to leave out"),
    ("data.train",
     lambda c: any(not x.rule and x.rejected != "random" for x in _curations(c)),
     'found a curation with "rejected" and no "rule", expected both, or neither'),
    ("data.train", lambda c: any(not x.rule and x.decides for x in _curations(c)),
     'found a curation with "min_margin", "min_chosen" or "agree" and no "rule", expected both, or '
     "neither"),
    ("data.train",
     lambda c: any(not x.decontaminate and x.match != "n-grams" for x in _curations(c)),
     'found a curation with "match" and no "decontaminate", expected both, or neither'),
    ("loss",
     lambda c: c.train.objective == "sft" and (c.loss.mix is not None or bool(c.loss.options)),
     'found {0.loss.section} with train.objective "sft", which has its own loss; leave it '
     "out"),
    ("reference.sync_every",
     lambda c: c.reference.sync_every is not None and c.reference.log_probs != "online",
     'found {0.reference.sync_every} with reference.log_probs "{0.reference.log_probs}", expected '
     '"online": cached log-probs cannot follow the policy'),
    ("evaluation.best",
     lambda c: c.evaluation.best is not None
               and not (c.evaluation.every and c.checkpoint.every
                        and c.checkpoint.every % c.evaluation.every == 0),
     "found with checkpoint.every {0.checkpoint.every} and evaluation.every {0.evaluation.every}, "
     "expected a multiple: a checkpoint is judged by the evaluation at its step"),
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
    """Read a JSON file, with `section.key=value` overrides that win over it.

    An override's value is JSON or else a plain string; `data.train.0.path=x` reaches into lists,
    and the index one past the end appends. Raises UserError, which names the file or the
    override, the dotted key, what was found and what was expected.
    """
    try:
        tree = read_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8 either, or nested too deeply
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: found {show(tree)}, expected an object of sections")

    origins: dict[str, str] = {}
    before = None
    with suppress(Invalid):  # what a file lacks, overrides may give
        before = parse(tree, Config)
    for override in overrides:
        _apply_override(tree, override, origins)
    try:
        config = parse(tree, Config)
        config = replace(config, output_dir=os.path.expanduser(config.output_dir))
        if config.output_dir.startswith("~"):
            problem = f"found {show(config.output_dir)}, expected a path: no such home folder"
            raise Invalid("output_dir", problem)
        for key, contradicts, problem in CONFLICTS:
            if contradicts(config):
                raise Invalid(key, problem.format(config))
        for key, is_inert, reason in INERT:
            section, name = key.split(".")
            if name in tree.get(section, {}) and is_inert(config):
                # A key of the file that loses its effect by an override is no error.
                if {section, key} & origins.keys() or before is None or is_inert(before):
                    raise Invalid(key, f"has no effect, as {reason.format(config)}; leave it out")
    except Invalid as error:
        raise UserError(f"{_origin(error.key, origins, path)}: {error}") from None
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as JSON-able objects, without the keys that have no effect.

    Written as JSON and read by `load_config`, it gives an equal Config.
    """
    sections = plain(config)
    for key, is_inert, _ in INERT:
        section, name = key.split(".")
        if is_inert(config):
            del sections[section][name]
    return sections


def _apply_override(tree: dict[str, Any], override: str, origins: dict[str, str]) -> None:
    """Set one key of the tree; `origins` gains that key and every container made on the way."""
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise UserError(f'command line: found "{override}", expected section.key=value')
    try:
        value = read_json(text)
    except (json.JSONDecodeError, RecursionError):
        value = text

    node: Any = tree
    parts: list[Any] = key.split(".")
    for depth, part in enumerate(parts, start=1):
        at, last = ".".join(parts[:depth]), depth == len(parts)
        if isinstance(node, dict):
            node.setdefault(part, None)
        elif isinstance(node, list) and part.isdecimal() and int(part) <= len(node):
            part = int(part)
            node.extend([None] * (part == len(node)))
        else:
            problem = f"found {show(node)} around it, which has no such key or index"
            raise UserError(f"command line, {override}: {at}: {problem}")
        if last or node[part] is None:
            node[part] = value if last else [] if parts[depth].isdecimal() else {}
            origins[at] = override
        node = node[part]


def _origin(key: str, origins: dict[str, str], path: str | Path) -> str:
    """The override that gave the key or the object around it; else the file."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        override = origins.get(prefix, "")
        if override and (prefix == key or override.startswith(f"{prefix}=")):
            return f"command line, {override}"
    return str(path)
