"""Checkpoints of a small model in one process: damage, retention, memory, failures."""

import errno
import gc
import json
import os
import shutil
import weakref
from concurrent.futures import Future

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from notus.engine import checkpoint, host_memory
from notus.engine.checkpoint import (
    Progress,
    Saver,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    load_trained,
)
from notus.engine.optim import make_optimizer
from notus.errors import UserError
from notus.model.hf_config import read_shape
from notus.model.mistral import MistralForCausalLM

COMMON = {"common": {"steps": 9}}


@pytest.fixture(autouse=True, scope="module")
def group():
    """A process group of one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def updated(model: MistralForCausalLM, steps: int = 1, **settings) -> torch.optim.Optimizer:
    """An optimiser that has applied so many random gradients to the model."""
    settings = {"name": "adamw", "learning_rate": 0.1, "weight_decay": 0.1} | settings
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, betas=(0.9, 0.99), alpha=0.9, eps=1e-8, **settings)
    torch.manual_seed(steps)
    for _ in range(steps):
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def saver(root, source, keep=2, **options) -> Saver:
    return Saver(root, keep=keep, source=source, facts=COMMON, **options)


@pytest.fixture(scope="module")
def two(tiny_folder, tmp_path_factory):
    """Checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("two")
    model = MistralForCausalLM(read_shape(tiny_folder))
    torch.nn.init.normal_(model.lm_head.weight)  # memory as it was found may hold NaN
    with saver(root, tiny_folder) as saving:
        for step in (1, 2):
            optimizer = updated(model, step)
            saving.save(model, optimizer, None, Progress(step, {"loss": [[0.5, 2.0]]}, step - 1))
    return root


FILES = (
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "optimizer-00001-of-00001.safetensors",
    "optimizer.safetensors.index.json",
    "state.json",
)


def flip(file, other, place):
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 4
    file.write_bytes(content)


