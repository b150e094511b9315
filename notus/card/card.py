"""final/README.md, the model card of a finished run, made of what its folder says.

    python -m notus.card RUN [--push-to-hub REPO]

Every number is read from the files of output_dir: config.json, metrics.jsonl, history.jsonl, the
newest checkpoint's state.json, evals/*.json (what `eval.py ... --json` wrote there) and the
manifest of curated training data. train.py writes the card when a run ends; this command does so
again, after evaluations, say. The card is to be published: `public_path` says what of a path.
"""

import argparse
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import EvalResult, HfApi, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from notus.card.curves import draw_curves, panels
from notus.engine.checkpoint import checkpoints
from notus.engine.history import read_history
from notus.errors import UserError
from notus.evals.comparison import STEP, differences_at, recipe_notes
from notus.evals.published import DPO_RUNS, LEADERBOARD_TASKS, DpoRun
from notus.files import read_object

Plain = dict[str, Any]
Cell = str | float | int | None

# Keys of the configuration whose strings, or lists of strings, name files, folders or hub ids.
PLACES = {"policy", "reference", "path", "decontaminate", "prompts", "output_dir"}
CURVES_EXTRA = "pip install -e '.[report]'"
ROWS_WITHOUT_FIGURES = 10
# What the hub's HTTP client raises, whichever client its version uses, when there is no network.
HUB_ERRORS = (HfHubHTTPError, *HfHubHTTPError.__bases__, HFValidationError)


class Identity(NamedTuple):
    """What the hub wants to know of a model and the run's folder may not tell.

    license: the hub's name of it. base_model, datasets: hub ids, where the run used local copies.
    repository: where the model is uploaded to, which the card's example then loads.
    """

    license: str = "unknown"
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    repository: str = "PATH OR REPO"


class Record(NamedTuple):
    """A finished run as its output_dir describes it.

    training, evaluations: the lines of metrics.jsonl that hold either, by step. starts: the runs of
    the program, oldest first, each with its "end", if it was noted. state: the newest checkpoint's.
    """

    folder: Path
    settings: Plain
    training: list[Plain]
    evaluations: list[Plain]
    starts: list[Plain]
    state: Plain

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def is_sft(self) -> bool:
        return self.settings["train"]["objective"] == "sft"

    @property
    def unit(self) -> str:
        """What the data sets and steps count."""
        return "responses" if self.is_sft else "pairs"

    @property
    def lora(self) -> Plain | None:
        return self.settings["model"].get("lora")

    @property
    def data(self) -> Plain:
        """What became of each data set: {"train": {"pairs", "counts"}, "eval": ...}."""
        return self.starts[-1]["data"] if self.starts else {}

    @property
    def held_out_pairs(self) -> int | None:
        return self.data.get("eval", {}).get("pairs")

    def is_local(self, path: str) -> bool:
        """Whether a model or dataset was on the machine itself, and not from the hub."""
        told_in_part = public_path(path) != path  # no hub id looks like that
        return told_in_part or not self.starts or path in self.starts[-1]["local"]


