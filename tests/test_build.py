"""The plan that the configuration asks for."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from notus.build import build_plan
from notus.config import load_config
from notus.errors import UserError


def test_a_run_of_more_steps_than_anybody_wants(tmp_path):
    tree = {"model": {"policy": "p"}, "data": {"train": [{"path": "d"}]}, "output_dir": "o"}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    pairs = SimpleNamespace(lengths=np.full((9, 3), 5))

    def plan(*overrides):
        words = ["train.pairs_per_step=4", *overrides]
        return build_plan(load_config(tmp_path / "config.json", words), pairs, 1)

    with pytest.raises(UserError, match="train.epochs: found 3,333,334, .* 10,000,002 steps; exp"):
        plan("train.epochs=3333334")
    assert plan("train.epochs=3333333").steps == 9_999_999
    assert plan("train.epochs=1000000000", "train.max_steps=7").steps == 7