DAMAGES = {
    "first byte": lambda file, other: flip(file, other, 0),
    "middle byte": lambda file, other: flip(file, other, file.stat().st_size // 2),
    "last byte": lambda file, other: flip(file, other, -1),
    "truncated": lambda file, other: file.write_bytes(file.read_bytes()[:-9]),
    "longer": lambda file, other: file.write_bytes(file.read_bytes() + b"\n"),
    "empty": lambda file, other: file.write_bytes(b""),
    "deleted": lambda file, other: file.unlink(),
    "a folder": lambda file, other: (file.unlink(), file.mkdir()),
    "swapped with the older one's": lambda file, other: shutil.copyfile(other, file),
}


def test_every_file_is_tried(two):
    assert [path.name for path in checkpoints(two)] == ["step-00000001", "step-00000002"]
    for folder in checkpoints(two):
        assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_and_the_one_before_is_used(two, name, damage, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(two, root)
    one, newest = checkpoints(root)
    if (newest / name).read_bytes() == (one / name).read_bytes() and "swapped" in damage:
        return  # the same in both: nothing is damaged
    DAMAGES[damage](newest / name, one / name)
    said = []
    assert find_checkpoint(root, "auto", said.append) == one
    (line,) = said
    blamed = {name}
    if damage == "swapped with the older one's" and name == "manifest.json":
        blamed = set(FILES)  # one cannot know which is wrong, the manifest or all the others
    assert line.startswith("passed over the damaged checkpoint step-00000002: ")
    assert any(f"{newest / found}:" in line for found in blamed), line
    with pytest.raises(UserError, match="--resume .*: the checkpoint is damaged: "):
        find_checkpoint(root, str(newest), said.append)
    (one / "state.json").unlink()
    with pytest.raises(UserError, match="no sound checkpoint is left"):
        find_checkpoint(root, "auto", said.append)


def test_nothing_to_resume_from(two, tmp_path):
    assert find_checkpoint(tmp_path, "auto", print) is None
    assert find_checkpoint(two, "never", print) is None
    with pytest.raises(UserError, match=f"--resume {tmp_path}: no manifest.json there"):
        find_checkpoint(tmp_path, str(tmp_path), print)


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
    with pytest.raises(UserError, match="lacks lm_head.weight; expected the tensors"):
        load_trained(folder, tiny_model)


def test_identity_of_the_weights_alone(two, tiny_folder, tiny_model, tmp_path):
    one, other = checkpoints(two)
    identity = checkpoint.weights_identity(one)
    assert identity["path"] == str(one) and len(identity["sha256"]) == 64
    assert checkpoint.weights_identity(other)["sha256"] != identity["sha256"]
    load_trained(one, tiny_model)
    with saver(tmp_path, tiny_folder) as saving:  # the same weights at another step
        saving.save(tiny_model, updated(tiny_model, 0), None, Progress(7, {}, 0))
    assert checkpoint.weights_identity(tmp_path / "step-00000007")["sha256"] == identity["sha256"]


def test_a_file_that_cannot_be_read_is_damage(two, monkeypatch):
    digest = checkpoint._sha256

    def refuse(path):
        if path.parent.name == "step-00000002" and path.name.startswith("optimizer-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return digest(path)

    monkeypatch.setattr(checkpoint, "_sha256", refuse)
    said = []
    assert find_checkpoint(two, "auto", said.append) == checkpoints(two)[0]
    assert said[0].endswith("optimizer-00001-of-00001.safetensors: Input/output error")


def test_weights_alone_for_a_new_run(tiny_folder, tiny_model, two, tmp_path):
    fresh = MistralForCausalLM(tiny_model.shape)
    folder = checkpoints(two)[0]
    load_trained(folder, fresh)
    stored = load_file(folder / "model-00001-of-00001.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in fresh.named_parameters())
    fresh.lm_head.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(UserError, match=r"lm_head.weight has shape \(61, 32\), expected \(3, 3\)"):
        load_trained(folder, fresh)
    fresh.lm_head.requires_grad_(False)
    with pytest.raises(UserError, match="holds lm_head.weight; expected the tensors"):
        load_trained(folder, fresh)
    with pytest.raises(UserError, match="no longer there"):
        load_trained(tmp_path, fresh)


def test_a_run_whose_every_step_was_skipped_can_be_saved(tiny_folder, tiny_model, tmp_path):
    with saver(tmp_path, tiny_folder) as saving:
        saving.save(tiny_model, updated(tiny_model, 0), None, Progress(2, {}, 2))
    optimizer = updated(tiny_model, 0)
    progress = load_checkpoint(tmp_path / "step-00000002", tiny_model, optimizer, None)
    assert progress.skipped == 2 and not optimizer.state


def test_a_save_holds_what_the_weights_were(tiny_folder, tiny_model, tmp_path, monkeypatch):
    """Training goes on while the thread has not written a byte."""
    optimizer = updated(tiny_model)
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    steps_go_on = []
    write = checkpoint._save_file
    monkeypatch.setattr(
        checkpoint, "_save_file", lambda *a: (steps_go_on.pop().result(20), write(*a))
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
    gather = checkpoint.gather_own

    def counted(tensors, prefix):
        index, file, own = gather(tensors, prefix)
        for tensor in own.values():
            size = tensor.numel() * tensor.element_size()
            held[0] += size
            weakref.finalize(tensor, lambda size=size: held.__setitem__(0, held[0] - size))
        files.append(sum(t.numel() * t.element_size() for t in own.values()))
        peaks.append(held[0])
        return index, file, own

    monkeypatch.setattr(checkpoint, "gather_own", counted)
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
    checkpoint.retain(tmp_path, tmp_path / "step-00000004", previous=2, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    checkpoint.retain(tmp_path, tmp_path / "step-00000004", previous=4, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000004"]
    assert (tmp_path / "step-00000002-copy").exists()


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
            "and training goes on"
        )
        root.unlink()
        (tmp_path / "aside").rename(root)
        saving.save(tiny_model, optimizer, None, Progress(3, {}, 0))
        assert saving.wait() is None
    assert [path.name for path in checkpoints(root)] == ["step-00000001", "step-00000003"]


def test_memory_within_a_control_group(tmp_path, monkeypatch):
    free = host_memory.free_host_bytes()
    assert 2**20 < free < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory._left_in_group(tmp_path, free) == free
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\n")
    assert host_memory._left_in_group(tmp_path, free) == 1000 - 900 + 600
