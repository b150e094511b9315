"""Reading and writing Hugging Face folders."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from towers import YARN, write_tower

from notus.errors import UserError
from notus.model.hf_config import decoder_config, has_vision, read_shape
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import (
    check_weights,
    gather_own,
    hash_weights,
    load_weights,
    open_model,
    save_tensors,
    stored_tensors,
)

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def write_model(folder, **options):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, **options)
    model = transformers.MistralForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="20KB")
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_loading_several_files_gives_the_stored_values(tied, tmp_path):
    theirs = write_model(tmp_path, tie_word_embeddings=tied)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ours = MistralForCausalLM(read_shape(tmp_path))
    load_weights(ours, tmp_path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_bfloat16_files_load_into_float32_without_loss(tmp_path):
    theirs = write_model(tmp_path / "float32").bfloat16()
    theirs.save_pretrained(tmp_path)
    ours = MistralForCausalLM(read_shape(tmp_path))
    load_weights(ours, tmp_path)
    for name, value in ours.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, theirs.state_dict()[name].float()), name


DECODERS = {"mistral": transformers.MistralConfig, "ministral3": transformers.Ministral3Config}


@pytest.mark.parametrize("names", ["saved", "modules'"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", DECODERS)
def test_the_decoder_of_a_vision_model(kind, tied, names, tmp_path):
    """Loaded by its prefix, tied if no head is stored, whatever the two entries say."""
    rope = {"rope_parameters": YARN} if kind == "ministral3" else {"sliding_window": None}
    decoder = DECODERS[kind](**SIZES, head_dim=8, **rope)
    theirs = write_tower(tmp_path, decoder, tie_word_embeddings=tied)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert sum(name.startswith("vision_tower.") for name in index) > 5
    if names == "modules'":  # one file, named as the modules are
        for file in tmp_path.glob("model*"):
            file.unlink()
        tensors = theirs.state_dict()
        if tied:
            del tensors["lm_head.weight"]
        else:  # a config.json that its weights contradict
            config = json.loads((tmp_path / "config.json").read_text())
            config["tie_word_embeddings"] = True
            (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "model.safetensors")
    folder, shape = open_model(str(tmp_path))
    assert shape.tie_word_embeddings == tied and (shape.yarn is not None) == (kind == "ministral3")
    ours = MistralForCausalLM(shape)
    load_weights(ours, folder)
    expected = {name: theirs.lm_head.weight for name in ["lm_head.weight"]}
    expected |= {f"model.{n}": p for n, p in theirs.model.language_model.named_parameters()}
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(ours.state_dict()[name], expected[name]) for name in expected)

    config = decoder_config(folder)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path / "text") == shape and not has_vision(tmp_path / "text")
    save_file(
        ours.state_dict() if not tied else dict(ours.named_parameters()),
        tmp_path / "text/model.safetensors",
        metadata={"format": "pt"},
    )
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert type(alone).__name__ == config["architectures"][0]
    tokens = torch.randint(0, 61, (1, 100))
    torch.testing.assert_close(alone(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_the_dtype_of_fp8_weights_is_refused(tmp_path):
    write_tower(tmp_path, transformers.MistralConfig(**SIZES, head_dim=8))
    file = max(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, file)
    with pytest.raises(UserError, match=f"tensor {name}: found F8_E4M3, expected one of F64, F32"):
        open_model(str(tmp_path))


def test_old_rotary_buffers_and_a_redundant_tied_head_are_passed_over(tmp_path):
    write_model(tmp_path, tie_word_embeddings=True)
    shape = read_shape(tmp_path)
    expected = {n: p.shape for n, p in MistralForCausalLM(shape).named_parameters()}
    tensors = {name: torch.zeros(size) for name, size in expected.items()}
    tensors["lm_head.weight"] = torch.zeros(61, 32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    for file in tmp_path.glob("model*"):
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    assert check_weights(tmp_path, expected, tied=True).keys() == tensors.keys()
    with pytest.raises(UserError, match=r"lm_head.weight: found \(61, 32\), expected none"):
        check_weights(tmp_path, expected, tied=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"norm.weight: found none, expected \(32,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"model.norm.weight: found \(7,\), expected \(32,\)",
        ),
        (
            lambda t: t.update({"model.extra": torch.zeros(1)}),
            r"extra: found \(1,\), expected none",
        ),
    ],
)
def test_wrong_tensors_are_named(damage, message, tmp_path):
    write_model(tmp_path)
    expected = {n: p.shape for n, p in MistralForCausalLM(read_shape(tmp_path)).named_parameters()}
    tensors = {name: torch.zeros(size) for name, size in expected.items()}
    damage(tensors)
    for file in tmp_path.glob("model*"):
        file.unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        check_weights(tmp_path, expected, tied=False)


def test_a_truncated_file_is_named(tmp_path):
    write_model(tmp_path)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{file.name}: found no complete safetensors file"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floats_are_refused_by_name(dtype, tmp_path):
    save_file({"a": torch.zeros(2), "b": torch.ones(2).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors: tensor b: found \w+, expected one of"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("name", ["../other/a.safetensors", "sub/a.safetensors", "{}", "a\0b"])
def test_an_index_that_leads_out_of_the_folder_is_refused(name, tmp_path):
    name = name.format(tmp_path / "other/a.safetensors")
    for folder in ("other", "model/sub"):
        (tmp_path / folder).mkdir(parents=True)
        save_file({"a": torch.zeros(2)}, tmp_path / folder / "a.safetensors")
    index = tmp_path / "model/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"index.json: found '.*', expected a file of this folder"):
        stored_tensors(tmp_path / "model")


def test_unreadable_weights_are_named(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    file.chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # the folders above are closed to other users
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(UserError, match=rf"{file.name}: cannot be read \(Permission denied\)"):
            stored_tensors(Path())
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_written_weights_have_the_permissions_of_any_new_file(umask, tmp_path):
    before = os.umask(umask)
    try:
        save_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_identity_follows_the_contents_and_not_the_name(tmp_path):
    for name in ("one", "two", "three"):
        write_model(tmp_path / name)
    weights = tmp_path / "three" / "model-00001-of-00005.safetensors"
    file = weights if weights.exists() else sorted((tmp_path / "three").glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    one, two, three = (
        hash_weights(name, tmp_path / name)["sha256"] for name in ("one", "two", "three")
    )
    assert one == two != three
    digests = [
        hashlib.sha256(path.read_bytes()).digest()
        for path in sorted((tmp_path / "one").glob("*.safetensors"))
    ]
    assert one == hashlib.sha256(b"".join(digests)).hexdigest()


def test_what_is_gathered_and_written_is_every_tensor(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(5), "c": torch.tensor(2.0)}
    index, file, own = gather_own(tensors.items(), "model")
    save_tensors(tmp_path / file, own)
    assert index == {
        "metadata": {"total_size": 4 * (6 + 5 + 1)},
        "weight_map": dict.fromkeys("abc", "model-00001-of-00001.safetensors"),
    }
    saved = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert all(torch.equal(saved[name], tensors[name]) for name in tensors)
