"""A finished run as its output_dir describes it, and its paths as a published page shows them."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from notus.engine.checkpoint import checkpoints
from notus.engine.history import read_history
from notus.engine.log import read_metrics
from notus.errors import UserError
from notus.files import read_object

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
    lines = read_metrics(metrics)
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
