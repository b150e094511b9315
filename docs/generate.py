"""Writes docs/configuration.md, losses.md and hardware.md: `python docs/generate.py`.

The first is made from notus/config.py: a key's meaning is the comment at its field there, the lines
above it and the end of its own line. The second holds the docstrings of notus/objective/losses.py.
The third is the dry run's report on configs/notus.json, with pairs whose lengths follow LENGTHS.
"""

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.memory import MISTRAL_7B  # noqa: E402
from notus.build import build_plan, make_loss  # noqa: E402
from notus.config import CONFLICTS, INERT, Config, Rule, load_config  # noqa: E402
from notus.data.tokenization import TokenizedPairs  # noqa: E402
from notus.dryrun.estimate import UTILISATION, Estimate, usable  # noqa: E402
from notus.dryrun.memory import parameter_counts  # noqa: E402
from notus.dryrun.report import gpu_row  # noqa: E402
from notus.engine.flops import GIB, GPUS, gpu_named  # noqa: E402
from notus.objective import losses  # noqa: E402
from notus.strict import describe, parse  # noqa: E402

HEAD = """# Configuration

Generated from `notus/config.py` by `python docs/generate.py`. A configuration is a JSON file of
these sections; `section.key=value` on the command line wins over it. An unknown, missing, mistyped
or inert key is an error that names the key, where it was given, and the nearest valid one.
"""

# The values that the page shows where a message names what it found.
EXAMPLE = {
    "model": {"policy": "MODEL"},
    "data": {
        "train": [{"path": "DATA"}],
        "truncation": "sequence",
        "max_length": 1024,
        "max_prompt_length": 2048,
    },
    "loss": {"name": "sigmoid", "beta": 0.1},
    "reference": {"log_probs": "cached", "sync_every": 100},
    "output_dir": "RUN",
}


