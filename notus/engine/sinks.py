"""Where metrics go besides metrics.jsonl: Weights & Biases, Trackio, and TensorBoard's HParams tab.

Names have TRL's prefixes there, so that its dashboards carry over: `eval_loss` is `eval/loss`, and
`loss` is `train/loss`. The libraries are extras, imported where they are used.
"""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from notus.errors import UserError
from notus.files import read_object, write_json, writing

EXTRAS = ("wandb", "trackio")  # names of log.to, of modules and of the extras in setup.py
ID_FILE = "sinks.json"  # in output_dir: {"id"}, under which a resumed run is found again
STEP = "train/global_step"  # the x axis in W&B, as in transformers' integration
COLUMNS = ["prompt", "reference", "policy"]


class Sink(Protocol):
    """A service or program that shows metrics. `name` is for messages."""

    name: str

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics, under the names of metrics.jsonl, after `step` steps."""

    def samples(self, step: int, rows: Sequence[Sequence[str]]) -> None:
        """Record a table of prompts and responses, one row each, under COLUMNS."""

    def close(self) -> None: ...


def shown_name(metric: str) -> str:
    """The metric's name in every sink: eval_loss -> eval/loss, loss -> train/loss."""
    name = metric.removeprefix("eval_")
    return f"eval/{name}" if name != metric else f"train/{metric}"


def check_installed(names: Collection[str]) -> None:
    """Raise UserError for a library that is missing."""
    for name in names:
        if name in EXTRAS and find_spec(name) is None:
            raise UserError(
                f"log.to: found \"{name}\", which is not installed; pip install -e '.[{name}]' in "
                "notus's folder"
            )


def open_sinks(
    names: Collection[str],
    folder: Path,
    *,
    project: str,
    name: str | None,
    tags: Sequence[str],
    settings: Mapping[str, Any],
) -> list[Sink]:
    """The sinks of `names` that are services, each with this run: a new one, or the one begun.

    folder: output_dir, which has the run's identity. name: of the run; None: the folder's. Raises
    UserError where a service refuses the run.
    """
    found: list[Sink] = []
    for each, sink in zip(EXTRAS, (Wandb, Trackio), strict=True):
        if each in names:
            try:
                run = Run(_run_id(folder), folder, project, name, list(tags), dict(settings))
                found.append(sink(run))
            except UserError:
                raise
            except Exception as error:  # each library has its own
                raise UserError(f"log.to: {each} does not take the run: {error}") from None
    return found


def _run_id(folder: Path) -> str:
    """The identity of the run in services, made and written when it is first asked for."""
    path = folder / ID_FILE
    if not path.exists():
        with writing(path):
            write_json(path, {"id": secrets.token_hex(4)}, durable=True)
    return str(read_object(path)["id"])


class Run(NamedTuple):
    """A run as a service is told of it. name: None if the folder's name is to serve."""

    id: str
    folder: Path
    project: str
    name: str | None
    tags: list[str]
    settings: dict[str, Any]


class Wandb:
    """A run in Weights & Biases, found again by its id. WANDB_MODE=offline keeps it in `folder`."""

    name = "wandb"

    def __init__(self, run: Run) -> None:
        import wandb  # an extra

        self._table = wandb.Table
        self._run = wandb.init(
            project=run.project,
            name=run.name or run.folder.resolve().name,
            id=run.id,
            resume="allow",
            tags=run.tags,
            config=run.settings,
            dir=str(run.folder),
            settings=wandb.Settings(console="off"),
        )
        # A resumed run repeats steps, which W&B's own count of them refuses.
        self._run.define_metric("*", step_metric=STEP)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({STEP: step} | {shown_name(name): v for name, v in metrics.items()})

    def samples(self, step: int, rows: Sequence[Sequence[str]]) -> None:
        self._run.log({STEP: step, "samples": self._table(COLUMNS, [list(row) for row in rows])})

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run in Trackio, found again by its name, which has the run's id unless one was given."""

    name = "trackio"

    def __init__(self, run: Run) -> None:
        import trackio  # an extra

        self._table = trackio.Table
        self._run = trackio.init(
            project=run.project,
            name=run.name or f"{run.folder.resolve().name}-{run.id}",
            config=run.settings | {"tags": run.tags},
            resume="allow",
            embed=False,
        )

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({shown_name(name): v for name, v in metrics.items()}, step=step)

    def samples(self, step: int, rows: Sequence[Sequence[str]]) -> None:
        from pandas import DataFrame  # datasets needs it too

        table = self._table(dataframe=DataFrame(rows, columns=COLUMNS))
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        self._run.finish()


class NoBoard:
    """A writer to TensorBoard that writes nothing, whatever is called."""

    def __getattr__(self, name: str) -> "NoBoard":
        return self

    def __call__(self, *given: object, **named: object) -> None:
        pass


# The Custom Scalars tab: training and held-out pairs in one picture, as TensorBoard's tags.
PICTURES = {
    "Loss": ["(train|eval)/loss"],
    "Accuracy": ["(train|eval)/rewards/accuracies"],
    "Margin": ["(train|eval)/rewards/margins"],
    "Rewards": ["(train|eval)/rewards/(chosen|rejected)"],
    "Log-ratio to the reference, per token": ["(train|eval)/displacement/.*_per_token"],
    "Gradient norm": ["train/grad_norm"],
}


def begin_pictures(board: SummaryWriter | NoBoard, settings: Mapping[str, Any]) -> None:
    """Write which metrics TensorBoard's Custom Scalars tab shows: those that the run will log."""
    sft = settings.get("train", {}).get("objective") == "sft"
    names = ("Loss", "Gradient norm") if sft else PICTURES
    board.add_custom_scalars({"Overview": {name: ["Multiline", PICTURES[name]] for name in names}})


def begin_hparams(board: SummaryWriter | NoBoard, settings: Mapping[str, Any]) -> None:
    """Write the configuration to TensorBoard, whose HParams tab then sorts runs by it.

    The tab shows the last value of every metric next to it.
    """
    _, start, _ = hparams(dict(_flat(settings)), {})
    board.file_writer.add_summary(start)


def end_hparams(board: SummaryWriter | NoBoard) -> None:
    """Mark the run as ended in the HParams tab."""
    _, _, end = hparams({}, {})
    board.file_writer.add_summary(end)


def _flat(value: Any, key: str = "") -> list[tuple[str, bool | float | str]]:
    """Dotted keys and values; what is neither number nor text nor object becomes JSON."""
    if isinstance(value, Mapping):
        items = [_flat(item, f"{key}.{name}" if key else name) for name, item in value.items()]
        return [entry for part in items for entry in part]
    return [(key, value if isinstance(value, bool | int | float | str) else json.dumps(value))]
