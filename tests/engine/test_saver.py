"""Saves of a small model in one process: contents, retention, memory, failures."""

import gc
import json
import weakref
from concurrent.futures import Future

import pytest
import torch
from saving import one_process, saver, updated  # noqa: F401

from notus.engine import saver as saver_module
from notus.engine.checkpoint import Progress, checkpoints, load_checkpoint, load_trained
from notus.engine.saver import superseded
from notus.errors import UserError
from notus.model.mistral import MistralForCausalLM


@pytest.mark.parametrize(
    "settings",
    [{}, {"state_dtype": torch.bfloat16}, {"name": "rmsprop"}],
    ids=["adamw", "bfloat16 moments", "rmsprop"],
)
def test_what_is_loaded_is_what_was_saved(tiny_folder, tiny_model, tmp_path, settings):
    optimizer = updated(tiny_model, 3, **settings)
    progress = Progress(5, {"loss": [[0.1, 3.0]]}, 2)
    with saver(tmp_path, tiny_folder) as saving:
        saving.save(tiny_model, optimizer, None, progress)
        assert saving.wait() is None
    state = json.loads((tmp_path / "step-00000005/state.json").read_text())
    assert state["updates"] == 3  # of five steps two were skipped
    fresh = MistralForCausalLM(tiny_model.shape)
    other = updated(fresh, 0, **settings)
    assert load_checkpoint(tmp_path / "step-00000005", fresh, other, None) == progress
    for mine, yours in zip(tiny_model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, yours)
        expected, found = optimizer.state[mine], other.state[yours]
        assert expected.keys() == found.keys() and len(found) >= 2
        for key, value in expected.items():
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