def comments(cls: type) -> dict[str, str]:
    """The comment at each field of a dataclass, by name."""
    source, first = inspect.getsourcelines(cls)
    tree = ast.parse("".join(source))
    lines = [line.rstrip("\n") for line in source]
    found = {}
    for node in tree.body[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.strip().startswith("#"):
                break
            above.insert(0, line.strip().removeprefix("#").strip())
        _, _, own = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")
        found[node.target.id] = " ".join([*above, own.strip()]).strip()
    return found


def sections(cls: type, key: str) -> Iterator[tuple[str, type]]:
    """Every dataclass below the configuration, with the dotted key that holds it."""
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for part, suffix in members(hint):
            dotted = f"{key}.{name}" if key else name
            yield dotted + suffix, part
            yield from sections(part, dotted + suffix)


def members(hint: Any) -> Iterator[tuple[type, str]]:
    """The dataclasses that an annotation may hold; `.0` where they are in a list."""
    if is_dataclass(hint):
        yield hint, ""
    for argument in get_args(hint):
        for part, suffix in members(argument):
            inside = {tuple: ".0", dict: ".NAME"}.get(getattr(hint, "__origin__", None), "")
            yield part, inside + suffix


def rows(cls: type) -> Iterator[str]:
    """A table row for each key of a section that is not a section itself."""
    hints, meaning = get_type_hints(cls, include_extras=True), comments(cls)
    for field in fields(cls):
        if is_dataclass(hints[field.name]) or field.default_factory is not MISSING:
            continue
        default = "required" if field.default is MISSING else json.dumps(field.default)
        expected = describe(hints[field.name]).replace("|", "\\|")
        yield f"| `{field.name}` | {default} | {expected} | {meaning[field.name]} |"


def rules(table: tuple[Rule, ...]) -> list[str]:
    """A line for each rule of the configuration, with its message for EXAMPLE."""
    example = parse(EXAMPLE, Config)
    return [f"- `{key}`: {words.format(example)}" for key, _, words in table]


def configuration() -> str:
    """The complete page."""
    parts = [HEAD]
    places: dict[type, list[str]] = {Config: []}
    for key, cls in sections(Config, ""):
        places.setdefault(cls, []).append(f"`{key}`")
    for cls, keys in places.items():
        table = list(rows(cls))
        title = f"## {', '.join(keys) or 'At the top'}"
        text = inspect.getdoc(cls) or ""
        text = "" if text.startswith(f"{cls.__name__}(") else f"\n{text}\n"
        head = "\n| key | default | expected | meaning |\n|---|---|---|---|\n"
        if table:
            parts.append(f"{title}\n{text}{head}" + "\n".join(table) + "\n")
    parts.append("## Keys without effect\n\nAn error each. The reasons, with example values:\n")
    parts += rules(INERT)
    parts.append("\n## Settings that contradict each other\n\nThe messages, with example values:\n")
    parts += rules(CONFLICTS)
    return "\n".join(parts) + "\n"


# -------------------------------------------------------------------------------------- the losses

LOSSES = """# Losses

Generated from `notus/objective/losses.py` by `python docs/generate.py`. `loss.name` picks one, the
options below are keys of `loss`, and an option of another loss is an error. `loss.mix` adds
several, each with a `weight`:
`"loss": {{"mix": [{{"name": "sigmoid"}}, {{"name": "sft", "weight": 0.1}}]}}`.

| for | losses |
|---|---|
| the published recipes of Zephyr and Notus | `sigmoid` |
| labels of which a share is wrong | `sigmoid` with `label_smoothing`, `robust` |
| rewards that must not grow without bound on pairs that are already right | `ipo`, `hinge` |
| responses of very different lengths | `sigmoid_norm`, `simpo`, `ipo` |
| no reference model | `simpo`, `orpo` |
| chosen responses that must not become less likely | `dpop`, `rpo`, `apo_zero`, `nca_pair` |
| chosen responses that are worse than the policy's own | `apo_down` |
| responses that another model wrote | `wpo` |

{notation}
"""


def loss_section(name: str) -> str:
    """A loss's docstring, what it needs, and its options."""
    entry = losses.LOSSES[name]
    hints = get_type_hints(entry.function, include_extras=True)
    lines = [f"## `{name}`", "", inspect.getdoc(entry.function), ""]
    needs = {
        "It reads the policy's distribution over the vocabulary at each token.": entry.uses_weights,
        "A value depends on the step's other pairs, so each step scores them once more before its "
        "backward pass.": entry.couples_pairs,
    }
    lines += [text for text, needed in needs.items() if needed]
    for option in inspect.signature(entry.function).parameters.values():
        if option.kind is option.KEYWORD_ONLY:
            default = json.dumps(option.default)
            lines.append(f"- `{option.name}`: {describe(hints[option.name])}; default {default}")
    return "\n".join(lines).rstrip() + "\n"


def losses_page() -> str:
    """The complete page."""
    notation = inspect.getdoc(losses).partition("Notation in the docstrings: ")[2]
    head = LOSSES.format(notation=f"In the formulas {notation}")
    return "\n".join([head, *map(loss_section, losses.LOSSES)])


# ------------------------------------------------------------------------------------ the hardware

PAIRS = 61_619  # to train on, of the published split
QUANTILES = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)  # percent
# Tokens at those: of 994 UltraFeedback pairs after the recipe's tokenization and truncation.
LENGTHS = {
    "prompt": (4, 13, 19, 31, 57, 84, 120, 173, 299, 487, 512, 690, 948),
    "chosen": (2, 21, 47, 86, 153, 234, 341, 449, 512, 629, 734, 890, 956),
    "rejected": (2, 22, 52, 99, 144, 206, 290, 365, 487, 534, 622, 838, 1004),
}

