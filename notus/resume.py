"""The settings and facts that a run must have in common with the one that it resumes.

The settings of an earlier start and today's are compared after both have been resolved, so that a
key which the earlier program did not have counts with its default.
"""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from notus.build import settings_now
from notus.data.token_arrays import TokenizedPairs
from notus.engine.checkpoint import read_state
from notus.errors import UserError
from notus.files import Plain
from notus.model.hf_config import ModelShape
from notus.strict import show

# Settings that may change between a run and its resumption: none of them changes what is learnt.
MAY_CHANGE = (
    "output_dir",
    "parallel",
    "log",
    "checkpoint",
    "evaluation",
    "data.eval",
    "data.tokens_per_microbatch",
    "data.prefix_sharing",
    "reference.log_probs",
    "reference.cache",
    "train.max_nonfinite",
)
# Places of models and data; a checkpoint holds the hashes of their contents instead.
PATHS = ("model.policy", "model.reference", "data.train")


def settings_that_matter(settings: Plain, ignored: tuple[str, ...] = MAY_CHANGE) -> Plain:
    """The resolved settings by dotted key, without the `ignored` sections and keys."""
    flat = {}
    for section, values in settings.items():
        if isinstance(values, dict):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return {key: v for key, v in flat.items() if not {key, key.split(".")[0]} & set(ignored)}


def are_settings(found: Plain, settings: Plain) -> bool:
    """Whether a JSON object can be a run's settings, by today's keys and types."""
    shared = found.keys() & settings.keys()
    return bool(shared) and all(type(found[key]) is type(settings[key]) for key in shared)


def difference_from(earlier: Plain, settings: Plain) -> str:
    """How an earlier start's settings differ from today's, in words; "" if none that matter do."""
    try:
        before = _resolved(earlier, settings, MAY_CHANGE)
        return differences(before, settings_that_matter(settings))
    except UserError as error:
        return str(error)


def check_checkpoint(folder: Path, common: Plain, settings: Plain) -> None:
    """Refuse a checkpoint of a run that differs in `common`, which `what_must_match` gave.

    settings: today's, resolved. Raises UserError that names what differs.
    """
    state = read_state(folder)
    earlier = state["common"]
    try:
        earlier |= _resolved(state["settings"], settings, MAY_CHANGE + PATHS)
        defaults = {f.name: f.default for f in fields(ModelShape) if f.default is not MISSING}
        earlier["model_shape"] = defaults | earlier["model_shape"]
        different = differences(earlier, common)
    except UserError as error:
        different = str(error)
    if different:
        raise UserError(
            f"{folder}: made by another run ({different}); resume with the settings it was made "
            "with, or start a new run in another output_dir"
        )


def _resolved(earlier: Plain, settings: Plain, ignored: tuple[str, ...]) -> Plain:
    """The settings that matter of an earlier start, under today's keys.

    Those that are `ignored` do not have to be readable: today's take their place.
    """
    matter = settings_that_matter(settings, ignored)
    today = {k: v for k, v in settings_that_matter(settings, ()).items() if k not in matter}
    nested: Plain = {}
    for key, value in (settings_that_matter(earlier, ignored) | today).items():
        section, _, name = key.partition(".")
        nested[section] = nested.get(section, {}) | {name: value} if name else value
    return settings_that_matter(settings_now(nested), ignored)


def what_must_match(
    settings: Plain,
    shape: ModelShape,
    pairs: TokenizedPairs,
    reference: Mapping[str, Any] | None,
    initial: Mapping[str, Any] | None,
    steps: int,
) -> Plain:
    """The facts a run and its resumption must share: settings, model, data, reference, steps."""
    return settings_that_matter(settings, MAY_CHANGE + PATHS) | {
        "model_shape": asdict(shape),
        "tokens_sha256": pairs.fingerprint(),
        "reference_sha256": reference["sha256"] if reference else None,
        "start_sha256": initial["sha256"] if initial else None,
        "steps": steps,
    }


# A reader learns nothing from two hashes; these words say what differs.
HASH_WORDS = {
    "tokens_sha256": "the training pairs' tokens differ (the data, its order or the tokenizer)",
    "reference_sha256": "the reference's weights differ",
    "base_sha256": "the weights under the adapters differ",
    "start_sha256": "the checkpoint whose weights the run began from differs",
}


def differences(before: Plain, now: Plain) -> str:
    """The first three entries that differ, in words, and how many more do; "" if none do."""
    found = list(_differing(before, now))
    words = [
        HASH_WORDS.get(key, f"{key} was {show(one)} and is {show(other)}")
        for key, one, other in found[:3]
    ]
    return "; ".join([*words, f"and {len(found) - 3} more"] if len(found) > 3 else words)


def _differing(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, earlier and present value of each entry of nested objects or lists that differs.

    An entry that one side lacks counts as null there.
    """
    if isinstance(before, list) and isinstance(now, list):
        before, now = ({str(i): item for i, item in enumerate(x)} for x in (before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            at = f"{key}.{name}" if key else name
            yield from _differing(before.get(name), now.get(name), at)
    elif before != now:
        yield key, before, now