def test_only_what_is_trained_is_stored(tiny_folder, tiny_model, tmp_path):
    """And so that nothing takes it for a model: transformers would make up the rest."""
    tiny_model.requires_grad_(False)
    tiny_model.model.norm.weight.requires_grad_(True)
    optimizer = updated(tiny_model)
    with saver(tmp_path, tiny_folder) as saving:
        saving.save(tiny_model, optimizer, None, Progress(1, {}, 0))
    folder = tmp_path / "step-00000001"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter-00001-of-00001.safetensors",
        "adapter.safetensors.index.json",
        "manifest.json",
        "optimizer-00001-of-00001.safetensors",
        "optimizer.safetensors.index.json",
        "state.json",
    ]
    index = json.loads((folder / "adapter.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == ["model.norm.weight"]
    trained = tiny_model.model.norm.weight.detach().clone()
    for load in (
        lambda: load_checkpoint(folder, tiny_model, updated(tiny_model, 0), None),
        lambda: load_trained(folder, tiny_model),
    ):
        with torch.no_grad():
            tiny_model.model.norm.weight.zero_()
        load()
        assert torch.equal(tiny_model.model.norm.weight, trained)
    tiny_model.requires_grad_(True)
    with pytest.raises(UserError, match="tensor lm_head.weight: found none, expected "):
        load_trained(folder, tiny_model)


def test_a_run_whose_every_step_was_skipped_can_be_saved(tiny_folder, tiny_model, tmp_path):
    with saver(tmp_path, tiny_folder) as saving:
        saving.save(tiny_model, updated(tiny_model, 0), None, Progress(2, {}, 2))
    optimizer = updated(tiny_model, 0)
    progress = load_checkpoint(tmp_path / "step-00000002", tiny_model, optimizer, None)
    assert progress.skipped == 2 and not optimizer.state


def test_a_save_holds_what_the_weights_were(tiny_folder, tiny_model, tmp_path, monkeypatch):
    """Training continues while the thread has not written a byte."""
    optimizer = updated(tiny_model)
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    steps_go_on = []
    write = saver_module.save_tensors
    monkeypatch.setattr(
        saver_module, "save_tensors", lambda *a: (steps_go_on.pop().result(20), write(*a))
    )
    done = Future()
    steps_go_on += [done, done]
    with saver(tmp_path, tiny_folder) as saving:
        saving.save(tiny_model, optimizer, None, Progress(1, {}, 0))
        with torch.no_grad():
            for parameter in tiny_model.parameters():
                parameter.fill_(7.0)
        done.set_result(None)
    load_checkpoint(tmp_path / "step-00000001", tiny_model, updated(tiny_model, 0), None)
    assert all(torch.equal(a, b) for a, b in zip(tiny_model.parameters(), before, strict=True))


def test_copies_on_the_host_stay_within_their_bound(tiny_folder, tiny_model, tmp_path, monkeypatch):
    """With no room to spare, never more than the largest file and what `gather_own` rounds up."""
    optimizer = updated(tiny_model)
    held, peaks, files = [0], [], []
    gather = saver_module.gather_own

    def counted(tensors, prefix):
        index, file, own = gather(tensors, prefix)
        for tensor in own.values():
            size = tensor.numel() * tensor.element_size()
            held[0] += size
            weakref.finalize(tensor, lambda size=size: held.__setitem__(0, held[0] - size))
        files.append(sum(t.numel() * t.element_size() for t in own.values()))
        peaks.append(held[0])
        return index, file, own

    monkeypatch.setattr(saver_module, "gather_own", counted)
    for host_bytes in (0, 10**9):
        peaks.clear()
        with saver(tmp_path, tiny_folder, host_bytes=host_bytes) as saving:
            saving.save(tiny_model, optimizer, tiny_model, Progress(1, {}, 0))
        gc.collect()
        assert held[0] == 0
        if host_bytes == 0:
            assert max(peaks) <= max(files)
    assert files[1] == 2 * files[0]  # two moments


def test_retention_keeps_the_newest_and_drops_what_was_passed_over(tmp_path):
    """A run that went on from step 2, past a damaged 3 and 5, has saved step 4."""
    for step in (1, 2, 3, 4, 5):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "step-00000002-copy").mkdir()  # the user's own
    newest = tmp_path / "step-00000004"
    old = superseded(tmp_path, newest, previous=2, keep=2)
    assert sorted(path.name[-1] for path in old) == ["1", "3", "5"]
    old = superseded(tmp_path, newest, previous=4, keep=1)
    assert sorted(path.name[-1] for path in old) == ["1", "2", "3", "5"]


def test_what_a_kill_left_too_many_is_removed_at_the_next_start(tiny_folder, tmp_path):
    """Only older ones than the one that the run resumes from: no save has replaced the others."""
    for step in (1, 2, 3, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
    with saver(tmp_path, tiny_folder, keep=2, previous=3):
        assert [path.name[-1] for path in checkpoints(tmp_path)] == ["2", "3", "4"]
    with saver(tmp_path, tiny_folder, keep=1):  # a new run
        assert len(checkpoints(tmp_path)) == 3


def test_a_save_that_fails_is_said_once_and_the_next_one_counts(
    tiny_folder, tiny_model, tmp_path, capfd
):
    optimizer = updated(tiny_model)
    root = tmp_path / "checkpoints"
    with saver(root, tiny_folder) as saving:
        saving.save(tiny_model, optimizer, None, Progress(1, {}, 0))
        assert saving.wait() is None
        root.rename(tmp_path / "aside")
        root.write_text("no folder")
        saving.save(tiny_model, optimizer, None, Progress(2, {}, 0))
        problem = saving.wait()
        assert "Not a directory" in problem
        (warning,) = capfd.readouterr().err.strip().splitlines()
        assert warning == (
            f"warning: {root / 'step-00000002'} was not saved: {problem}; there is no older one, "
            "and training continues"
        )
        root.unlink()
        (tmp_path / "aside").rename(root)
        saving.save(tiny_model, optimizer, None, Progress(3, {}, 0))
        assert saving.wait() is None
    assert [path.name for path in checkpoints(root)] == ["step-00000001", "step-00000003"]
