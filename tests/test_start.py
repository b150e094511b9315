"""The start of a run: what it refuses before anything is written."""

import pytest
import torch

from conftest import random_pairs
from notus import start
from notus.build import Models
from notus.config import load_config
from notus.data.packing import Rows
from notus.data.planning import Plan
from notus.errors import UserError
from notus.model import attention
from notus.model.hf_config import read_shape


@pytest.fixture
def arguments(tiny_folder, tmp_path):
    """Of `check_predicate`, for a run on CUDA that asks for FlashAttention."""
    (tmp_path / "config.json").write_text(
        '{"model": {"policy": "p"}, "data": {"train": [{"path": "d"}]}, "output_dir": "o", '
        '"parallel": {"attention": "varlen"}}'
    )
    pairs = random_pairs(9)
    counts = pairs.lengths.sum(1)
    plan = Plan(counts, 4, epochs=1, max_steps=None, seed=0, shuffle=True, ranks=1, budget=128)
    shape = read_shape(tiny_folder)
    models = Models(tiny_folder, shape, None, "p", tiny_folder, tiny_folder)
    rows = Rows(128, prefix_sharing=True, device=torch.device("cuda"))
    return load_config(tmp_path / "config.json"), models, plan, pairs, rows


def test_the_predicate_as_it_is_written_is_what_flash_attention_computes(group, arguments):
    start.check_predicate(*arguments)


def test_an_edited_predicate_is_refused_where_flash_attention_would_ignore_it(
    group, arguments, monkeypatch
):
    written = attention.may_attend

    def prefix_lm(layout, query, key, window):
        same = layout.document[query] == layout.document[key]
        in_prompt = (layout.branch[query] == 0) & (layout.branch[key] == 0)
        return written(layout, query, key, window) | (same & in_prompt)

    monkeypatch.setattr(attention, "may_attend", prefix_lm)
    with pytest.raises(UserError, match="may_attend"):
        start.check_predicate(*arguments)
    on_the_cpu = arguments[-1]._replace(device=torch.device("cpu"))
    start.check_predicate(*arguments[:-1], on_the_cpu)  # where the segments ask the predicate