def read_record(run: Path) -> Record:
    """All that the card is made of. Raises UserError for a run that has not ended or logged."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics}: no such file; expected the output_dir of a run")
    lines: list[Plain] = []
    try:
        for line in metrics.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(
            f"{metrics}:{len(lines) + 1}: not valid JSON ({error}); a line of metrics was expected"
        ) from None
    training = [line for line in lines if "loss" in line]
    if not training:
        raise UserError(f"{metrics}: no training step is logged there; a card needs at least one")
    if not (run / "final").is_dir():
        raise UserError(
            f"{run / 'final'}: no such folder, so the run has not ended; start the same train.py "
            "command again, it goes on"
        )
    saved = checkpoints(run / "checkpoints")
    return Record(
        folder=run,
        settings=read_object(run / "config.json"),
        training=training,
        evaluations=[line for line in lines if "eval_loss" in line],
        starts=list(_starts(read_history(run))),
        state=read_object(saved[-1] / "state.json") if saved else {},
    )


def _starts(events: Iterable[Plain]) -> Iterator[Plain]:
    """The starts among the events, each with the end that follows it, if one does."""
    current = None
    for event in events:
        if event["event"] == "end":
            assert current is not None
            current["end"] = event["time"]
            continue
        if current is not None:
            yield current
        current = dict(event)
    if current is not None:
        yield current


UNKNOWN = Identity()


def write_card(run: Path, identity: Identity = UNKNOWN, price: float | None = None) -> Path:
    """Write final/README.md and its figures, in place of earlier ones; returns the card's path.

    price: of one GPU for one hour, for what the run has cost. Without matplotlib (the extra
    `report`) a small table takes the figures' place. Raises UserError
    when the run has not ended, has logged nothing, has a price and no GPU-hours, or the files
    cannot be written.
    """
    record = read_record(run)
    if price is not None and not gpu_hours(record):
        raise UserError(
            f"--price {price:g}: {run / 'history.jsonl'} tells of no hours on a GPU; leave it out"
        )
    final = run / "final"
    try:
        shutil.rmtree(final / "figures", ignore_errors=True)
        figures = []
        if find_spec("matplotlib"):
            per_epoch = record.state.get("steps_per_epoch")
            figures = draw_curves(
                final / "figures", record.training, record.evaluations, per_epoch, record.is_sft
            )
        partial = final / "README.partial"
        partial.write_text(card(record, identity, figures, price), encoding="utf-8")
        os.replace(partial, final / "README.md")
    except OSError as error:
        raise UserError(f"{final / 'README.md'}: cannot be written ({error.strerror})") from None
    return final / "README.md"


def card(
    record: Record, identity: Identity, figures: Sequence[str], price: float | None = None
) -> str:
    """The whole text: front matter and sections.

    figures: names of the PNGs in final/figures/. price: of one GPU for one hour.
    """
    sections: list[tuple[str, Iterable[str]]] = [
        ("", introduction(record, identity)),
        ("Use", usage(record, identity)),
        ("On held-out pairs", held_out_section(record)),
        ("Training", training_section(record, figures)),
        ("Other evaluations", other_evaluations(record)),
        ("Recipe", recipe_section(record)),
        ("Data", data_section(record)),
        ("Environment and cost", environment_section(record, price)),
        ("Repeating it", repeating_section(record)),
        ("Limits and contamination", limits_section(record)),
    ]
    lines = ["---", front_matter(record, identity).to_yaml().strip(), "---", "", f"# {record.name}"]
    for title, content in sections:
        body = list(content)
        if body:
            lines += ["", f"## {title}", "", *body] if title else ["", *body]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------------------------- the paths


def public_path(path: str) -> str:
    """A path as a published card may tell it.

    Hub ids, and relative paths that stay below the working directory, are told as they were given.
    Of any other path only the last part: the rest is about somebody's machine.
    """
    place = Path(path)
    outside = place.is_absolute() or place.parts[:1] == ("~",) or ".." in place.parts
    return place.name if outside else path


def public_settings(value: Any, key: str = "") -> Any:
    """A configuration, or a part of it under `key`, with its paths as `public_path`."""
    if isinstance(value, dict):
        return {name: public_settings(part, name) for name, part in value.items()}
    if isinstance(value, list):
        return [public_settings(part, key) for part in value]
    return public_path(value) if key in PLACES and isinstance(value, str) else value


def public_word(word: str) -> str:
    """A word of a command line, with its path, or the paths in its value, as `public_path`."""
    assigned = re.fullmatch(r"(--[\w-]+|[a-z]\w*(?:\.\w+)*)=(.*)", word, re.S)
    if assigned is None:
        return public_path(word)
    name, value = assigned.groups()
    if name.startswith("--"):
        return f"{name}={public_path(value)}"
    key = next(part for part in reversed(name.split(".")) if not part.isdigit())
    try:
        given = json.loads(value)
    except json.JSONDecodeError:
        return f"{name}={public_settings(value, key)}"
    told = public_settings(given, key)
    return word if told == given else f"{name}={json.dumps(told, ensure_ascii=False)}"


# ------------------------------------------------------------------------------- the front matter


def base_model(record: Record, identity: Identity) -> str | None:
    """The hub id of the initial policy, if it has one."""
    policy = record.settings["model"]["policy"]
    return identity.base_model or (None if record.is_local(policy) else policy)


def front_matter(record: Record, identity: Identity) -> ModelCardData:
    """What the hub reads: https://huggingface.co/docs/hub/model-cards. Local paths are left out."""
    sources = [source["path"] for source in record.settings["data"]["train"]]
    datasets = list(identity.datasets) or [path for path in sources if not record.is_local(path)]
    adapter = record.lora is not None and not record.lora["merge"]
    base = base_model(record, identity)
    relation = {"base_model_relation": "adapter" if adapter else "finetune"} if base else {}
    tags = ["sft" if record.is_sft else "dpo", "notus"]
    tags += [] if record.is_sft else ["preference-optimisation"]
    tags += [] if record.lora is None else ["lora"]
    tags += ["peft"] if adapter else []
    results = evaluation_results(record)
    return ModelCardData(
        base_model=base,
        datasets=datasets or None,
        license=identity.license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=record.name,
        eval_results=results or None,
        **relation,
    )


