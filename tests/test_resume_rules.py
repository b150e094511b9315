"""Resuming with an edited program: new keys have their defaults, differences are refused."""

import copy
import json
from collections.abc import Callable
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from notus import resume
from notus.data.token_arrays import TokenizedPairs
from notus.errors import UserError
from notus.model.hf_config import ModelShape, read_shape
from notus.resume import check_checkpoint, differences, what_must_match
from notus.run_folder import check_output_dir

DEFAULTS = {
    "data": {"train": [], "eval": None, "shuffle": True, "tokens_per_microbatch": 8},
    "loss": {"name": "sigmoid", "beta": 0.1},
    "model": {"policy": "P", "reference": None, "lora": None},
    "reference": {"log_probs": "cached", "sync_every": None},
    "train": {"epochs": 1, "max_nonfinite": 3},
    "optimizer": {"betas": [0.9, 0.999]},
    "parallel": {"replicate": 1},
    "log": {"every": 1},
    "checkpoint": {"every": 5},
    "evaluation": {"every": 5},
    "output_dir": "out",
}
PAIRS = TokenizedPairs(np.zeros(3, np.int32), np.zeros(3, bool), np.array([[1, 1, 1]]))


def changed(key: str, value: Any) -> dict[str, Any]:
    """The defaults with one key changed or added."""
    settings = copy.deepcopy(DEFAULTS)
    section, name = key.split(".")
    settings.setdefault(section, {})[name] = value
    return settings


def reader(today: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Reads settings with the keys and defaults of `today`."""

    def resolve(settings: dict[str, Any]) -> dict[str, Any]:
        for section, values in settings.items():
            for key in values if isinstance(values, dict) else ():
                if key not in today[section]:
                    raise UserError(f"{section}.{key}: unknown key")
        return {
            section: values | settings.get(section, {})
            if isinstance(values, dict)
            else settings.get(section, values)
            for section, values in today.items()
        }

    return resolve


def started(folder: Path, settings: dict[str, Any], shape: ModelShape) -> Path:
    """An output_dir and a checkpoint of a run with these settings."""
    (folder / "config.json").write_text(json.dumps(settings))
    saved = folder / "checkpoints/step-00000004"
    saved.mkdir(parents=True)
    common = what_must_match(settings, shape, PAIRS, {"sha256": "r"}, None, 9)
    (saved / "state.json").write_text(json.dumps({"common": common, "settings": settings}))
    return saved


@pytest.fixture
def shape(tiny_folder) -> ModelShape:
    return read_shape(tiny_folder)


def problems(
    folder: Path, saved: Path, settings: dict[str, Any], today: dict[str, Any], shape: ModelShape
) -> list[str]:
    """The messages with which output_dir and checkpoint are refused."""
    common = what_must_match(settings, shape, PAIRS, {"sha256": "r"}, None, 9)
    said = []
    for check in (
        lambda: check_output_dir(folder, settings, "auto"),
        lambda: check_checkpoint(saved, common, settings),
    ):
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(resume, "settings_now", reader(today))
                check()
        except UserError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("key", ["train.my_flag", "log.colour", "mine.flag"])
def test_an_added_key_has_its_default_in_an_older_run(shape, tmp_path, key):
    saved = started(tmp_path, DEFAULTS, shape)
    today = changed(key, False)
    assert problems(tmp_path, saved, today, today, shape) == []
    used = problems(tmp_path, saved, changed(key, True), today, shape)
    expected = 0 if key.startswith("log.") else 2
    assert [f"({key} was false and is true)" in text for text in used] == [True] * expected


@pytest.mark.parametrize("key", ["train.old", "checkpoint.old", "parallel.old"])
def test_a_removed_key_is_named_unless_it_may_change(shape, tmp_path, key):
    saved = started(tmp_path, changed(key, 3), shape)
    said = problems(tmp_path, saved, DEFAULTS, DEFAULTS, shape)
    expected = 2 if key == "train.old" else 0
    assert [f"({key}: unknown key)" in text for text in said] == [True] * expected


@pytest.mark.parametrize("key", ["data.eval", "train.max_nonfinite", "evaluation.every"])
def test_a_setting_that_may_change(shape, tmp_path, key):
    saved = started(tmp_path, DEFAULTS, shape)
    assert problems(tmp_path, saved, changed(key, 7), DEFAULTS, shape) == []


def test_another_path_may_hold_the_same_model(shape, tmp_path):
    """The folder of a run is then another run's; the checkpoint goes by the model's hash."""
    saved = started(tmp_path, DEFAULTS, shape)
    (said,) = problems(tmp_path, saved, changed("model.policy", "Q"), DEFAULTS, shape)
    assert 'holds another run (model.policy was "P" and is "Q")' in said


def test_an_added_field_of_the_shape_has_its_default(shape, tmp_path, monkeypatch):
    saved = started(tmp_path, DEFAULTS, shape)
    added = [("value_norm", bool, field(default=False))]
    wider = make_dataclass("Wider", added, bases=(ModelShape,), frozen=True, kw_only=True)
    monkeypatch.setattr(resume, "ModelShape", wider)
    fields = {name: getattr(shape, name) for name in shape.__dataclass_fields__}
    assert problems(tmp_path, saved, DEFAULTS, DEFAULTS, wider(**fields)) == []
    (said,) = problems(tmp_path, saved, DEFAULTS, DEFAULTS, wider(**fields, value_norm=True))
    assert "(model_shape.value_norm was false and is true)" in said


def test_the_entry_of_a_list_that_differs_is_named():
    before = {"data.train": [{"path": "a", "weight": 1.0}, {"path": "b"}]}
    now = {"data.train": [{"path": "a", "weight": 2.0}]}
    assert differences(before, now) == (
        'data.train.0.weight was 1.0 and is 2.0; data.train.1 was {"path": "b"} and is null'
    )


def test_the_nested_entry_that_differs_is_named():
    before = {"model_shape": {"num_hidden_layers": 2, "rope": {"factor": 2.0}, "vocab_size": 9}}
    now = {"model_shape": {"num_hidden_layers": 3, "rope": {"factor": 4.0}, "vocab_size": 9}}
    assert differences(before, before) == ""
    assert differences(before, now) == (
        "model_shape.num_hidden_layers was 2 and is 3; model_shape.rope.factor was 2.0 and is 4.0"
    )
    assert differences({"lora": None}, {"lora": {"rank": 8}}) == 'lora was null and is {"rank": 8}'
    assert differences({}, {"a": 1, "b": 2, "c": 3, "d": 4, "e": None}).endswith("; and 1 more")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "mistral"}', '{"train": 3}'])
def test_a_folder_with_another_config_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="is not empty and holds no run"):
        check_output_dir(tmp_path, DEFAULTS, "auto")
