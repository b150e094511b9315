"""Attention and whole runs of train.py on a GPU: NOTUS_TEST_GPU=1 pytest -m gpu."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from benchmarks.flex_tiles import spills
from conftest import random_pairs
from notus.data.packing import PADDING, pack
from notus.data.planning import Plan
from notus.demo import write_demo
from notus.engine.metrics import Meter
from notus.engine.saver import Saver
from notus.model import attention
from notus.model.attention import attend, build_mask, may_attend
from runs import base_config, metrics, stored

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
        assert untimed(ours) == untimed(theirs)


OPTIONS = {
    "rmsprop": ['optimizer={"name":"rmsprop","learning_rate":1e-4}'],
    "bfloat16 state": ["optimizer.state_dtype=bfloat16", "optimizer.learning_rate=1e-5"],
    "kept gathered": ["parallel.keep_gathered=true", "data.tokens_per_microbatch=256"],
    "gathered each time": ["parallel.keep_gathered=false", "data.tokens_per_microbatch=256"],
    "offload": ["parallel.cpu_offload=true"],
    "adapters": ['model.lora={"rank":4,"alpha":8}'],
    "not compiled": ["parallel.compile=false"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_trains_as_on_the_cpu(wide_demo, tmp_path, name):
    ours, theirs = (
        run_steps(wide_demo, tmp_path / device, f"parallel.device={device}", *OPTIONS[name])
        for device in ("cuda", "cpu")
    )
    for found, expected in zip(ours, theirs, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
        assert found["perf/reserved_memory_gib"] >= found["perf/peak_memory_gib"] > 0


def test_another_process_resumes_to_the_bit(wide_demo, tmp_path):
    """With kernels that it compiles itself, and a first step whose row has another length."""

    def run(output: Path) -> None:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"{output.name}-cache")
        }
        command = [sys.executable, "train.py", str(config), f"output_dir={output}"]
        subprocess.run(command, cwd=Path(train.__file__).parent, env=environment, check=True)

    config, whole, resumed = (tmp_path / name for name in ("config.json", "whole", "resumed"))
    settings = base_config(wide_demo)
    settings["model"]["compute_dtype"] = "bfloat16"
    settings["train"] = {"pairs_per_step": 15, "max_steps": 4}
    settings["checkpoint"] = {"every": 2}
    config.write_text(json.dumps(settings))
    run(whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "final")
    shutil.rmtree(resumed / "checkpoints/step-00000004")
    run(resumed)
    for ours, theirs in zip(metrics(resumed), metrics(whole), strict=True):
        assert untimed(ours) == untimed(theirs)
    ours, theirs = (stored(out / "checkpoints/step-00000004", "model") for out in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_steps_neither_compile_nor_wait(wide_demo, tmp_path, monkeypatch):
    """Rows of several lengths have the warm-up's kernels; only the verdict and a save wait."""
    loop, divide, lengths = train.train, Plan.division, set()

    def waiting(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def allowed(*arguments, **options):
            torch.cuda.set_sync_debug_mode("default")
            result = function(*arguments, **options)
            torch.cuda.set_sync_debug_mode("error")
            return result

        monkeypatch.setattr(owner, name, allowed)

    def divided(*arguments):
        division = divide(*arguments)
        lengths.add(division.slots)
        return division

    def watched(*arguments):
        monkeypatch.setattr(Plan, "division", divided)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch._dynamo.config.patch(error_on_recompile=True):
                return loop(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    waiting(Meter, "end_step")
    waiting(Saver, "save")
    monkeypatch.setattr(train, "train", watched)
    device = "parallel.device=cuda"
    found = run_steps(wide_demo, tmp_path / "run", device, "data.tokens_per_microbatch=1024")
    assert len(found) == 4 and len(lengths) > 1


def test_evaluations_are_those_of_the_cpu(wide_demo, tmp_path):
    model, prompts = str(wide_demo / "sft"), str(wide_demo / "prompts.jsonl")
    data = ["--data", str(wide_demo / "heldout.jsonl"), "--rule", "mean-rating"]
    data += ["--compute-dtype", "float32", "--max-length", "96", "--max-prompt-length", "48"]
    answers = ["--reference", model, "--prompts", prompts, "--max-new-tokens", "4"]
    metrics, pages = [], []
    for device in ("cuda", "cpu"):
        pairs, page = (tmp_path / f"{device}-{name}" for name in ("pairs", "samples.md"))
        own = ["--device", device, "--out"]
        assert evaluation.main(["preferences", model, *data, *own, str(pairs)]) == 0
        options = [*answers, "--dtype", "float32", *own, str(page)]
        assert evaluation.main(["samples", model, *options]) == 0
        metrics.append(json.loads((pairs / "summary.json").read_text())["metrics"])
        pages.append(page.read_text())
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-3)
    assert pages[0] == pages[1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("pairs", "mesh"),
    [(15, ["parallel.shard=2"]), (15, ["parallel.shard=1", "parallel.replicate=2"]), (1, [])],
)
def test_two_gpus_train_as_the_cpu(wide_demo, tmp_path, pairs, mesh):
    """NCCL adds what the CPU adds; of one pair in a step, one of the ranks gets none."""
    size = f"train.pairs_per_step={pairs}"
    expected = run_steps(wide_demo, tmp_path / "cpu", "parallel.device=cpu", size)
    config, output = tmp_path / "cpu/config.json", tmp_path / "two"
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train.py"]
    words = [str(config), size, "train.max_steps=4", f"output_dir={output}", *mesh]
    subprocess.run([*program, *words], cwd=Path(train.__file__).parent, check=True)
    for ours, theirs in zip(metrics(output), expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-2)


def untimed(line: dict) -> dict:
    """The metrics of a line that do not depend on the clock or the memory."""
    return {name: value for name, value in line.items() if not name.startswith("perf/")}


def attention_case(hide: float):
    """A row of 8,192 slots, bfloat16, 8 query heads and 2 key and value heads of 128."""
    pairs = random_pairs(12, hide=hide, prompt=(50, 400), response=(20, 250))
    layout = pack(pairs, range(12), 8192, True).to(torch.device("cuda")).layout
    generator = torch.Generator("cuda").manual_seed(0)
    *qkv, weight = (
        torch.randn(8192, heads, 128, generator=generator, device="cuda").bfloat16()
        for heads in (8, 2, 2, 8)
    )
    weight[(layout.document == PADDING) | layout.hidden] = 0
    return layout, [x.requires_grad_() for x in qkv], weight


def with_gradients(qkv, weight, mask) -> list[torch.Tensor]:
    out = attend(*qkv, mask)
    return [out * weight, *torch.autograd.grad(out, qkv, weight.to(out.dtype))]


@pytest.mark.parametrize("backend", ["flex", "varlen", "dense"])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("hide", [0.0, 0.05])
def test_wide_heads_of_a_long_row(hide, window, backend):
    """Output and gradients against the dense mask in float32, within bfloat16's rounding."""
    layout, qkv, weight = attention_case(hide)
    found = with_gradients(qkv, weight, build_mask(layout, window, backend))
    wide = [x.detach().float().requires_grad_() for x in qkv]
    expected = with_gradients(wide, weight, build_mask(layout, window, "dense"))
    for ours, theirs in zip(found, expected, strict=True):
        difference = (ours.float() - theirs.float()).abs()
        assert difference.max() <= 2e-2 * theirs.abs().max()
        assert difference.norm() <= 1e-2 * theirs.norm()


def test_an_edited_predicate_reaches_the_kernel(monkeypatch):
    layout, qkv, weight = attention_case(0.05)

    def sinks(layout, query, key, window):
        first = may_attend(layout, query, key, None) & (layout.position[key] < 4)
        return may_attend(layout, query, key, window) | first

    monkeypatch.setattr(attention, "may_attend", sinks)
    flex, dense = (
        with_gradients(qkv, weight, build_mask(layout, 100, backend))
        for backend in ("flex", "dense")
    )
    for ours, theirs in zip(flex, dense, strict=True):
        assert (ours - theirs).float().norm() <= 1e-2 * theirs.float().norm()


def test_attention_kernels_keep_their_registers():
    """As PyTorch chooses its tiles, the backward kernel spills hundreds of a thread's registers."""
    torch.compiler.reset()
    attention._compiled_flex_attention.cache_clear()
    layout, qkv, weight = attention_case(0.05)
    with_gradients(qkv, weight, build_mask(layout, 300, "flex"))
    found = spills()
    assert len(found) >= 2 and max(found) <= 16
