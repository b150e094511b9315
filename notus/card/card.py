"""final/README.md, the model card of a finished run, made from the files in its output_dir.

    python -m notus.card RUN

Every number is from config.json, metrics.jsonl, history.jsonl, the newest checkpoint's state.json,
evals/*.json and the manifest of curated training data. train.py writes the card at the end of a
run; this command writes it again, for example after evaluations. It holds no absolute path and no
secret.
"""

import argparse
import html
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.utils import validate_repo_id

from notus.card.curves import draw_curves
from notus.console import counted, drawing, run_command
from notus.engine.checkpoint import checkpoints
from notus.engine.history import read_history
from notus.errors import UserError
from notus.files import read_object, write_whole
from notus.masking import mask_text
from notus.tables import markdown_table

Plain = dict[str, Any]


class Record(NamedTuple):
    """A finished run as its output_dir describes it."""

    folder: Path
    settings: Plain
    training: list[Plain]  # the lines of metrics.jsonl of logged steps
    evaluations: list[Plain]  # those of evaluations
    starts: list[Plain]  # in history.jsonl, oldest first, each with its "end", if it has one
    state: Plain  # state.json of the newest checkpoint

    @property
    def is_sft(self) -> bool:
        return self.settings["train"]["objective"] == "sft"

    @property
    def lora(self) -> Plain | None:
        return self.settings["model"].get("lora")

    @property
    def is_adapter(self) -> bool:
        return self.lora is not None and not self.lora["merge"]

    @property
    def exported_step(self) -> int | None:
        """The step whose weights final/ holds, if it is that of the best checkpoint."""
        best = self.state.get("best") if self.settings["evaluation"].get("export_best") else None
        return best["step"] if best else None

    @property
    def final_evaluation(self) -> Plain:
        """The line of the evaluation of the weights in final/."""
        step, last = self.exported_step, self.evaluations[-1]
        return next((line for line in self.evaluations if line["step"] == step), last)

    @property
    def unit(self) -> str:
        return "responses" if self.is_sft else "pairs"

    @property
    def data(self) -> Plain:
        """The counts of each data set: {"train": {"pairs", "counts"}, "eval": ...}."""
        return self.starts[-1]["data"] if self.starts else {}

    def count(self, name: str) -> str:
        """The number of pairs of "train" or "eval" and a space; empty if it is unknown."""
        return f"{self.data[name]['pairs']:,} " if name in self.data else ""

    def hub_id(self, path: str) -> str | None:
        """The path of a model or dataset, unless it was on the machine itself."""
        known = self.starts and path not in self.starts[-1]["local"]
        return path if known and shown_path(path) == path else None


def read_record(run: Path) -> Record:
    """Read the files of a run. Raises UserError for a run that has not ended or logged."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics}: no such file; expected the output_dir of a run")
    if not (run / "final").is_dir():
        raise UserError(f"{run / 'final'}: no such folder; train.py writes it when the run ends")
    lines = list(_metrics(metrics))
    training = [line for line in lines if "loss" in line]
    if not training:
        raise UserError(f"{metrics}: no training step is logged there; a card needs at least one")
    starts: list[Plain] = []
    for event in read_history(run):
        if event["event"] == "start":
            starts.append(event)
        else:
            starts[-1]["end"] = event["time"]
    evaluations = [line for line in lines if "eval_loss" in line]
    saved = checkpoints(run / "checkpoints")[-1:]
    state = read_object(saved[0] / "state.json") if saved else {}
    return Record(run, read_object(run / "config.json"), training, evaluations, starts, state)


def _metrics(path: Path) -> Iterator[Plain]:
    """The lines of metrics.jsonl, except torn ones, which a full disk or a power cut leaves."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError):
            continue


