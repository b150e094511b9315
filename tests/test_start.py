"""The start of a run: what it refuses before anything is written."""

from dataclasses import replace

import pytest
import torch

from conftest import random_pairs
from notus import start
from notus.build import Models, Setup, build_plan, make_loss
from notus.config import load_config
from notus.data.packing import Rows
from notus.engine.distributed import Ranks
from notus.errors import UserError
from notus.model import attention
from notus.model.hf_config import read_shape


@pytest.fixture
def setup(tiny_folder, tmp_path):
    """A run on CUDA that asks for FlashAttention."""
    (tmp_path / "config.json").write_text(
        '{"model": {"policy": "p"}, "data": {"train": [{"path": "d"}], "tokens_per_microbatch": '
        '128}, "output_dir": "o", "parallel": {"attention": "varlen"}}'
    )
    config, pairs = load_config(tmp_path / "config.json"), random_pairs(9)
    device = torch.device("cuda")
    return Setup(
        config=config,
        ranks=Ranks(0, 1, device),
        mesh=None,
        models=Models(tiny_folder, read_shape(tiny_folder), None, tiny_folder, tiny_folder),
        loss=make_loss(config),
        plan=build_plan(config, pairs, 1),
        rows=Rows(128, prefix_sharing=True, device=device),
        pairs=pairs,
        held_out=None,
    )


def test_the_predicate_as_it_is_written_is_what_flash_attention_computes(group, setup):
    start.check_predicate(setup)


def test_an_edited_predicate_is_refused_where_flash_attention_would_ignore_it(
    group, setup, monkeypatch
):
    written = attention.may_attend

    def prefix_lm(layout, query, key, window):
        same = layout.document[query] == layout.document[key]
        in_prompt = (layout.branch[query] == 0) & (layout.branch[key] == 0)
        return written(layout, query, key, window) | (same & in_prompt)

    monkeypatch.setattr(attention, "may_attend", prefix_lm)
    with pytest.raises(UserError, match="may_attend"):
        start.check_predicate(setup)
    on_the_cpu = replace(setup, ranks=Ranks(0, 1, torch.device("cpu")))
    start.check_predicate(on_the_cpu)  # where the segments ask the predicate
