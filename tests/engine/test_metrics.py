import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from conftest import random_pairs
from notus.data.packing import pack, slots_of
from notus.data.planning import Division
from notus.engine import metrics
from notus.engine.flops import Work, forward_flops, hardware_flops, model_flops, peak_flops
from notus.engine.log import MetricsLog
from notus.engine.metrics import Speed, Totals, pair_metrics
from notus.model.hf_config import ModelShape
from notus.model.mistral import count_parameters
from notus.objective.logprobs import token_log_probs
from notus.objective.loss import build_loss
from notus.objective.losses import PairLogProbs, Sums

MISTRAL_7B = ModelShape(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    sliding_window=4096,
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
)
CPU = torch.device("cpu")


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def log_probs(policy_chosen, policy_rejected, reference_chosen, reference_rejected, lengths):
    """Pairs with these summed log-probs and lengths; what the metrics do not read is nan."""
    chosen_length, rejected_length = torch.tensor(lengths).T
    unread = torch.full((len(lengths),), torch.nan)

    def sums(chosen, rejected):
        read = (torch.tensor(values, dtype=torch.float64) for values in (chosen, rejected))
        return Sums(*read, unread, unread)

    return PairLogProbs(
        policy=sums(policy_chosen, policy_rejected),
        reference=sums(reference_chosen, reference_rejected),
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        mean_chosen_length=unread[0],
    )


def test_pair_metrics_by_hand():
    """A win, a tie (which is no win) and a loss."""
    pairs = log_probs(
        policy_chosen=[-9.0, -8.0, -14.0],
        policy_rejected=[-12.0, -6.0, -10.0],
        reference_chosen=[-10.0, -10.0, -10.0],
        reference_rejected=[-10.0, -8.0, -13.0],
        lengths=[(4, 5), (2, 3), (6, 2)],
    )
    loss = build_loss({"name": "sigmoid", "beta": 0.1})
    found = pair_metrics(torch.tensor([0.5, 0.7, 1.2]), pairs, loss)
    # Ratios: chosen 1, 2, -4; rejected -2, 2, 3.
    expected = {
        "loss": (2.4, 3),
        "rewards/chosen": (-0.1, 3),
        "rewards/rejected": (0.3, 3),
        "rewards/accuracies": (1, 3),
        "rewards/margins": (-0.4, 3),
        "logps/chosen": (-31, 3),
        "logps/rejected": (-28, 3),
        "displacement/chosen_falling": (1, 3),
        "displacement/chosen_per_token": (-1, 12),
        "displacement/rejected_per_token": (3, 10),
    }
    assert found.keys() == expected.keys()
    for name, pair in found.items():
        assert [value.dtype for value in pair] == [torch.float64] * 2
        assert [float(value) for value in pair] == pytest.approx(expected[name], abs=1e-6), name


def test_metrics_of_supervised_fine_tuning():
    """Per token, not per response; nothing of the rejected response or the reference is read."""
    unread = [math.nan] * 2
    pairs = log_probs([-9.0, -8.0], unread, unread, unread, [(4, 0), (2, 0)])
    found = pair_metrics(torch.tensor([3.0, 2.7]), pairs, build_loss({"name": "sft"}))
    found = {name: [float(value) for value in pair] for name, pair in found.items()}
    assert found == {"loss": [17.0, 6.0], "logps/chosen": [-17.0, 2.0]}


