"""Exact means over pairs, what is agreed about a step, and speed."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_flops import MISTRAL_7B

from conftest import random_pairs
from notus.data.planning import Division
from notus.engine import flops
from notus.engine.flops import Speed, Work, forward_flops, model_flops
from notus.engine.metrics import (
    Totals,
    evaluate,
    judge_step,
    nonfinite_pairs,
    pair_metrics,
    summarize,
)
from notus.objective.loss import build_loss
from notus.objective.losses import PairLogProbs, Sums

INF, NAN = float("inf"), float("nan")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_process():
    """A process group of one."""
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


@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_metrics_of_named_sets(name):
    """Those of the set's pairs scored on their own; all pairs together are their weighted mean."""
    pairs, loss = random_pairs(9), build_loss({"name": name, "beta": 0.1})
    generator = torch.Generator().manual_seed(0)
    flats = [-torch.rand(int(pairs.response_starts[-1]), generator=generator) for _ in range(2)]
    sets = {"near": range(0, 3), "far": range(3, 9)}
    found = evaluate(*flats, pairs, loss, sets)
    for each, places in sets.items():
        cut = slice(pairs.response_starts[places.start], pairs.response_starts[places.stop])
        alone = evaluate(*(flat[cut] for flat in flats), pairs.select(places), loss)
        own = {k.replace(f"eval_{each}/", "eval_"): v for k, v in found.items() if each in k}
        assert own == alone and len(own) == 10
    for metric in ("loss", "rewards/accuracies", "logps/chosen"):
        parts = [found[f"eval_{each}/{metric}"] for each in sets]
        assert found[f"eval_{metric}"] == pytest.approx((3 * parts[0] + 6 * parts[1]) / 9)
    if name == "sigmoid":  # by hand
        losses = []
        for i in sets["far"]:
            start, (_, chosen, rejected) = pairs.response_starts[i], pairs.lengths[i]
            ratio = (flats[0] - flats[1]).double()[start : start + chosen + rejected]
            margin = 0.1 * (ratio[:chosen].sum() - ratio[chosen:].sum())
            losses.append(math.log1p(math.exp(-margin)))
        assert found["eval_far/loss"] == pytest.approx(sum(losses) / 6, rel=1e-6)


def test_metrics_of_supervised_fine_tuning():
    """Per token, not per response; nothing of the rejected response or the reference is read."""
    unread = [math.nan] * 2
    pairs = log_probs([-9.0, -8.0], unread, unread, unread, [(4, 0), (2, 0)])
    found = pair_metrics(torch.tensor([3.0, 2.7]), pairs, build_loss({"name": "sft"}))
    found = {name: [float(value) for value in pair] for name, pair in found.items()}
    assert found == {"loss": [17.0, 6.0], "logps/chosen": [-17.0, 2.0]}


@pytest.mark.parametrize(
    ("loss", "perplexity"), [(3.0, math.exp(3.0)), (800.0, math.inf), (math.inf, math.inf)]
)
def test_a_perplexity_that_no_float_holds_is_infinite(loss, perplexity):
    unread = [math.nan]
    pairs = log_probs([-4 * loss], unread, unread, unread, [(4, 0)])
    assert summarize(pairs, build_loss({"name": "sft"}))["perplexity"] == perplexity


def test_means_do_not_depend_on_the_division():
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

    def add(totals, *edges):
        """A step whose microbatches end at these pairs."""
        parts = [part(slice(*pair)) for pair in pairwise(edges)]
        stacked = [torch.stack([torch.stack(pair) for pair in each.values()]) for each in parts]
        one = torch.ones((), dtype=torch.float64)
        verdict, sums = judge_step(one, one, 1, False, False, sum(stacked))
        totals.add_step(dict(zip(parts[0], sums, strict=True)), verdict.finite)

    totals = Totals()
    for edges in ([0, 40], [0, 1, 17, 40]):
        add(totals, *edges)
        assert totals.means() == pytest.approx(expected | {"nonfinite": 0.0}, rel=1e-12)
    add(totals, 7, 30)
    # What a checkpoint between two reports carries over.
    resumed = Totals(json.loads(json.dumps(totals.snapshot())))
    for either in (totals, resumed):
        add(either, 30, 40)
    assert totals.means() == resumed.means()
    assert totals.snapshot() == {}
    add(totals, 7, 8)  # nothing is left of the reported sums
    assert totals.means()["loss"] == pytest.approx(losses[7])