def check_hub_ids(identity: Identity) -> None:
    """Raise UserError for what cannot be the name of a repository, such as a path."""
    ids = {"--datasets": identity.datasets}
    if identity.base_model is not None:
        ids["--base-model"] = (identity.base_model,)
    for option, names in ids.items():
        for name in names:
            try:
                validate_repo_id(name)
            except HFValidationError:
                raise UserError(
                    f"{option} {name}: expected a hub id, such as mistralai/Mistral-7B-v0.1"
                ) from None


def evaluation_results(record: Record) -> list[EvalResult]:
    """The last evaluation as entries of the model-index, with the numbers of metrics.jsonl."""
    if not record.evaluations:
        return []
    last = record.evaluations[-1]
    held_out = record.settings["data"]["eval"]
    source = (record.settings["data"]["train"] if isinstance(held_out, dict) else held_out)[0]
    local = record.is_local(source["path"])
    name_of_set = Path(source["path"]).name if local else source["path"]
    count = f"{record.held_out_pairs:,} " if record.held_out_pairs else ""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="preferences" if local else source["path"],
            dataset_name=f"{count}held-out pairs of {name_of_set}",
            dataset_split=source["split"],
            metric_type="accuracy" if name == "eval_rewards/accuracies" else name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in last.items()
        if name.startswith("eval_")
    ]


# ------------------------------------------------------------------------------------ the sections


def introduction(record: Record, identity: Identity) -> Iterator[str]:
    """What the model is, in a sentence or two."""
    settings = record.settings
    policy = settings["model"]["policy"]
    base = base_model(record, identity)
    origin = f"[{base}](https://huggingface.co/{base})"
    if base is None:
        origin = f"`{public_path(policy)}` (a local folder)"
    what = "Low-rank adapters for" if record.lora else "Made from"
    pairs = record.data.get("train", {}).get("pairs", record.state.get("pairs"))
    amount = f"{pairs:,} " if pairs else ""
    if record.is_sft:
        method, examples = "supervised fine-tuning", f"{amount}responses"
    else:
        method = f"direct preference optimisation (loss {loss_name(settings)})"
        examples = f"{amount}pairs of responses"
    yield (
        f"{what} {origin} by {method} on {examples}, with notus, a trainer in raw PyTorch. All "
        "numbers below are read from the run's own files."
    )


def loss_name(settings: Mapping[str, Any]) -> str:
    """The loss, or the losses of a mix with their weights."""
    mix = settings["loss"].get("mix")
    if mix is None:
        return f"`{settings['loss']['name']}`"
    return " + ".join(f"{part['weight']:g} `{part['name']}`" for part in mix)


