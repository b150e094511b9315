"""Checkpoints of a small model in one process: damage is found, and the weights are loaded."""

import errno
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from saving import one_process, saver, updated  # noqa: F401

from notus.engine import checkpoint
from notus.engine.checkpoint import Progress, checkpoints, find_checkpoint, load_trained
from notus.errors import UserError
from notus.model.hf_config import read_shape
from notus.model.mistral import MistralForCausalLM


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


def test_the_identity_covers_only_the_weights(two, tiny_folder, tiny_model, tmp_path):
    one, other = checkpoints(two)
    identity = checkpoint.checkpoint_identity(one)
    assert identity["path"] == str(one) and len(identity["sha256"]) == 64
    assert checkpoint.checkpoint_identity(other)["sha256"] != identity["sha256"]
    load_trained(one, tiny_model)
    with saver(tmp_path, tiny_folder) as saving:  # the same weights at another step
        saving.save(tiny_model, updated(tiny_model, 0), None, Progress(7, {}, 0))
    assert (
        checkpoint.checkpoint_identity(tmp_path / "step-00000007")["sha256"] == identity["sha256"]
    )


def test_a_file_that_cannot_be_read_is_damage(two, monkeypatch):
    digest = checkpoint.sha256

    def refuse(path):
        if path.parent.name == "step-00000002" and path.name.startswith("optimizer-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return digest(path)

    monkeypatch.setattr(checkpoint, "sha256", refuse)
    said = []
    assert find_checkpoint(two, "auto", said.append) == checkpoints(two)[0]
    assert said[0].endswith("optimizer-00001-of-00001.safetensors: Input/output error")


def test_a_new_run_takes_only_the_weights(tiny_folder, tiny_model, two, tmp_path):
    fresh = MistralForCausalLM(tiny_model.shape)
    folder = checkpoints(two)[0]
    load_trained(folder, fresh)
    stored = load_file(folder / "model-00001-of-00001.safetensors")
    assert all(torch.equal(p, stored[name]) for name, p in fresh.named_parameters())
    fresh.lm_head.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(UserError, match=r"lm_head.weight: found \(61, 32\), expected \(3, 3\)"):
        load_trained(folder, fresh)
    fresh.lm_head.requires_grad_(False)
    with pytest.raises(UserError, match=r"lm_head.weight: found \(61, 32\), expected none"):
        load_trained(folder, fresh)
    with pytest.raises(UserError, match="no longer there"):
        load_trained(tmp_path, fresh)
