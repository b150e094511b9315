"""PEFT's files: read and written, against PEFT where it is installed, and merged into a base."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from lora_models import (
    SETTINGS,
    adapted_model,
    base_model,
    logits,
    products,
    relative_error,
    their_logits,
)
from safetensors.torch import load_file, save_file
from torch import nn
from towers import write_tower

from conftest import TINY
from notus.errors import UserError
from notus.model.hf_config import read_shape
from notus.model.lora import LoraSettings, adapter_parameters
from notus.model.peft import (
    adapter_tensors,
    check_fits,
    is_adapter,
    main,
    merge,
    read_adapter,
    save_adapter,
)

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("name", SETTINGS)
def test_peft_and_this_read_each_other_s_files(name, tiny_folder, tmp_path):
    peft = pytest.importorskip("peft")
    settings = SETTINGS[name]
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules="all-linear"
        if settings.target_modules == "all-linear"
        else list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    base = transformers.MistralForCausalLM.from_pretrained(tiny_folder)
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(2)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs.eval())

    assert read_adapter(tmp_path / "theirs").base_name == str(tiny_folder)
    merge(tiny_folder, tmp_path / "theirs", tmp_path / "merged")
    assert relative_error(logits(base_model(tmp_path / "merged")), expected) < 1e-5

    ours = adapted_model(tiny_folder, settings)
    save_adapter(tmp_path / "ours", adapter_tensors(ours), settings, str(tiny_folder))
    base = transformers.MistralForCausalLM.from_pretrained(tiny_folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert relative_error(their_logits(again), logits(ours)) < 1e-5


def test_an_adapter_names_its_base_without_the_path_to_it(tiny_folder, tmp_path, monkeypatch):
    """PEFT finds the base from the working directory; the file tells nothing of this machine."""
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    ours = adapted_model(tiny_folder, SETTINGS["rslora"])
    save_adapter(tmp_path / "ours", adapter_tensors(ours), SETTINGS["rslora"], str(tiny_folder))
    assert str(tmp_path) not in (tmp_path / "ours/adapter_config.json").read_text()
    base = read_adapter(tmp_path / "ours").base_name
    assert not Path(base).is_absolute() and Path(base).resolve() == tiny_folder.resolve()
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained("ours", dtype=torch.float32).eval()
    assert relative_error(their_logits(theirs), logits(ours)) < 1e-5


@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_adapter_is_read_back(name, tiny_folder, tmp_path):
    model = adapted_model(tiny_folder, SETTINGS[name])
    save_adapter(tmp_path / "adapter", adapter_tensors(model), SETTINGS[name], "a base")
    assert is_adapter(tmp_path / "adapter") and not is_adapter(tiny_folder)
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for key, value in adapter_parameters(model).items():
        assert torch.equal(stored.pop(f"base_model.model.{key}.weight"), value)
    assert not stored
    adapter = read_adapter(tmp_path / "adapter")
    assert (adapter.rank, adapter.base_name) == (SETTINGS[name].rank, "a base")
    assert adapter.scaling == SETTINGS[name].scaling


@pytest.mark.parametrize(
    ("narrowing", "kept"),
    [
        ({"target_modules": r".*layers\.1\..*q_proj"}, 1),
        ({"layers_to_transform": [0]}, 0),
        ({"layers_to_transform": 0}, 0),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, 0),
    ],
)
def test_layers_chosen_in_other_ways_are_those_of_the_file(narrowing, kept, tiny_folder, tmp_path):
    write_adapter(tmp_path, tiny_folder, narrowing, keep=lambda key: f"layers.{kept}." in key)
    assert check_fits(read_adapter(tmp_path), read_shape(tiny_folder)) == {
        f"model.layers.{kept}.self_attn.q_proj"
    }


def write_adapter(folder, base, changes=None, keep=lambda key: True, **tensors):
    """A PEFT folder of rank 4 for q_proj, with changed entries and tensors (None removes one)."""
    model = adapted_model(base, LoraSettings(4, 8, target_modules=("q_proj",)))
    stored = {
        f"base_model.model.{n}.weight": p.detach() for n, p in adapter_parameters(model).items()
    }
    stored = {key: value for key, value in stored.items() if keep(key)} | tensors
    stored = {key: value for key, value in stored.items() if value is not None}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": None,
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "rank_pattern": {},
        "modules_to_save": None,
    }
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | (changes or {})))
    save_file(stored, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, 'peft_type is "IA3", expected "LORA"'),
        ({"use_dora": True}, "use_dora is true, which is not supported"),
        ({"bias": "all"}, 'bias is "all", which is not supported'),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save is \["lm_head"\]'),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"not_yet_invented": 3}, "not_yet_invented is 3"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa", which changes the base'),
        ({"r": 0}, "adapter_config.json: r: found 0, expected an integer from 1 to 1048576"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path: found 5, expected a string"),
        ({"r": 10**400}, "r: found 10{56}.*, expected an integer from 1 to 1048576"),
        ({"lora_alpha": "8"}, 'lora_alpha: found "8", expected a number above 0'),
    ],
)
def test_adapter_files_of_another_kind_are_refused(changes, message, tiny_folder, tmp_path):
    write_adapter(tmp_path, tiny_folder, changes)
    with pytest.raises(UserError, match=f"adapter_.*{message}"):
        read_adapter(tmp_path)


def test_damaged_adapter_folders_are_named(tiny_folder, tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            check_fits(read_adapter(tmp_path), read_shape(tiny_folder))

    refused("adapter_config.json: cannot be read")
    for text in ("{", "[]"):
        (tmp_path / "adapter_config.json").write_text(text)
        refused("adapter_config.json: (not valid JSON|expected a JSON object, found list)")
    write_adapter(tmp_path, tiny_folder)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refused("found no complete safetensors file")
    file.unlink()
    refused("adapter_model.safetensors: cannot be read .No such file")
    del config["r"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_adapter(tmp_path, tiny_folder, keep=lambda key: "lora_A" in key)
    refused(r"lora_B.weight: found none, expected \(32, 4\)")
    write_adapter(tmp_path, tiny_folder, keep=lambda key: False)
    refused("found no tensors")
    extra = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 61)}
    write_adapter(tmp_path, tiny_folder, **extra)
    refused(r"lora_embedding_A: found \(4, 61\), expected none of plain LoRA")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{PREFIX}.lora_A.weight": torch.zeros(4, 64)},
            r"q_proj.lora_A.weight: found \(4, 64\), expected \(4, 32\) of plain LoRA for this",
        ),
        (
            {
                f"{PREFIX.replace('layers.0', 'layers.9')}.lora_A.weight": torch.zeros(4, 32),
                f"{PREFIX.replace('layers.0', 'layers.9')}.lora_B.weight": torch.zeros(32, 4),
            },
            r"layers.9.self_attn.q_proj.lora_A.weight: found \(4, 32\), expected none",
        ),
        (
            {f"{PREFIX}.lora_B.weight": torch.zeros(32, 4, dtype=torch.int8)},
            "tensor .*q_proj.lora_B.weight: found I8, expected one of F64",
        ),
        ({f"{PREFIX}.lora_B.weight": torch.full((32, 4), math.nan)}, "q_proj.weight holds NaN"),
    ],
)
def test_an_adapter_for_another_base_is_refused(tensors, message, tiny_folder, tmp_path):
    write_adapter(tmp_path / "adapter", tiny_folder, **tensors)
    with pytest.raises(UserError, match=message):
        merge(tiny_folder, tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_rank_than_the_file_s_is_refused(tiny_folder, tmp_path):
    write_adapter(tmp_path / "adapter", tiny_folder, {"r": 5})
    with pytest.raises(UserError, match=r"lora_A.weight: found \(4, 32\), expected \(5, 32\)"):
        merge(tiny_folder, tmp_path / "adapter", tmp_path / "merged")


def write_base(folder, dtype, **options):
    """A model of several files with a tokenizer's files."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(**TINY, initializer_range=0.2, **options)
    model = transformers.MistralForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text(f"{name} of the base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["published", "all", "rslora"])
def test_merged_weights_are_sums_rounded_once(dtype, name, tmp_path):
    base, adapter, out = (tmp_path / part for part in ("base", "adapter", "new/merged"))
    write_base(base, dtype)
    model = adapted_model(base, SETTINGS[name])
    save_adapter(adapter, adapter_tensors(model), SETTINGS[name], "a base")
    merge(base, adapter, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in base.iterdir())
    assert len(list(out.glob("*.safetensors"))) > 1
    changed = products(model)
    for file in base.glob("*.safetensors"):
        before, after = load_file(file), load_file(out / file.name)
        assert before.keys() == after.keys()
        for key, value in before.items():
            if key not in changed:
                assert torch.equal(after[key], value), key
                continue
            exact = value.double() + changed[key]
            assert after[key].dtype == dtype
            # Half a unit in the last place, and what float32 sums add to it.
            bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
            assert ((after[key].double() - exact).abs() <= bound).all(), key
    theirs = transformers.MistralForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    error = (their_logits(theirs) - logits(model)).norm() / logits(model).norm()
    assert error < max(1e-5, 8 * torch.finfo(dtype).eps)


def test_merging_into_a_vision_model_gives_its_text_model(tmp_path):
    decoder = transformers.MistralConfig(**TINY, head_dim=8)
    theirs = write_tower(tmp_path / "base", decoder, tie_word_embeddings=False)
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert isinstance(merged, transformers.MistralForCausalLM) and not any(report.values())
    expected = {f"model.{n}": p for n, p in theirs.model.language_model.named_parameters()}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert (b @ a).abs().max() > 0.01
        expected[f"{name}.weight"] = expected[f"{name}.weight"] + 2 * b @ a
    for key, value in expected.items():
        torch.testing.assert_close(merged.state_dict()[key], value, rtol=1e-6, atol=1e-6)


def test_merging_brings_the_adapter_s_tokenizer(tmp_path):
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "merged"))
    write_base(base, torch.float32)
    write_adapter(adapter, base)
    (adapter / "tokenizer_config.json").write_text("of the adapter")
    (adapter / "tokenizer.json").write_text("of the adapter")
    merge(base, adapter, out)
    assert (out / "tokenizer.json").read_text() == "of the adapter"
    assert not (out / "chat_template.jinja").exists()
    assert (out / "generation_config.json").is_file()


def test_the_merge_command(tiny_folder, tmp_path, capsys):
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    write_adapter(adapter, tiny_folder)
    arguments = ["merge", str(tiny_folder), str(adapter), str(out)]
    assert main(arguments) == 0
    expected = logits(adapted_model(tiny_folder, LoraSettings(4, 8, target_modules=("q_proj",))))
    assert relative_error(logits(base_model(out)), expected) < 1e-5
    assert main(arguments) == 2
    assert "merged: exists already" in capsys.readouterr().err
    assert main(["merge", str(adapter), str(adapter), str(tmp_path / "no")]) == 2
    assert "found an adapter, expected a complete model; merge it first" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*arguments[:3], str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "file", "merged"]


def test_a_tied_head_cannot_take_an_adapter_apart_from_the_embedding(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_base(base, torch.float32, tie_word_embeddings=True)
    head = {
        "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32),
        "base_model.model.lm_head.lora_B.weight": torch.zeros(61, 4),
    }
    write_adapter(adapter, base, **head)
    with pytest.raises(UserError, match=r"lm_head.lora_A.weight: found \(4, 32\), expected none"):
        merge(base, adapter, tmp_path / "merged")