def usage(record: Record, identity: Identity) -> Iterator[str]:
    """A few lines of Python that load the model."""
    place = identity.repository
    yield "```python"
    if record.lora is not None and not record.lora["merge"]:
        yield "from peft import PeftModel"
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    yield ""
    if record.lora is not None and not record.lora["merge"]:
        base = base_model(record, identity) or public_path(record.settings["model"]["policy"])
        yield f'base = AutoModelForCausalLM.from_pretrained("{base}")'
        yield f'model = PeftModel.from_pretrained(base, "{place}", subfolder="adapter")'
        yield f'tokenizer = AutoTokenizer.from_pretrained("{place}", subfolder="adapter")'
    else:
        yield f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="bfloat16")'
        yield f'tokenizer = AutoTokenizer.from_pretrained("{place}")'
    yield "```"
    system = record.settings["data"]["system_prompt"]
    if system is not None:
        shown = f"`{system}`" if system else "an empty one"
        yield ""
        yield f"Prompts were trained with a system turn where they had none of their own: {shown}."


def held_out_section(record: Record) -> Iterator[str]:
    """The evaluations at the start, at step 100 and at the end, and published ones beside them."""
    if not record.evaluations:
        yield "Nothing was held out (data.eval), so the run did not measure itself."
        return
    last = record.evaluations[-1]
    at = {0: "at the start", STEP: f"step {STEP}", last["step"]: f"at the end, step {last['step']}"}
    shown = [line for line in record.evaluations if line["step"] in at]
    names = [name for name in last if name.startswith("eval_")]
    pairs = record.held_out_pairs
    yield f"Means over {'all of the' if pairs is None else f'{pairs:,}'} held-out pairs."
    yield ""
    header = ["metric", *(at[line["step"]] for line in shown)]
    yield from table(header, ([f"`{name}`", *(line.get(name) for line in shown)] for name in names))
    if not record.is_sft:
        yield ""
        yield (
            "A reward is beta times the log-ratio of policy and reference, in nats, summed over a "
            "response. An accuracy counts ties as wrong, so an untrained policy has 0."
        )
    for name in comparable_runs(record):
        yield ""
        yield from published_section(record, name, DPO_RUNS[name])


def comparable_runs(record: Record) -> list[str]:
    """Published runs of a 7B Mistral whose recipe this run repeats: names in DPO_RUNS."""
    shape = record.state.get("common", {}).get("model_shape", {})
    is_7b = (shape.get("hidden_size"), shape.get("num_hidden_layers")) == (4096, 32)
    if record.is_sft or not is_7b:
        return []
    return [
        name
        for name, run in DPO_RUNS.items()
        if ("lora" in name) == (record.lora is not None)
        and not recipe_notes(record.settings, run.recipe)
    ]


def published_section(record: Record, name: str, run: DpoRun) -> Iterator[str]:
    """The run beside a published one, metric by metric."""
    pairs, last = record.held_out_pairs, record.evaluations[-1]
    rows = differences_at("end", last, run.end, run, pairs)
    for line in record.evaluations:
        if line["step"] == STEP and run.step_100 is not None:
            rows = differences_at(f"step {STEP}", line, run.step_100, run, pairs) + rows
    yield f"Beside {name} ({run.source}), whose recipe this run repeats:"
    yield ""
    yield from table(
        ["at", "metric", "this run", name, "difference in standard errors", "pairs there"],
        ([r.at, r.metric, r.value, r.published, r.errors, r.published_pairs] for r in rows),
    )
    yield ""
    yield (
        "Standard errors are of the number of pairs alone; another seed moves a run too. Whether "
        "both held out the same pairs is not known from the files."
    )


def training_section(record: Record, figures: Sequence[str]) -> Iterator[str]:
    """Curves, or a table where there are none, and the end of training."""
    if figures:
        for left, right in zip(figures[::2], [*figures[1::2], None], strict=False):
            cells = [f"![{name}](figures/{name}.png)" for name in (left, right) if name]
            yield " ".join(cells)
            yield ""
        yield (
            "Thin: single logged steps; thick: their running mean; circles: held-out pairs; "
            "dotted: ends of epochs."
        )
    else:
        yield f"Curves need matplotlib (`{CURVES_EXTRA}`); some of the logged steps instead:"
        yield ""
        yield from curve_table(record)


