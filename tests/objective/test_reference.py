"""The reference's cache, its audit, and the check of a run's start."""

import errno
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conftest import random_pairs
from notus.data.packing import pack
from notus.errors import UserError
from notus.objective import reference
from notus.objective.logprobs import pair_log_probs, scorer, token_log_probs
from notus.objective.losses import build_loss
from notus.objective.reference import (
    audit_sample,
    cache_identity,
    cached_log_probs,
    cached_reference,
    check_start,
    follow,
    no_reference,
    online_reference,
)

CPU = torch.device("cpu")
REFERENCE = {"path": "somewhere", "sha256": "0" * 64}


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture
def setting(group, tiny_model, tmp_path):
    """(folder, pairs, identity, a scorer that counts its calls)."""
    pairs = random_pairs(30)
    score_pairs = scorer(tiny_model, pairs, budget=200, prefix_sharing=True, device=CPU)
    calls = []

    def counted(indices):
        calls.append(list(indices))
        return score_pairs(indices)

    return (
        tmp_path,
        pairs,
        cache_identity(pairs, REFERENCE, tiny_model.shape, torch.float32),
        counted,
        calls,
    )


def test_one_pass_then_only_a_sample(setting):
    folder, pairs, identity, score_pairs, calls = setting
    first = cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    second = cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    assert calls == [list(range(30)), audit_sample(30).tolist()]
    assert len(calls[1]) == 1
    assert torch.equal(first, second) and (first < 0).all()


def test_another_reference_token_or_dtype_is_another_cache(setting, tiny_model):
    folder, pairs, identity, score_pairs, calls = setting
    cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    changed = random_pairs(30)
    changed.tokens[5] += 1
    shape = tiny_model.shape
    for other in (
        cache_identity(pairs, {"sha256": "1" * 64}, shape, torch.float32),
        cache_identity(changed, REFERENCE, shape, torch.float32),
        cache_identity(pairs, REFERENCE, shape, torch.bfloat16),
        cache_identity(pairs, REFERENCE, replace(shape, rope_theta=5e5), torch.float32),
    ):
        calls.clear()
        cached_log_probs(folder, pairs, other, score_pairs, CPU)
        assert calls == [list(range(30))]


def test_a_cache_that_does_not_match_the_model_is_refused(setting):
    folder, pairs, identity, score_pairs, _ = setting
    cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    tensors["log_probs"] -= 0.01
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"{file.name}.*differ.*0.01 nats per token"):
        cached_log_probs(folder, pairs, identity, score_pairs, CPU)


def test_a_half_written_cache_is_computed_again(setting):
    folder, pairs, identity, score_pairs, calls = setting
    first = cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    assert calls == [list(range(30))] * 2 and torch.equal(first, again)
    about = json.loads(file.with_suffix(".json").read_text())
    assert about["identity"] == identity and about["pairs"] == 30


