"""Sinks: what they hold of a run's metrics, and that it is one run after a restart."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data

from notus.engine import sinks
from notus.engine.log import MetricsLog
from notus.engine.sinks import PICTURES, begin_pictures, check_installed, open_sinks, shown_name
from notus.errors import UserError

SETTINGS = {"loss": {"name": "sigmoid", "beta": 0.1}, "data": {"eval": None, "train": ["a"]}}
LINES = {
    0: {"eval_loss": 0.6931, "eval_far/rewards/margins": 0.0},
    1: {"loss": 0.6, "rewards/accuracies": 0.5, "perf/mfu": 0.25},
    2: {"loss": 0.5, "eval_loss": 0.4, "eval_far/rewards/margins": 1.5},
    3: {"loss": 0.4},
}
ROWS = [("q | *?*", "one\ntwo", "three")]


def log_run(folder: Path, names: tuple[str, ...], **about: object) -> None:
    """Steps 0 to 2, and again, as after a kill, from the checkpoint of step 1."""
    for begin, end in ((0, 3), (1, 4)):
        found = open_sinks(
            names, folder, settings=SETTINGS, **{"project": "p", "name": None, "tags": ()} | about
        )
        log = MetricsLog(folder, step=begin, total=3, active=True, sinks=found, settings=SETTINGS)
        for step in range(begin + (begin > 0), end):
            log.write(step, LINES[step])
        log.samples(2, ROWS)
        log.close()


def written(folder: Path) -> dict[str, dict[int, float]]:
    """The values of metrics.jsonl by step, under the sinks' names."""
    found: dict[str, dict[int, float]] = {}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        step = line.pop("step")
        for name, value in line.items():
            found.setdefault(shown_name(name), {})[step] = value
    return found


def test_names_have_trls_prefixes():
    assert [shown_name(n) for n in ("loss", "eval_loss", "eval_far/loss", "rewards/margins")] == [
        "train/loss",
        "eval/loss",
        "eval/far/loss",
        "train/rewards/margins",
    ]


def test_tensorboard_has_all_scalars_and_the_configuration(tmp_path):
    log_run(tmp_path, ())
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = {
        tag: {event.step: pytest.approx(event.value) for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
    }
    assert written(tmp_path) == scalars and len(scalars) == 5
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = parse_session_start_info_plugin_data(content).hparams
    assert hparams["loss.beta"].number_value == 0.1
    assert hparams["loss.name"].string_value == "sigmoid"
    assert hparams["data.eval"].string_value == "null"
    assert hparams["data.train"].string_value == '["a"]'
    assert events.SummaryMetadata("_hparams_/session_end_info")
    *_, layout = events.Tensors("custom_scalars__config__")
    (overview,) = Layout.FromString(layout.tensor_proto.string_val[0]).category
    titles = [chart.title for chart in overview.chart]
    assert titles == list(PICTURES) and overview.chart[0].multiline.tag == ["(train|eval)/loss"]


def test_fine_tuning_has_no_picture_of_rewards():
    board = SimpleNamespace(add_custom_scalars=lambda layout: found.extend(layout["Overview"]))
    found: list[str] = []
    begin_pictures(board, {"train": {"objective": "sft"}})
    assert found == ["Loss", "Gradient norm"]


def test_without_tensorboard_nothing_is_written_there(tmp_path):
    log = MetricsLog(tmp_path, step=0, total=1, active=True, tensorboard=False)
    log.write(0, LINES[0])
    log.show(lambda board: board.add_text("a", "b", 0))
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


class Broken:
    """A service that is down."""

    name = "wandb"

    def scalars(self, *given):
        raise ConnectionError("no route")

    samples = close = scalars


def test_a_sink_that_fails_is_named_once(tmp_path, capsys):
    log = MetricsLog(tmp_path, step=0, total=3, active=True, sinks=[Broken()])
    for step in range(3):
        log.write(step, LINES[step])
    log.samples(2, ROWS)
    log.close()
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told == ["warning: log.to: wandb: no route; metrics.jsonl has all of it"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_library_that_is_missing(monkeypatch):
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    check_installed(["tensorboard"])
    with pytest.raises(UserError, match=r"log.to: found \"wandb\".* pip install -e '.\[wandb\]'"):
        check_installed(["tensorboard", "wandb"])


def test_a_service_that_refuses_the_run(tmp_path, monkeypatch):
    class Refuses:
        @staticmethod
        def init(**given):
            raise RuntimeError("no API key")

        Table = None

    monkeypatch.setitem(sys.modules, "trackio", Refuses)
    with pytest.raises(UserError, match="log.to: trackio does not take the run: no API key"):
        log_run(tmp_path, ("trackio",))


def records(file: Path, wandb_internal) -> list:
    """All records of a .wandb file: LevelDB's log format, after a header of 7 bytes."""
    content, place, found, part = file.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        part += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # full, last
            found.append(wandb_internal.Record.FromString(part))
            part = b""
    return found


def test_wandb_offline_holds_every_scalar(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_run(tmp_path, ("wandb",), name="first", tags=("demo", "beta"))
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    found, tables, runs = {}, [], []
    for record in (record for file in files for record in records(file, wandb_internal_pb2)):
        if record.HasField("run"):
            runs.append(record.run)
        if record.HasField("history"):
            items = {
                i.key or ".".join(i.nested_key): json.loads(i.value_json)
                for i in record.history.item
            }
            step = items.pop("train/global_step")
            tables += [items["samples.nrows"]] if "samples.nrows" in items else []
            for name, value in items.items():
                if not name.startswith(("_", "samples.")):
                    found.setdefault(name, {})[step] = value
    assert found == written(tmp_path)
    (run_id,) = {run.run_id for run in runs}
    assert run_id == json.loads((tmp_path / "sinks.json").read_text())["id"]
    assert (runs[0].project, runs[0].display_name) == ("p", "first")
    assert set(runs[0].tags) == {"demo", "beta"}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["loss"]["beta"] == 0.1
    assert tables == [1, 1]
    (table, *_) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [list(row) for row in ROWS]


def test_trackio_holds_every_scalar(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder = tmp_path / "run"
    folder.mkdir()
    log_run(folder, ("trackio",), project="notus-test", tags=("demo",))
    (name,) = SQLiteStorage.get_runs("notus-test")
    assert name == f"run-{json.loads((folder / 'sinks.json').read_text())['id']}"
    found, tables = {}, []
    for line in SQLiteStorage.get_logs("notus-test", name):
        for key, value in line.items():
            if key == "samples":
                tables.append(value)
            elif key not in ("step", "timestamp"):
                found.setdefault(key, {})[line["step"]] = value
    assert found == written(folder)
    assert tables[0]["_type"] == "trackio.table"
    assert tables[0]["_value"][0]["policy"] == "three"
    config = SQLiteStorage.get_run_config("notus-test", name)
    assert config["loss"]["beta"] == 0.1 and config["tags"] == ["demo"]