def curve_table(record: Record) -> Iterator[str]:
    """A few of the logged steps, evenly spaced, the last one among them."""
    count = min(ROWS_WITHOUT_FIGURES, len(record.training))
    places = np.linspace(0, len(record.training) - 1, count).round().astype(int)
    lines = [record.training[place] for place in places]
    shown = panels(lines[-1], record.is_sft)
    names = [key for panel in shown for key, _ in panel.lines if key in lines[-1]]
    yield from table(["step", *names], ([line["step"], *map(line.get, names)] for line in lines))


def other_evaluations(record: Record) -> Iterator[str]:
    """What `eval.py score ... --json RUN/evals/NAME.json` left, beside the published rows."""
    for path in sorted((record.folder / "evals").glob("*.json")):
        found = read_object(path)
        if found.get("evaluator") not in EVALUATORS:
            continue
        yield from EVALUATORS[found["evaluator"]](found)
        yield ""
        yield from (f"- {note}" for note in found["notes"])
        if found["notes"]:
            yield ""


def alpaca_eval_table(found: Plain) -> Iterator[str]:
    """Win rates, measured and published."""
    yield f"AlpacaEval against {public_path(found['baseline'] or 'its baseline')}:"
    yield ""
    keys = ("model", "win_rate", "standard_error", "total", "average_length")
    header = ["model", "win rate %", "standard error", "comparisons", "mean length"]
    yield from table(header, _beside(found, keys), digits=2)


def mt_bench_table(found: Plain) -> Iterator[str]:
    """Mean scores, measured and published."""
    yield "MT-Bench, mean over both turns:"
    yield ""
    yield from table(["model", "score"], _beside(found, ("model", "score")), digits=2)


def lm_eval_table(found: Plain) -> Iterator[str]:
    """The leaderboard's seven tasks, measured and published."""
    yield "Open LLM Leaderboard (November 2023), percent:"
    yield ""
    tasks = [task.name for task in LEADERBOARD_TASKS]
    rows = [found["measured"], *found["published"]]
    header = ["model", "measured by", *(task.title for task in LEADERBOARD_TASKS), "average"]
    cells = (
        [
            public_path(row["model"]),
            row["measured_by"],
            *map(row["scores"].get, tasks),
            row["average"],
        ]
        for row in rows
    )
    yield from table(header, cells, digits=2)


EVALUATORS: Mapping[str, Callable[[Plain], Iterator[str]]] = {
    "alpaca_eval": alpaca_eval_table,
    "mt_bench": mt_bench_table,
    "lm_eval": lm_eval_table,
}


def _beside(found: Plain, keys: Sequence[str]) -> Iterator[list[Cell]]:
    """The measured rows, then the published ones, marked as such; the model is the first key."""
    for row in found["measured"]:
        yield [public_path(row[keys[0]]), *(row[key] for key in keys[1:])]
    for row in found["published"]:
        yield [f"{row['model']} (published)", *(row[key] for key in keys[1:])]


def recipe_section(record: Record) -> Iterator[str]:
    """The settings that decide what is learnt."""
    s = record.settings
    optimizer, schedule, train, data = s["optimizer"], s["schedule"], s["train"], s["data"]
    rows: list[list[Cell]] = [["objective", train["objective"]]]
    if not record.is_sft:
        options = {k: v for k, v in s["loss"].items() if k not in ("name", "mix")}
        rows.append(["loss", loss_name(s)])
        rows += [[f"loss: {key}", _plain(value)] for key, value in options.items()]
        reference = s["model"].get("reference")
        if reference:
            rows.append(["reference", public_path(reference)])
        elif record.state.get("reference", True):  # None for a loss that uses none
            rows.append(["reference", "the policy's initial weights"])
    if record.lora:
        rows += [[f"LoRA: {key}", _plain(value)] for key, value in record.lora.items()]
    rows += [
        ["optimiser", optimizer["name"]],
        ["learning rate", f"{optimizer['learning_rate']:g}"],
        ["schedule", f"{schedule['name']}, warmup {schedule['warmup_ratio']:g} of all steps"],
        ["weight decay", f"{optimizer['weight_decay']:g}"],
        ["gradient clipping", f"{optimizer['max_grad_norm']:g}"],
        [f"{record.unit} per step", train["pairs_per_step"]],
        ["epochs", f"{record.training[-1]['epoch']:g}"],
        ["steps", record.training[-1]["step"]],
        ["longest sequence, tokens", data["max_length"]],
        ["tokenization", f"{data['tokenization']}, truncation {data['truncation']}"],
        ["computed in", f"{s['model']['compute_dtype']}, parameters float32"],
        ["seed", train["seed"]],
    ]
    yield from table(["setting", "value"], rows)


