"""Whole runs of train.py on a GPU beside the same on the CPU: NOTUS_TEST_GPU=1 pytest -m gpu."""

import json

import pytest
import torch

import train
from notus.demo import write_demo
from runs import base_config, metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and NOTUS_TEST_GPU=1"),
]


@pytest.fixture(scope="module")
def wide_demo(tmp_path_factory):
    """A demo with heads of 16, the narrowest that FlexAttention's kernels hold."""
    folder = tmp_path_factory.mktemp("wide")
    write_demo(folder, rows=70, sft_passes=0, hidden_size=64, vocabulary=450)
    return folder


def run_steps(demo, folder, *overrides: str) -> list[dict]:
    """The logged lines of four steps."""
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(base_config(demo) | {"output_dir": str(folder / "run")}))
    arguments = [str(path), "train.pairs_per_step=15", "train.max_steps=4", *overrides]
    assert train.main(arguments) == 0
    return metrics(folder / "run")


@pytest.fixture(scope="module")
def on_cpu(wide_demo, tmp_path_factory):
    return run_steps(wide_demo, tmp_path_factory.mktemp("cpu") / "plain", "parallel.device=cpu")


@pytest.mark.parametrize("kernels", ["plain", "triton"])
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["flex", "dense"])
def test_float32_steps_equal_the_cpu(wide_demo, tmp_path, on_cpu, attention, mode, kernels):
    found = run_steps(
        wide_demo,
        tmp_path / attention,
        "parallel.device=cuda",
        f"parallel.attention={attention}",
        f"parallel.activation_checkpointing={mode}",
        f"parallel.kernels={kernels}",
    )
    for ours, theirs in zip(found, on_cpu, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["flex", "varlen"])
def test_bfloat16_steps_are_near_the_cpu(wide_demo, tmp_path, on_cpu, attention, mode):
    """Gradients rounded to bfloat16 on their way; at a small learning rate losses stay near."""
    found = run_steps(
        wide_demo,
        tmp_path / attention,
        "parallel.device=cuda",
        "model.compute_dtype=bfloat16",
        f"parallel.attention={attention}",
        f"parallel.activation_checkpointing={mode}",
    )
    assert found[0]["loss"] == pytest.approx(on_cpu[0]["loss"], rel=1e-2)
    assert found[0]["grad_norm"] == pytest.approx(on_cpu[0]["grad_norm"], rel=5e-2)


def test_runs_repeat_to_the_bit(wide_demo, tmp_path):
    settings = ("parallel.device=cuda", "model.compute_dtype=bfloat16")
    once, again = (run_steps(wide_demo, tmp_path / name, *settings) for name in ("once", "again"))
    for ours, theirs in zip(once, again, strict=True):
        timed = {name for name in ours if name.startswith("perf/")}
        assert {n: v for n, v in ours.items() if n not in timed} == {
            n: v for n, v in theirs.items() if n not in timed
        }