def write_card(
    run: Path, license: str = "unknown", base_model: str | None = None, datasets: Sequence[str] = ()
) -> Path:
    """Write final/README.md and its figures, in place of earlier ones; returns the card's path.

    license: the hub's name of it. base_model, datasets: hub ids, where the run used local copies.
    Figures need matplotlib (the extra `report`). Raises UserError when the run has not ended or
    logged, or the files cannot be written.
    """
    record, final = read_record(run), run / "final"
    base = base_model or record.hub_id(record.settings["model"]["policy"])
    header = front_matter(record, license, base, datasets).to_yaml().strip()
    sections = {
        "Use": [USAGE.format(path="final/adapter" if record.is_adapter else "final")],
        "On held-out pairs": held_out_section(record),
        "Samples": samples(record),
        "Curves": figures(record),
        "Other evaluations": other_evaluations(record),
        "Recipe": recipe_section(record),
        "Data": data_section(record),
    }
    blocks = [f"---\n{header}\n---", f"# {run.resolve().name}", introduction(record, base)]
    try:
        for title, content in sections.items():
            body = list(content)
            blocks += [f"## {title}", *body] if body else []
        write_whole(final / "README.md", mask_text("\n\n".join(blocks)) + "\n")
    except OSError as error:
        raise UserError(f"{final / 'README.md'}: cannot be written ({error.strerror})") from None
    return final / "README.md"


def figures(record: Record) -> Iterator[str]:
    """Draw final/figures/ and show them."""
    path = record.folder / "final/figures/curves.png"
    shutil.rmtree(path.parent, ignore_errors=True)
    if not find_spec("matplotlib"):
        yield "Not drawn: this needs matplotlib (`pip install -e '.[report]'` in notus's folder)."
        return
    with drawing():
        draw_curves(path, record.training, record.evaluations, record.state.get("steps_per_epoch"))
    if not path.is_file():
        yield "Not drawn: the command that wrote this card says why."
        return
    yield "![Curves of training](figures/curves.png)"
    yield (
        "Lines are logged steps, in long runs thin and their running mean thick; circles are "
        "held-out pairs, dotted lines the ends of epochs. Left out are steps with less than half "
        "of the pairs, at an epoch's end, and accuracies while policy and reference are equal."
    )


def shown_path(path: str) -> str:
    """A path for a published card: relative to the working directory, or else its last part.

    Hub ids, and relative paths that do not leave the working directory, remain unchanged.
    """
    place, here = Path(path), Path.cwd()
    if place.is_relative_to(here) and here != here.parent:  # in / it would be the whole path
        return str(place.relative_to(here))
    return place.name if place.is_absolute() or ".." in place.parts else path


def shown_text(text: str) -> str:
    """A word of a command line, or JSON, with each value that is such a path as `shown_path`."""
    return re.sub(r'(?<![^"=])(?:/|\.\./)[^"]*', lambda found: shown_path(found[0]), text)


def front_matter(
    record: Record, license: str, base: str | None, datasets: Sequence[str]
) -> ModelCardData:
    """The hub's fields, https://huggingface.co/docs/hub/model-cards, without local paths."""
    sources = (source["path"] for source in record.settings["data"]["train"])
    datasets = list(datasets) or [path for path in sources if record.hub_id(path)]
    relation = "adapter" if record.is_adapter else "finetune"
    tags = ["notus", "sft"] if record.is_sft else ["notus", "dpo", "preference-optimisation"]
    tags += ["lora"] if record.lora else []
    return ModelCardData(
        base_model=base,
        datasets=datasets or None,
        license=license,
        library_name="peft" if record.is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=record.folder.resolve().name,
        eval_results=evaluation_results(record) or None,
        base_model_relation=relation if base else None,
    )


# Ends of metrics in the model index: the others mean something only next to each other.
COMPARABLE = ("loss", "perplexity", "rewards/accuracies", "rewards/margins")