def data_section(record: Record) -> Iterator[str]:
    """Sources, what was dropped and why, hashes, and the manifests of curated sets."""
    sources = record.settings["data"]["train"]
    yield from table(
        ["training data", "split", "weight", "curation"],
        (
            [public_path(s["path"]), s["split"], s["weight"], _curation(s["curation"])]
            for s in sources
        ),
        digits=2,
    )
    yield ""
    for name, about in record.data.items():
        counts = "; ".join(f"{count:,} {what}" for what, count in about["counts"].items())
        yield f"- {name}: {about['pairs']:,} {record.unit}{'; ' + counts if counts else ''}"
    common = record.state.get("common", {})
    if "tokens_sha256" in common:
        yield f"- SHA-256 of the training data's tokens: `{common['tokens_sha256']}`"
    if common.get("reference_sha256"):
        yield f"- SHA-256 of the reference's weights: `{common['reference_sha256']}`"
    for source in sources:
        manifest = find_manifest(Path(source["path"]))
        if manifest is not None:
            yield ""
            yield from manifest_section(manifest)


def _curation(curation: Plain | None) -> str:
    """The settings of a curation that say something."""
    if curation is None:
        return "none: ready pairs"
    keys = ["drop_sources"]
    keys += ["rule", "rejected"] if curation["rule"] else []
    keys += ["decontaminate", "match"] if curation["decontaminate"] else []
    keys += ["duplicates"] if curation["duplicates"] != "keep" else []
    told = public_settings(curation)
    return ", ".join(f"{key}: {_plain(told[key])}" for key in keys if told[key])


def find_manifest(path: Path) -> Path | None:
    """The manifest that `python -m notus.curation` left with the data, if it is still here."""
    found = (folder / "manifest.json" for folder in (path, path.parent, path.parent.parent))
    for manifest in found:
        if path.exists() and manifest.is_file() and "counts" in read_object(manifest):
            return manifest
    return None


def manifest_section(path: Path) -> Iterator[str]:
    """Counts and hashes of a curated set."""
    manifest = read_object(path)
    counts = manifest["counts"]
    yield f"Curated from {public_path(manifest['input'])} with notus:"
    yield ""
    rows: list[list[Cell]] = [["rows", counts["rows"]], ["pairs", counts["pairs"]]]
    rows += [[f"dropped: {reason}", count] for reason, count in counts["dropped"].items()]
    for name, digest in manifest["rows_sha256"].items():
        rows.append([f"SHA-256 of the rows of {public_path(name)}", digest])
    for name, digest in manifest["files_sha256"].items():
        rows.append([f"SHA-256 of {public_path(name)}", digest])
    yield from table(["", ""], rows)