def test_means_do_not_depend_on_the_division(one_process):
    rng = np.random.default_rng(0)
    values = {name: rng.normal(-50, 20, 40) for name in ("pc", "pr", "rc", "rr")}
    lengths = rng.integers(1, 30, (40, 2))
    losses = rng.random(40)
    loss = build_loss({"name": "sigmoid", "beta": 0.3})

    def part(rows):
        logs = [values[name][rows].tolist() for name in ("pc", "pr", "rc", "rr")]
        pairs = log_probs(*logs, lengths[rows].tolist())
        return pair_metrics(torch.tensor(losses[rows]), pairs, loss)

    chosen, rejected = values["pc"] - values["rc"], values["pr"] - values["rr"]
    expected = {
        "loss": losses.mean(),
        "rewards/chosen": 0.3 * chosen.mean(),
        "rewards/rejected": 0.3 * rejected.mean(),
        "rewards/accuracies": (chosen > rejected).mean(),
        "rewards/margins": 0.3 * (chosen - rejected).mean(),
        "logps/chosen": values["pc"].mean(),
        "logps/rejected": values["pr"].mean(),
        "displacement/chosen_falling": (chosen < 0).mean(),
        "displacement/chosen_per_token": chosen.sum() / lengths[:, 0].sum(),
        "displacement/rejected_per_token": rejected.sum() / lengths[:, 1].sum(),
    }
    totals = Totals()
    for edges in ([0, 40], [0, 1, 17, 40]):
        for first, last in zip(edges[:-1], edges[1:], strict=True):
            totals.add(part(slice(first, last)))
        assert totals.means() == pytest.approx(expected, rel=1e-12)
    totals.add(part(slice(7, 30)))
    resumed = Totals()  # what a checkpoint between two reports carries over
    resumed.restore(json.loads(json.dumps(totals.snapshot())), CPU)
    for either in (totals, resumed):
        either.add(part(slice(30, 40)))
    assert totals.means() == resumed.means()
    assert totals.snapshot() == {}
    totals.add(part(slice(7, 8)))
    assert totals.means()["loss"] == pytest.approx(losses[7])  # nothing is left of what was told


def mean_pair_flops(prompt, chosen, rejected):
    return model_flops(MISTRAL_7B, np.array([[prompt, chosen, rejected]]))


def test_model_flops_of_mistral_7b():
    """Roofline by hand for 168 + 314 + 277 tokens: 32.6 TFLOP, each factor written out."""
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    assert 32 * block == 6_979_321_856
    linear = 2 * 6_979_321_856 * 759
    # Own part and everything before it, each token with itself.
    prompt, chosen, rejected = 168 * 169 // 2, 314 * 315 // 2, 277 * 278 // 2
    attended = prompt + chosen + rejected + 168 * (314 + 277)
    attention = 4 * 4096 * 32 * attended
    head = 2 * 4096 * 32_000 * 591
    found = mean_pair_flops(168, 314, 277)
    assert found == 3 * (linear + attention + head)
    assert found == pytest.approx(32.6e12, rel=2e-3)
    two = model_flops(MISTRAL_7B, np.array([[168, 314, 277], [10, 20, 30]]))
    assert two == found + mean_pair_flops(10, 20, 30)


def test_model_flops_against_torch(tiny_model):
    """torch counts the forward's matrix products, attention apart; training is three times that."""
    pairs = random_pairs(3, seed=1)
    batch = pack(pairs, [0, 1, 2], int(slots_of(pairs.lengths, True).sum()), prefix_sharing=True)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        token_log_probs(tiny_model, batch, False)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    shape = tiny_model.shape
    tokens = [(p, side) for p, *sides in pairs.lengths.tolist() for side in sides]
    attended = sum(sum(range(1, p + 1)) for p in pairs.lengths[:, 0].tolist())
    attended += sum(p + i for p, side in tokens for i in range(1, side + 1))
    width = shape.num_attention_heads * shape.head_dim
    attention = (
        2 * 2 * width * attended * shape.num_hidden_layers
    )  # q k and p v, a product-sum each
    assert model_flops(shape, pairs.lengths) == 3 * (products + attention)
    assert model_flops(shape, pairs.lengths, frozen=True) == 2 * products + 3 * attention