@pytest.mark.parametrize("broken_off", [0, 2, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_a_pass_goes_on_where_it_was_broken_off(setting, monkeypatch, broken_off, torn):
    """Parts of 8 of 30 pairs; killed during the third, or while its end was being written."""
    folder, pairs, identity, score_pairs, calls = setting
    monkeypatch.setattr(reference, "PART", 8)
    whole = cached_log_probs(folder / "whole", pairs, identity, score_pairs, CPU)
    parts = [[*range(0, 8)], [*range(8, 16)], [*range(16, 24)], [*range(24, 30)]]
    assert calls == parts
    shown = []

    def show(total, done):
        shown.append((total, done))
        return SimpleNamespace(update=shown.append, close=lambda: shown.append("closed"))

    def killed(indices):
        if len(calls) == broken_off:
            raise KeyboardInterrupt
        return score_pairs(indices)

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        cached_log_probs(folder, pairs, identity, killed, CPU)
    (file,) = folder.glob("*.parts")
    if torn and broken_off:
        with open(file, "r+b") as handle:
            handle.truncate(file.stat().st_size - 3)
    calls.clear()
    again = cached_log_probs(folder, pairs, identity, score_pairs, CPU, show)
    kept = broken_off - (torn and broken_off > 0)
    audited = [audit_sample(8 * kept).tolist()] if kept else []
    assert calls == audited + parts[kept:] and torch.equal(again, whole)
    assert shown == [(30, 8 * kept), *map(len, parts[kept:]), "closed"]
    assert not [*folder.glob("*.parts")]


@pytest.mark.parametrize("damage", [4.0, 1.0 / 4.0, float("nan")])
def test_parts_that_do_not_match_the_model_are_refused(setting, monkeypatch, damage):
    """As when the code of the model was changed since, or a disk lost what was written."""
    folder, pairs, identity, score_pairs, calls = setting
    monkeypatch.setattr(reference, "PART", 8)
    with monkeypatch.context() as refused:
        refused.setattr(reference, "_write", lambda *arguments: (_ for _ in ()).throw(OSError()))
        with pytest.raises(UserError):
            cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    (file,) = folder.glob("*.parts")
    (np.fromfile(file, np.float32) * np.float32(damage)).tofile(file)
    calls.clear()
    with pytest.raises(UserError, match=f"{file.name}: the cached.*differ"):
        cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    assert calls == [audit_sample(24).tolist()]


@pytest.mark.parametrize("refused", ["_read", "_read_parts", "_append", "_write"])
def test_a_file_system_that_refuses_is_named(setting, monkeypatch, refused):
    folder, pairs, identity, score_pairs, _ = setting

    def no_space(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(reference, refused, no_space)
    with pytest.raises(UserError, match=r"\.(parts|safetensors): cannot.*No space left on device"):
        cached_log_probs(folder, pairs, identity, score_pairs, CPU)


def test_the_library_that_writes_the_cache_is_refused_too(setting, monkeypatch):
    folder, pairs, identity, score_pairs, _ = setting

    def no_space(*arguments):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(reference, "save_file", no_space)
    with pytest.raises(UserError, match=r"\.safetensors: cannot.*No space left on device"):
        cached_log_probs(folder, pairs, identity, score_pairs, CPU)


@pytest.mark.parametrize("about", [b"\xff\xfe", b"[]", b"{", b"null"])
def test_a_damaged_description_is_computed_again(setting, about):
    folder, pairs, identity, score_pairs, calls = setting
    first = cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    (file,) = folder.glob("*.json")
    file.write_bytes(about)
    assert torch.equal(cached_log_probs(folder, pairs, identity, score_pairs, CPU), first)
    assert calls == [list(range(30))] * 2


def test_cached_and_online_agree_and_none_is_zero(setting, tiny_model):
    folder, pairs, identity, score_pairs, _ = setting
    flat = cached_log_probs(folder, pairs, identity, score_pairs, CPU)
    batch = pack(pairs, [7, 2, 19], 200, True)
    cached = cached_reference(flat, pairs)
    online = online_reference(tiny_model, score_pairs)
    torch.testing.assert_close(cached.of_batch(batch), online.of_batch(batch), rtol=1e-5, atol=1e-5)
    assert not online.of_batch(batch).requires_grad
    torch.testing.assert_close(cached.of_pairs(range(30)), online.of_pairs(range(30)))
    assert no_reference(pairs, CPU).of_batch(batch).eq(0).all()


def start(tiny_model, shift):
    pairs = random_pairs(4)
    batch = pack(pairs, range(4), 200, True)
    with torch.no_grad():
        log_probs = token_log_probs(tiny_model, batch)
    return pair_log_probs(log_probs, log_probs + shift, batch.lengths, 1.0)


def test_the_start_is_accepted_when_policy_and_reference_agree(tiny_model):
    check_start(build_loss({"name": "sigmoid"}), start(tiny_model, 1e-6), torch.float32)


@pytest.mark.parametrize("shift", [1e-3, -1e-3, float("nan")])
def test_the_start_is_refused_when_they_do_not(shift, tiny_model):
    with pytest.raises(UserError, match="before the first step.*nats per token"):
        check_start(build_loss({"name": "sigmoid"}), start(tiny_model, shift), torch.float32)


def test_follow_moves_the_reference_by_the_share(tiny_model):
    policy, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    expected = 0.6 * policy.weight + 0.4 * reference.weight
    follow(reference, policy, 0.6)
    torch.testing.assert_close(reference.weight, expected)