def environment_section(record: Record, price: float | None) -> Iterator[str]:
    """Hardware, versions, time, cost and speed; price: of one GPU for one hour."""
    if record.starts:
        last = record.starts[-1]
        rows: list[list[Cell]] = [["processes", f"{last['ranks']} x {last['device']}"]]
        rows += [[name, version] for name, version in last["versions"].items()]
    else:
        rows = [["recorded", "nothing: the run has no history.jsonl"]]
    spans = [hours for hours, _ in run_hours(record)]
    if spans:
        started = f" in {len(spans)} starts" if len(spans) > 1 else ""
        rows.append(["hours", f"{sum(spans):.2f}{started}"])
    used = gpu_hours(record)
    for device, amount in used.items():
        rows.append(["GPU-hours", f"{amount:,.2f} of {device}"])
    if price is not None:
        rows.append(["cost", f"{price * sum(used.values()):,.2f} at {price:g} per GPU-hour"])
    for key, label, digits in (
        ("perf/tokens_per_second", "tokens per second (median of the logged steps)", 0),
        ("perf/pairs_per_second", "pairs per second", 2),
        ("perf/mfu", "MFU", 3),
        ("perf/packing", "share of slots filled", 3),
        ("perf/peak_memory_gib", "peak memory of rank 0, GiB", 1),
    ):
        values = [line[key] for line in record.training if key in line]
        if values:
            value = max(values) if key == "perf/peak_memory_gib" else float(np.median(values))
            rows.append([label, f"{value:,.{digits}f}"])
    yield from table(["", ""], rows)
    yield ""
    yield (
        "Hours are from the start of training's preparation to the end of the export. Of a start "
        "that was killed they reach to the last event in TensorBoard's files. GPU-hours are those "
        "times the number of processes, one to a GPU."
    )


def run_hours(record: Record) -> Iterator[tuple[float, Plain]]:
    """How long each start lasted, beside it; one that left no trace of its end lasted 0 hours."""
    logged: list[float] | None = None
    for number, start in enumerate(record.starts):
        began = datetime.fromisoformat(start["time"]).timestamp()
        if "end" in start:
            ended = datetime.fromisoformat(start["end"]).timestamp()
        else:
            logged = event_times(record.folder / "tensorboard") if logged is None else logged
            later = record.starts[number + 1 :]
            until = datetime.fromisoformat(later[0]["time"]).timestamp() if later else np.inf
            ended = max((t for t in logged if began <= t < until), default=began)
        yield (ended - began) / 3600, start


def gpu_hours(record: Record) -> dict[str, float]:
    """Hours times processes on each kind of GPU, by its name; empty for a run on the CPU."""
    used: dict[str, float] = {}
    for hours, start in run_hours(record):
        if not start["device"].startswith("CPU"):
            used[start["device"]] = used.get(start["device"], 0.0) + hours * start["ranks"]
    return {device: amount for device, amount in used.items() if amount}


def event_times(folder: Path) -> list[float]:
    """When anything was written to TensorBoard, in seconds of Unix time."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    return [event.wall_time for file in files for event in EventFileLoader(str(file)).Load()]


def repeating_section(record: Record) -> Iterator[str]:
    """The command and the resolved configuration, but for paths of the machine."""
    if record.starts:
        commands = (map(public_word, start["command"]) for start in record.starts)
        yield "```"
        yield from dict.fromkeys(map(shlex.join, commands))
        yield "```"
        yield ""
    yield "Its resolved settings, which are a configuration themselves:"
    yield ""
    yield "```json"
    yield json.dumps(public_settings(record.settings), indent=2, ensure_ascii=False)
    yield "```"
    yield ""
    yield "Of paths outside the working directory the last part is told; hashes identify the data."


def limits_section(record: Record) -> Iterator[str]:
    """What the numbers do not say, as far as the run's settings tell."""
    last = record.evaluations[-1] if record.evaluations else record.training[-1]
    prefix = "eval_" if record.evaluations else ""
    falling = last.get(f"{prefix}displacement/chosen_falling")
    if not record.is_sft:
        yield (
            "- The model learnt which of two responses raters preferred, with their biases (length "
            "among them); no other measure of truth or safety was trained for."
        )
    if falling is not None:
        where = "held-out" if record.evaluations else "training"
        yield (
            f"- For {falling:.0%} of the {where} pairs the chosen response, too, is less likely "
            "than under the reference: the loss asks for a margin, not for likely responses."
        )
    skipped = sum(line.get("nonfinite", 0) > 0 for line in record.training)
    if skipped:
        yield f"- {skipped:,} logged steps held updates that were not finite and were left out."
    for source in record.settings["data"]["train"]:
        yield f"- {_screening(record, source)}"
        if "ultrafeedback" in source["path"].lower():
            yield (
                "- UltraFeedback holds the questions of TruthfulQA (source truthful_qa). Unless "
                "they were left out, TruthfulQA scores of this model mean little."
            )
    if record.settings["data"].get("leaks") == "keep":
        yield (
            f"- Training {record.unit} whose prompt is also held out were kept (data.leaks), as in "
            "the published runs: `train.py CONFIG --dry-run` counts them."
        )