def evaluation_results(record: Record) -> list[EvalResult]:
    """The evaluation of final/ as entries of the model-index, with the numbers of metrics.jsonl."""
    if not record.evaluations:
        return []
    held_out, train = record.settings["data"]["eval"], record.settings["data"]["train"]
    named = held_out if isinstance(held_out, dict) and "holdout" not in held_out else {}
    pooled = next(iter(named.values()), train[0]) if isinstance(held_out, dict) else held_out[0]
    results = []
    for name, value in record.final_evaluation.items():
        part = name.removeprefix("eval_").partition("/")[0]
        source = named.get(part, pooled)
        size = "" if part in named else record.count("eval")
        if name.startswith("eval_") and name.endswith(COMPARABLE):
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=record.hub_id(source["path"]) or "preferences",
                    dataset_name=f"{size}held-out pairs of {shown_path(source['path'])}",
                    dataset_split=source["split"],
                    metric_type="accuracy" if name.endswith("rewards/accuracies") else name,
                    metric_name=name,
                    metric_value=value,
                )
            )
    return results


def introduction(record: Record, base: str | None) -> str:
    """The model's origin, in a sentence or two."""
    policy = shown_path(record.settings["model"]["policy"])
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{policy}` (a local folder)"
    loss, last = record.settings["loss"], record.training[-1]
    name = " + ".join(f"{part['weight']:g} {part['name']}" for part in loss.get("mix") or [])
    method = f"direct preference optimisation (loss {name or loss['name']})"
    method = "supervised fine-tuning" if record.is_sft else method
    step, metric = record.exported_step, record.settings["evaluation"].get("best")
    best = f"Its weights are those after step {step:,}, the best by {metric}. " if step else ""
    return (
        f"{'Low-rank adapters for' if record.lora else 'Made from'} {origin} by {method} on "
        f"{record.count('train')}{record.unit}: {counted(last['step'], 'steps')}, "
        f"{last['epoch']:g} epoch{'s' * (last['epoch'] != 1)}. {best}Trained with notus. All "
        "numbers below are read from the run's own files."
    )


USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{path}"  # or the model's id on the hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
chat = [{{"role": "user", "content": "Which letter comes after g?"}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
(answer,) = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def held_out_section(record: Record) -> Iterator[str]:
    """The evaluations at the start and of final/."""
    if not record.evaluations:
        yield "Nothing was held out (data.eval), so there is no evaluation."
        return
    first, last = record.evaluations[0], record.final_evaluation
    shown = [first, last] if first["step"] < last["step"] else [last]
    names = [name for name in last if name.startswith("eval_")]
    yield f"Means over {record.count('eval')}held-out pairs."
    yield markdown_table(
        ["metric", *(f"step {line['step']}" for line in shown)],
        [[f"`{name}`", *(line.get(name) for line in shown)] for name in names],
    )
    if not record.is_sft:
        yield (
            "A reward is beta times the log-ratio of policy and reference, in nats, summed over a "
            "response. An accuracy counts ties as wrong, so an untrained policy has 0."
        )


def samples(record: Record) -> Iterator[str]:
    """The first three answers in the last section of samples.md (evaluation.samples)."""
    path, settings = record.folder / "samples.md", record.settings["evaluation"].get("samples")
    if not (settings and path.is_file()):
        return
    _, step, last = re.split(r"^## After (\d+) steps$", path.read_text("utf-8"), flags=re.M)[-3:]
    shown = re.split(r"^(?=\*\*\d+\.\*\*)", last.strip(), flags=re.M)[1:4]
    tokens, temperature = settings["max_new_tokens"], settings["temperature"]
    how = f"sampled at temperature {temperature:g}" if temperature else "the most probable tokens"
    yield f"Answers after {step} steps: {how}, {tokens} tokens at most."
    yield from map(str.strip, shown)


# The evaluators of `eval.py score`: a title, and the fields that are shown.
EVALUATORS = {
    "alpaca_eval": (
        "AlpacaEval (rates in percent, length in characters)",
        ["win_rate", "standard_error", "total", "average_length"],
    ),
    "mt_bench": ("MT-Bench, mean over both turns", ["score"]),
    "lm_eval": ("Open LLM Leaderboard (November 2023), percent", ["average"]),
}


def other_evaluations(record: Record) -> Iterator[str]:
    """The tables of evals/*.json, which `eval.py score ... --json` writes, and their notes."""
    for path in sorted((record.folder / "evals").glob("*.json")):
        found = read_object(path)
        if found.get("evaluator") not in EVALUATORS:
            continue
        title, fields = EVALUATORS[found["evaluator"]]
        rows = found["measured"] if isinstance(found["measured"], list) else [found["measured"]]
        rows += [row | {"model": f"{row['model']} (published)"} for row in found["published"]]
        fields = [*rows[0].get("scores", ()), *fields]  # the leaderboard's, by task
        flat = [row | row.get("scores", {}) for row in rows]
        baseline = found.get("baseline")
        yield f"{title}{f', against {shown_path(baseline)}' if baseline else ''}:"
        yield markdown_table(
            ["model", *(field.replace("_", " ") for field in fields)],
            [[shown_path(row["model"]), *map(row.get, fields)] for row in flat],
            digits=2,
        )
        yield from (f"- {note}" for note in found["notes"])


def recipe_section(record: Record) -> Iterator[str]:
    """The commands, what they ran on, and the resolved configuration."""
    if record.starts:
        commands = (map(shown_text, start["command"]) for start in record.starts)
        yield "\n".join(["```", *dict.fromkeys(map(shlex.join, commands)), "```"])
        last, when = record.starts[-1], datetime.fromisoformat
        ended = [when(s["end"]) - when(s["time"]) for s in record.starts if "end" in s]
        killed = len(record.starts) - len(ended)
        note = f", without {killed} that were killed" if killed else ""
        hours = sum(ended, timedelta()) / timedelta(hours=1)
        rows = [["processes", f"{last['ranks']} x {last['device']}"], *last["versions"].items()]
        shown = f"{hours:.2f}" if hours >= 0.01 else "less than 0.01"
        yield markdown_table(["", ""], [*rows, ["hours", f"{shown}{note}"]])
    yield json_block("The resolved settings, which are a configuration themselves", record.settings)
    yield "Paths outside the working directory are shortened; hashes identify the data."


def data_section(record: Record) -> Iterator[str]:
    """Counts of what was kept and dropped, hashes, and the manifests of curated sets."""
    for name, about in record.data.items():
        counts = "".join(f"; {count:,} {reason}" for reason, count in about["counts"].items())
        yield f"- {name}: {about['pairs']:,} {record.unit}{counts}"
    common = record.state.get("common", {})
    for key, label in (("tokens", "training data's tokens"), ("reference", "reference's weights")):
        if common.get(f"{key}_sha256"):
            yield f"- SHA-256 of the {label}: `{common[f'{key}_sha256']}`"
    for path in (Path(source["path"]) for source in record.settings["data"]["train"]):
        places = (path, path.parent, path.parent.parent) if path.exists() else ()
        found = [place / "manifest.json" for place in places if (place / "manifest.json").is_file()]
        if found and "counts" in (manifest := read_object(found[0])):
            origin = html.escape(shown_path(manifest["input"]))
            yield json_block(f"Curated from {origin} by <code>notus.curation</code>", manifest)


def json_block(title: str, value: Plain) -> str:
    """A value as JSON to unfold, with its paths as `shown_text` shows them. title: HTML."""
    text = shown_text(json.dumps(value, indent=2, ensure_ascii=False))
    return f"<details><summary>{title}</summary>\n\n```json\n{text}\n```\n\n</details>"


def hub_id(name: str) -> str:
    """The name, if a repository can have it; no path can. Raises ValueError."""
    validate_repo_id(name)
    return name


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    about = "Write the model card of a finished run, RUN/final/README.md."
    parser = argparse.ArgumentParser(prog="python -m notus.card", description=about)
    parser.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a run")
    parser.add_argument("--license", default="unknown", help="the hub's name of it, such as mit")
    about = "hub id, where a local copy was used"
    parser.add_argument("--base-model", metavar="ID", type=hub_id, help=about)
    parser.add_argument("--datasets", metavar="ID", type=hub_id, nargs="+", default=[], help=about)
    options = parser.parse_args(arguments)
    given = (options.run, options.license, options.base_model, options.datasets)
    return run_command(lambda: f"wrote {write_card(*given)}")
