"""Attention backends that the configuration names, where they cannot be had."""

import json
from dataclasses import replace

import pytest
import torch

from notus.config import load_config
from notus.errors import UserError
from notus.model.hf_config import read_shape
from notus.models import attention_backend


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
