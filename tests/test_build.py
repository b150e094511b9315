"""What the configuration names, where it cannot be had."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from notus.build import attention_backend, build_plan
from notus.config import load_config
from notus.errors import UserError
from notus.model.hf_config import read_shape


@pytest.mark.parametrize("attention", ["auto", "flex"])
def test_rows_for_flex_attention_are_of_whole_blocks(tiny_folder, tmp_path, attention):
    """Others would need kernels of their own; a dense mask, also on CUDA, takes any budget."""
    tree = {"model": {"policy": "p"}, "data": {"train": [{"path": "d"}]}, "output_dir": "o"}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    cuda, shape = torch.device("cuda"), replace(read_shape(tiny_folder), head_dim=16)

    def backend(*overrides):
        return attention_backend(load_config(tmp_path / "config.json", [*overrides]), shape, cuda)

    chosen, odd = f"parallel.attention={attention}", "data.tokens_per_microbatch=1000"
    assert backend(chosen) == "flex"
    with pytest.raises(UserError, match="found 1000, expected a multiple of 128"):
        backend(chosen, odd)
    assert backend("parallel.attention=dense", odd) == "dense"


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