def test_speed(monkeypatch):
    clock = iter([100.0, 102.0, 102.0, 106.0, 106.0])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(flops, "peak_flops", lambda device: 1e15)
    lengths = np.array([[10, 20, 30], [5, 5, 5]])
    speed = Speed(MISTRAL_7B, ranks=2, device=CPU, work=Work())
    division = Division(bins=[[[0], []], [[1], []]], slots=64)
    speed.count(lengths, 75, division)
    speed.count(lengths[:1], 60, Division(bins=[[[0], []]], slots=64))
    report = speed.report()
    # Unshared tokens, 2P + C + R: 70 and 20, then 70; slots: 2 x 64 x 2 ranks, then 64 x 2.
    assert report["perf/tokens_per_second"] == 160 / 2
    assert report["perf/pairs_per_second"] == 3 / 2
    assert report["perf/packing"] == 135 / 384
    needed = model_flops(MISTRAL_7B, lengths[[0, 1, 0]])
    assert report["perf/mfu"] == pytest.approx(needed / 2 / 2e15)
    # 384 slots for 60 + 15 + 60 tokens; the blocks' products run over all of them.
    products, attention, head = forward_flops(MISTRAL_7B, lengths[[0, 1, 0]])
    first, second = (forward_flops(MISTRAL_7B, part)[0] for part in (lengths, lengths[:1]))
    executed = 3 * (first * 256 / 75 + second * 128 / 60) + 3.5 * attention + 4 * head
    assert report["perf/hfu"] == pytest.approx(executed / 2 / 2e15)
    assert needed == pytest.approx(3 * (products + attention + head))
    assert report["perf/peak_memory_gib"] > 0.01
    speed.count(lengths[:1], 60, Division(bins=[[[0], []]], slots=64))
    assert speed.report()["perf/pairs_per_second"] == 1 / 4  # from zero again


def test_time_left_out(monkeypatch):
    clock = iter([0.0, 50.0, 51.0, 51.0])
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(clock))
    speed = Speed(MISTRAL_7B, ranks=1, device=CPU, work=Work())
    speed.restart()
    speed.count(np.array([[1, 1, 1]]), 3, Division(bins=[[[0]]], slots=128))
    report = speed.report()
    assert report["perf/pairs_per_second"] == 1
    assert "perf/mfu" not in report  # no peak is known of a CPU


@pytest.mark.parametrize("loss", [6.0, INF, NAN])
@pytest.mark.parametrize("norm", [0.5, INF, NAN])
def test_a_step_is_finite_when_loss_and_gradient_are(loss, norm):
    total = torch.tensor(loss, dtype=torch.float64)
    metrics = torch.tensor([[NAN, 3.0], [2.0, 4.0]], dtype=torch.float64)
    verdict, sums = judge_step(total, torch.tensor(norm), 3, False, True, metrics)
    assert math.isnan(sums[0][0]) and (sums[0][1], sums[1]) == (3.0, [2.0, 4.0])
    assert verdict.finite == (loss == 6.0 and norm == 0.5)
    assert (verdict.stop, verdict.save) == (False, True)
    if verdict.finite:
        assert (verdict.loss, verdict.grad_norm) == (2.0, 0.5)


def test_pairs_whose_loss_is_not_finite():
    seen = [
        (torch.tensor([9, 4]), torch.tensor([1.0, NAN])),
        (torch.tensor([], dtype=torch.int64), torch.tensor([])),
        (torch.tensor([3, 7]), torch.tensor([-INF, 2.0])),
    ]
    assert nonfinite_pairs(seen) == [3, 4]


def test_a_step_that_is_not_finite_counts_for_nothing_but_itself():
    totals = Totals()
    totals.add_step({"loss": (4.0, 4.0)}, True)
    totals.add_step({"loss": (NAN, 4.0)}, False)
    totals.add_step({"loss": (5.0, 2.0)}, True)
    resumed = Totals(json.loads(json.dumps(totals.snapshot())))
    expected = {"loss": (1.0 + 3.0 + 5.0) / 6, "nonfinite": 1 / 3}
    assert totals.means() == resumed.means() == expected
    totals.add_step({"loss": (NAN, 2.0)}, False)
    assert totals.means() == {"nonfinite": 1.0}


def test_sums_of_each_rank_in_an_earlier_checkpoint():
    totals = Totals({"loss": [[1.0, 2.0], [3.0, 2.0], [5.0, 4.0]]})
    assert totals.means() == {"loss": 9.0 / 8.0}
