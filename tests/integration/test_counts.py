"""What train.py really computes, counted in its own process: tokens, passes, compilations."""

import json
import sys
from functools import partial

import flash_on_cpu  # noqa: F401  registers FlashAttention's operator
import pytest
import torch
from torch.nn.attention import flex_attention
from torch.overrides import TorchFunctionMode

import train
from notus import build
from notus.config import load_config
from notus.data import packing
from notus.data.packing import PADDING
from notus.engine.metrics import Speed
from notus.model import attention as attention_module
from notus.model.attention import SegmentMask
from notus.objective import logprobs
from runs import base_config, metrics, pairs_of


@pytest.fixture
def forwards(monkeypatch):
    """One entry for every forward pass: (with gradient?, tokens in the row, slots of the row)."""
    seen, build = [], logprobs.build_mask

    def counted(layout, window, backend):
        tokens = int((layout.document != PADDING).sum())
        seen.append((torch.is_grad_enabled(), tokens, len(layout.document)))
        return build(layout, window, backend)

    monkeypatch.setattr(logprobs, "build_mask", counted)
    return seen


def train_here(config: dict, folder, *overrides: str):
    """train.py in this process; returns the pairs it trained on."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config | {"output_dir": str(folder / "run")}))
    assert train.main([str(path), *overrides]) == 0
    return pairs_of(load_config(path, overrides))[0]


@pytest.mark.parametrize("sharing", [True, False])
def test_tokens_processed_and_one_reference_pass(demo, tmp_path, forwards, sharing):
    """Two epochs: each token twice with gradient, and once, before them, by the reference."""
    pairs = train_here(
        base_config(demo), tmp_path, "train.epochs=2", f"data.prefix_sharing={str(sharing).lower()}"
    )
    prompt, chosen, rejected = pairs.lengths.sum(0).tolist()
    once = (prompt if sharing else 2 * prompt) + chosen + rejected
    trained = [tokens for gradient, tokens, _ in forwards if gradient]
    scored = [tokens for gradient, tokens, _ in forwards if not gradient]
    assert sum(trained) == 2 * once
    *reference, start = scored  # the last one is the check that policy and reference agree
    assert sum(reference) == once and start == trained[0]
    assert forwards[: len(scored)] == [f for f in forwards if not f[0]]


def test_a_cached_reference_is_not_run_again(demo, tmp_path, forwards):
    """A second run in the same folder recomputes its sample, one pair of 64."""
    config, longest = base_config(demo), 2 * 96
    train_here(config, tmp_path, "train.max_steps=1")
    forwards.clear()
    (tmp_path / "run/final").rename(tmp_path / "final")
    (tmp_path / "run/checkpoints").rename(tmp_path / "checkpoints")
    train_here(config, tmp_path, "train.max_steps=1")
    sample, start = (tokens for gradient, tokens, _ in forwards if not gradient)
    assert sample <= longest
    assert start == next(tokens for gradient, tokens, _ in forwards if gradient)


def test_runs_share_a_reference_pass(demo, tmp_path, forwards, capfd):
    """Another loss, beta, rate and seed: the same log-probs, in the same file, and no pass."""
    config = base_config(demo) | {"reference": {"cache": str(tmp_path / "cache")}}
    config["data"] |= {"seed": 42}  # of which response is drawn as the rejected one
    train_here(config, tmp_path / "one", "train.max_steps=1")
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    first = file.read_bytes()
    forwards.clear(), capfd.readouterr()
    others = "loss.beta=0.5", "loss.name=hinge", "optimizer.learning_rate=1e-5", "train.seed=7"
    train_here(config, tmp_path / "two", "train.max_steps=1", *others)
    sample, start = (tokens for gradient, tokens, _ in forwards if not gradient)
    assert sample <= 2 * 96 and start == next(
        tokens for gradient, tokens, _ in forwards if gradient
    )
    assert f"reference log-probs read from {file}, no pass" in capfd.readouterr().out
    assert file.read_bytes() == first and len(list(file.parent.iterdir())) == 2
    (line,) = metrics(tmp_path / "two/run")
    assert line["loss"] == pytest.approx(1.0)  # hinge of a margin of 0: the log-probs are these


def test_evaluation_is_not_timed_as_training(demo, tmp_path, monkeypatch):
    """Each time, the one before the first step too, the clock starts anew before the next step."""
    events, evaluate_held_out = [], train.evaluate_held_out
    restart, count = Speed.restart, Speed.count

    def evaluated(*arguments) -> dict[str, float]:
        events.append("evaluation")
        return evaluate_held_out(*arguments)

    monkeypatch.setattr(
        Speed, "restart", lambda *given: (events.append("restart"), restart(*given))
    )
    monkeypatch.setattr(Speed, "count", lambda *given: (events.append("step"), count(*given)))
    monkeypatch.setattr(train, "evaluate_held_out", evaluated)
    config = base_config(demo) | {"evaluation": {"every": 1}, "log": {"every": 3}}
    config["data"] = config["data"] | {"eval": {"holdout": 8}}
    train_here(config, tmp_path, "train.max_steps=2")
    assert events.count("evaluation") == 3
    after = [events[i + 1] for i, event in enumerate(events) if event == "evaluation"]
    assert after == ["restart"] * 3


class Waits(TorchFunctionMode):
    """Notes the calls that make the host wait for the device, where that is a GPU.

    But those of the optimiser, whose counts of steps are on the host everywhere.
    """

    CALLS = frozenset(
        getattr(torch.Tensor, name)
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__")
    )

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_function__(self, function, types, arguments=(), options=None):
        caller = sys._getframe(1).f_globals["__name__"]
        if function in self.CALLS and not caller.startswith("torch.optim."):
            self.events.append("wait")
        return function(*arguments, **options or {})


def test_a_step_waits_once(demo, tmp_path, monkeypatch):
    """After its last microbatch, for the verdict and the metrics: they share one reduction.

    So the host packs each microbatch while a GPU still computes those before it.
    """
    events: list[str] = []
    loop = train.train

    def watched(*arguments: object) -> bool:
        with Waits(events):
            return loop(*arguments)

    def noted(owner: object, name: str, event: str) -> None:
        function = getattr(owner, name)

        def note(*arguments: object, **options: object) -> object:
            events.append(event)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, note)

    noted(packing, "pack", "pack")
    noted(torch.autograd, "backward", "backward")
    noted(torch.distributed, "all_reduce", "reduction")
    noted(torch.optim.Optimizer, "zero_grad", "end")
    monkeypatch.setattr(train, "train", watched)
    overrides = "data.tokens_per_microbatch=256", "train.max_steps=3", "parallel.attention=dense"
    train_here(base_config(demo), tmp_path, *overrides)
    step = [*["pack", "backward"] * 3, "reduction", "wait", "end"]
    assert events[-3 * len(step) :] == step * 3


@pytest.mark.parametrize("name", ["sigmoid", "aot"])
@pytest.mark.parametrize("log_probs", ["cached", "online"])
def test_scorings_are_counted(demo, tmp_path, forwards, monkeypatch, name, log_probs):
    """Work.scorings is the number of passes without gradient in a step of one row."""
    counted = []

    def count(speed, *arguments) -> None:
        counted.append((speed.work.scorings, [gradient for gradient, *_ in forwards]))
        forwards.clear()

    monkeypatch.setattr(Speed, "count", count)
    monkeypatch.setattr(Speed, "report", lambda speed: {})
    config = base_config(demo) | {"loss": {"name": name}, "reference": {"log_probs": log_probs}}
    overrides = "train.max_steps=2", "data.tokens_per_microbatch=4096"
    train_here(config, tmp_path, *overrides)
    scorings, gradients = counted[1]
    assert gradients.count(True) == 1 and gradients.count(False) == scorings


FIVE_STEPS = "train.pairs_per_step=15", "train.max_steps=5", "data.tokens_per_microbatch=1024"


@pytest.fixture(scope="module")
def plain(demo, tmp_path_factory) -> list[dict]:
    """What five steps log without compilation."""
    folder = tmp_path_factory.mktemp("plain")
    train_here(base_config(demo), folder, *FIVE_STEPS)
    return metrics(folder / "run")


@pytest.mark.parametrize(
    ("attention", "mode"),
    [
        ("dense", "none"),
        ("dense", "selective"),
        ("dense", "full"),
        ("flex", "selective"),
        ("varlen", "selective"),
    ],
)
def test_rows_of_all_lengths_share_a_compilation(
    demo, tmp_path, plain, forwards, monkeypatch, attention, mode
):
    """Rows differ in length from step to step, and all blocks are alike: nothing is compiled anew.

    Scoring without gradient is another graph. Flex and varlen are tried as they are on CUDA, which
    a user cannot ask for on the CPU. The steps are those of a run without compilation.
    """
    compiled, compile_with = [], torch.compile

    def backend(graph, inputs):
        compiled.append(torch.is_grad_enabled())
        return graph.forward

    arguments = *FIVE_STEPS, f"parallel.activation_checkpointing={mode}"
    monkeypatch.setattr(torch, "compile", partial(compile_with, backend=backend))
    monkeypatch.setattr(build, "attention_backend", lambda *arguments: attention)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(
        attention_module,
        "_in_segments",
        lambda layout, window: SegmentMask(layout.segments, window, masks=None),
    )
    torch._dynamo.reset()
    train_here(base_config(demo), tmp_path / "compiled", *arguments, "parallel.compile=true")
    assert len({slots for gradient, _, slots in forwards if gradient}) > 1
    assert compiled.count(True) == 1
    assert compiled.count(False) == 1
    for ours, theirs in zip(metrics(tmp_path / "compiled/run"), plain, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    torch._dynamo.reset()