HARDWARE = """# Which GPUs, how many

Generated by `python docs/generate.py`: the report of `--dry-run` without `--gpu` on
`configs/notus.json` (full fine-tuning of 7B, {optimizer}, float32 masters, recomputed activations,
rows of {slots:,} tokens), {steps:,} steps over {pairs:,} pairs whose lengths are drawn from a
sample of UltraFeedback (on average {prompt:.0f} prompt tokens, {chosen:.0f} and {rejected:.0f}
response tokens). The number of GPUs is a power of two. All numbers are predictions: memory by the
formulae of `notus/dryrun/memory.py`, hours at {share:.0%} of each data sheet's dense bfloat16 peak,
with one reference pass and {evaluations} evaluations of {held_out:,} held-out pairs. No line has
been measured yet.

| GPU | memory | one is enough | needed | hours | GPU-hours |
|---|--:|---|--:|--:|--:|
{table}

On 8 x a100-40gb, as in the published run, a GPU's peak is {peak} GiB of {usable} that tensors can
use, without CPU offload, {kept} with the weights gathered once a step (`parallel.keep_gathered`,
on by default where it fits), and {selective} with
`parallel.activation_checkpointing=selective`.

GPUs without fast links between them (the last five) are slowed by gathering the weights, which is
not counted here. For your own data, model and settings:

```
python train.py configs/notus.json --dry-run
```

With fewer GPUs than needed, cheapest first: `optimizer.state_dtype=bfloat16`,
`parallel.cpu_offload=true`, or adapters ([lora.md](lora.md)), which keep the base in two bytes a
parameter.
"""


def ultrafeedback_like(count: int, longest: int) -> TokenizedPairs:
    """`count` pairs whose lengths are drawn independently from LENGTHS; their tokens are 0.

    A response is cut where prompt and response have `longest` tokens together.
    """
    drawn = np.random.default_rng(0).random((count, 3))
    columns = zip(drawn.T, LENGTHS.values(), strict=True)
    at = np.array(QUANTILES) / 100
    lengths = np.stack([np.interp(column, at, tokens) for column, tokens in columns], 1)
    lengths = lengths.round().astype(np.int64)
    lengths[:, 1:] = np.minimum(lengths[:, 1:], longest - lengths[:, :1])
    total = int(lengths.sum())
    return TokenizedPairs(np.zeros(total, np.int32), np.zeros(total, bool), lengths)


def notus_estimate() -> Estimate:
    """The published recipe on one GPU."""
    config = load_config(ROOT / "configs" / "notus.json")
    pairs = ultrafeedback_like(PAIRS, config.data.max_length)
    held_out = ultrafeedback_like(config.data.eval.holdout, config.data.max_length)
    plan = build_plan(config, pairs, 1)
    return Estimate(
        config=config,
        gpus=1,
        shape=MISTRAL_7B,
        counts=parameter_counts(MISTRAL_7B, None),
        loss=make_loss(config),
        reference_is_base=False,
        pairs=pairs,
        held_out=held_out,
        steps=[plan.pairs_of(step) for step in range(plan.steps)],
    )


def hardware() -> str:
    """The complete page."""
    estimate = notus_estimate()
    published = estimate.on_gpus(8)
    selective = published.with_setting("parallel.activation_checkpointing", "selective")
    gathered = published.with_setting("parallel.keep_gathered", True)
    return HARDWARE.format(
        optimizer={"rmsprop": "RMSprop", "adamw": "AdamW"}[estimate.config.optimizer.name],
        slots=estimate.config.data.tokens_per_microbatch,
        steps=len(estimate.steps),
        pairs=PAIRS,
        share=UTILISATION[1],
        evaluations=estimate.evaluations,
        held_out=len(estimate.held_out),
        table="\n".join(f"| {' | '.join(gpu_row(estimate, gpu))} |" for gpu in GPUS),
        peak=f"{published.memory.peak / GIB:.1f}",
        kept=f"{gathered.memory.peak / GIB:.1f}",
        selective=f"{selective.memory.peak / GIB:.1f}",
        usable=f"{usable(gpu_named('a100-40gb')) / GIB:.1f}",
        **dict(zip(LENGTHS, estimate.pairs.lengths.mean(0), strict=True)),
    )


if __name__ == "__main__":
    (ROOT / "docs" / "configuration.md").write_text(configuration())
    (ROOT / "docs" / "losses.md").write_text(losses_page())
    (ROOT / "docs" / "hardware.md").write_text(hardware())