def test_speed(monkeypatch):
    clock = iter([100.0, 102.0, 102.0, 106.0, 106.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e15)
    lengths = np.array([[10, 20, 30], [5, 5, 5]])
    speed = Speed(MISTRAL_7B, ranks=2, device=CPU)
    division = Division(bins=[[[0], []], [[1], []]], slots=64)
    speed.count(lengths, 75, division)
    speed.count(lengths[:1], 60, Division(bins=[[[0], []]], slots=64))
    report = speed.report()
    # Unshared tokens, 2P + C + R: 70 and 20, then 70; slots: 2 x 64 x 2 ranks, then 64 x 2.
    assert report["perf/tokens_per_second"] == 160 / 2
    assert report["perf/pairs_per_second"] == 3 / 2
    assert report["perf/packing"] == 135 / 384
    flops = model_flops(MISTRAL_7B, lengths[[0, 1, 0]])
    assert report["perf/mfu"] == pytest.approx(flops / 2 / 2e15)
    # 384 slots for 60 + 15 + 60 tokens; the blocks' products run over all of them.
    products, attention, head = forward_flops(MISTRAL_7B, lengths[[0, 1, 0]])
    first, second = (forward_flops(MISTRAL_7B, part)[0] for part in (lengths, lengths[:1]))
    executed = 3 * (first * 256 / 75 + second * 128 / 60) + 3.5 * attention + 4 * head
    assert report["perf/hfu"] == pytest.approx(executed / 2 / 2e15)
    assert flops == pytest.approx(3 * (products + attention + head))
    assert report["perf/peak_memory_gib"] > 0.01
    speed.count(lengths[:1], 60, Division(bins=[[[0], []]], slots=64))
    assert speed.report()["perf/pairs_per_second"] == 1 / 4  # from zero again


def test_hardware_flops_by_hand():
    """One block of width 2 with one head of size 2, inner 3, vocabulary 5; P, C, R = 2, 1, 3."""
    shape = replace(
        MISTRAL_7B,
        hidden_size=2,
        intermediate_size=3,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=5,
    )
    lengths = np.array([[2, 1, 3]])
    products = 2 * (4 * 2 * 2 + 3 * 2 * 3) * 6
    attention = 4 * 2 * (3 + 2 * 4 + 1 + 6)
    head = 2 * 2 * 5 * 4
    assert forward_flops(shape, lengths) == (products, attention, head)
    everything = Work(frozen=False, recomputed=True, scorings=2)
    expected = 6 * products * 8 / 6 + 6.5 * attention + 6 * head
    assert hardware_flops(shape, lengths, 8, everything) == pytest.approx(expected)
    adapters = hardware_flops(shape, lengths, 6, Work(frozen=True))
    assert adapters == pytest.approx(2 * products + 3.5 * attention + 3 * head)


def test_time_left_out(monkeypatch):
    clock = iter([0.0, 50.0, 51.0, 51.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    speed = Speed(MISTRAL_7B, ranks=1, device=CPU)
    speed.restart()
    speed.count(np.array([[1, 1, 1]]), 3, Division(bins=[[[0]]], slots=128))
    report = speed.report()
    assert report["perf/pairs_per_second"] == 1
    assert "perf/mfu" not in report  # no peak is known of a CPU


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H200", 989.4e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("GeForce GTX 1080", None)],
)
def test_peak_flops(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def write(folder, steps, *, step=0, active=True):
    log = MetricsLog(folder, step=step, total=10, active=active)
    for done in steps:
        log.write(done, {"loss": 1.0 / (done + 1), "rewards/margins": float(done)})
    log.close()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_log_writes_lines_and_events(tmp_path):
    write(tmp_path, [0, 2, 4])
    assert lines(tmp_path) == [
        {"step": 0, "loss": 1.0, "rewards/margins": 0.0},
        {"step": 2, "loss": 1 / 3, "rewards/margins": 2.0},
        {"step": 4, "loss": 1 / 5, "rewards/margins": 4.0},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "rewards/margins"]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(0, 1.0), (2, pytest.approx(1 / 3)), (4, pytest.approx(1 / 5))]


def test_resumed_log_replaces_later_steps(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn when the run was killed
    write(tmp_path, [3, 4, 5], step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["metrics.jsonl"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_other_ranks_and_empty_reports_write_nothing(tmp_path):
    write(tmp_path, [1, 2], active=False)
    assert not list(tmp_path.iterdir())
    log = MetricsLog(tmp_path, step=0, total=10, active=True)
    log.write(1, {})
    assert log.bar.n == 1
    log.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_parameters_of_the_shape():
    """The blocks of the FLOP count are those of the model: 7,241,732,096 parameters in all."""
    assert count_parameters(MISTRAL_7B) == 6_979_321_856 + 2 * 32_000 * 4096 + 65 * 4096
    assert count_parameters(replace(MISTRAL_7B, tie_word_embeddings=True)) == 7_110_660_096