def _screening(record: Record, source: Plain) -> str:
    """Which benchmark prompts were kept out of a source."""
    curation = source["curation"] or {}
    files = list(curation.get("decontaminate") or ())
    dropped = list(curation.get("drop_sources") or ())
    path = Path(source["path"])
    manifest = find_manifest(path)
    if manifest is not None:
        curated = read_object(manifest)
        files += curated["decontaminate"]
        dropped += curated["drop_sources"]
    if not files and not dropped:
        return f"{public_path(source['path'])}: not screened for benchmark prompts by this run."
    parts = [f"prompts of {', '.join(map(public_path, files))}"] if files else []
    parts += [f"rows of {', '.join(dropped)}"] if dropped else []
    left_out = " and ".join(parts)
    return f"{public_path(source['path'])}: {left_out} were left out; others were not looked for."


def table(header: Sequence[str], rows: Iterable[Sequence[Cell]], digits: int = 4) -> Iterator[str]:
    """Lines of a Markdown table; floats with `digits` decimals, None as a dash."""
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(_cell(cell, digits) for cell in row) + " |"


def _cell(value: Cell, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    text = f"{value:,}" if isinstance(value, int) else value
    return text.replace("|", "\\|").replace("\n", " ")


def _plain(value: Any) -> str:
    """A setting as it is written in the configuration."""
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------------------------------- the hub


def push(final: Path, repository: str, private: bool) -> str:
    """Upload the folder final/, and nothing else of the run; returns the repository's address.

    Makes the repository if there is none; `private` says how, and changes no existing one. Raises
    UserError when the hub refuses or cannot be reached, and for an adapter of a base that only this
    machine has.
    """
    adapter = final / "adapter" / "adapter_config.json"
    base = read_object(adapter)["base_model_name_or_path"] if adapter.is_file() else ""
    if public_path(base) != base:
        raise UserError(
            f"{adapter}: base_model_name_or_path is {base}, which others do not have and need not "
            "know; write the base's hub id there before --push-to-hub"
        )
    api = HfApi()
    try:
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id,
            folder_path=final,
            ignore_patterns=[".partial-*", "*.partial"],
            commit_message="Model and card, by notus",
        )
    except HUB_ERRORS as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(
            f"--push-to-hub {repository}: the hub did not take it ({first_line}); expected "
            "NAMESPACE/NAME of a repository that `hf auth login` or HF_TOKEN lets you write to"
        ) from None
    return str(created)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m notus.card",
        description="Write the model card of a finished run, RUN/final/README.md.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a run")
    parser.add_argument("--license", default="unknown", help="the hub's name of it, such as mit")
    parser.add_argument("--base-model", metavar="ID", help="hub id, where a local copy was used")
    parser.add_argument("--datasets", metavar="ID", nargs="+", default=[], help="hub ids likewise")
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="upload RUN/final, and only it, to this repository"
    )
    parser.add_argument("--private", action="store_true", help="where REPO is new: keep it private")
    parser.add_argument("--price", type=float, help="of one GPU for one hour, for the cost")
    options = parser.parse_args(arguments)
    if options.private and not options.push_to_hub:
        parser.error("--private needs --push-to-hub")
    identity = Identity(options.license, options.base_model, tuple(options.datasets))
    if options.push_to_hub:
        identity = identity._replace(repository=options.push_to_hub)
    try:
        if options.price is not None and not 0 < options.price < math.inf:
            raise UserError(
                f"--price {options.price:g}: expected the price of one GPU for one hour"
            )
        check_hub_ids(identity)
        print(f"wrote {write_card(options.run, identity, options.price)}")
        if options.push_to_hub:
            address = push(options.run / "final", options.push_to_hub, options.private)
            print(f"uploaded {options.run / 'final'} to {address}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
