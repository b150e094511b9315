"""Adapters against written-out formulas, and against PEFT where it is installed."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import lora_ranks
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from notus.errors import UserError
from notus.model.lora import (
    LoraLinear,
    LoraSettings,
    adapter_parameters,
    adapters_off,
    add_adapters,
    check_settings,
    initialize_adapters,
    is_adapter,
    load_adapter,
    main,
    merge,
    read_adapter,
    save_adapter,
)
from notus.model.mistral import MistralForCausalLM, read_shape
from notus.model.weights import load_weights
from ranks import call

SETTINGS = {
    "two by name": LoraSettings(4, 8, target_modules=("q_proj", "v_proj")),
    "published": LoraSettings(6, 2, 0.1, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "all": LoraSettings(5, 7.5),
    "rslora": LoraSettings(4, 8, rslora=True),
    "by end of name": LoraSettings(2, 3, target_modules=("mlp.up_proj", "1.self_attn.o_proj")),
}
PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def base_model(folder) -> MistralForCausalLM:
    model = MistralForCausalLM(read_shape(folder))
    load_weights(model, folder)
    return model


def adapted_model(folder, settings, scale=0.3) -> MistralForCausalLM:
    """The model of `folder` with random adapters, in evaluation mode."""
    model = base_model(folder)
    add_adapters(model, settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model) -> torch.Tensor:
    """Of one sequence: [16, V]."""
    hidden = lora_ranks.hidden_states(model)
    return F.linear(hidden, model.lm_head.weight.to(hidden.dtype))


def their_logits(model) -> torch.Tensor:
    return model(lora_ranks.TOKENS[None]).logits[0]


def relative_error(found, expected) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def products(model) -> dict[str, torch.Tensor]:
    """alpha / rank (or its root) times B A, in float64, by the name of the weight."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    return {
        f"{n}.weight": m.scaling * m.lora_B.double() @ m.lora_A.double() for n, m in layers.items()
    }


def merged_by_hand(model, folder) -> transformers.MistralForCausalLM:
    """transformers' model with W + scaling B A for its weights, all of it in float64."""
    theirs = transformers.MistralForCausalLM.from_pretrained(folder).double().eval()
    with torch.no_grad():
        for name, product in products(model).items():
            theirs.get_parameter(name).add_(product)
    return theirs


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [(LoraSettings(64, 16), 0.25), (LoraSettings(64, 16, rslora=True), 2.0)],
)
def test_scaling(settings, scaling):
    assert settings.scaling == scaling


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_formula(bias, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(24, 40, bias=bias, dtype=dtype)
    layer = LoraLinear(linear, LoraSettings(3, 2.0, dropout=0.5))
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 24, dtype=dtype)
    torch.manual_seed(1)
    found = layer(x)
    assert found.dtype == dtype
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5).double()
    base = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    expected = base + 2 / 3 * dropped @ layer.lora_A.double().T @ layer.lora_B.double().T
    assert relative_error(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    layer.eval()
    expected = base + 2 / 3 * x.double() @ layer.lora_A.double().T @ layer.lora_B.double().T
    assert relative_error(layer(x), expected) < (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_the_summed_weights(name, tiny_folder):
    model = adapted_model(tiny_folder, SETTINGS[name])
    expected = their_logits(merged_by_hand(model, tiny_folder))
    assert relative_error(logits(model), expected) < 1e-5
    assert relative_error(logits(base_model(tiny_folder)), expected) > 0.05


def test_what_is_adapted_and_what_is_frozen(tiny_folder):
    model = base_model(tiny_folder)
    before = dict(model.named_parameters())
    add_adapters(model, SETTINGS["by end of name"])
    names = {n for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert names == {
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.o_proj",
    }
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert after.keys() - before.keys() == adapter_parameters(model).keys()
    assert {n for n, p in after.items() if p.requires_grad} == adapter_parameters(model).keys()
    assert after["model.layers.0.mlp.up_proj.lora_A"].shape == (2, 32)
    assert after["model.layers.0.mlp.up_proj.lora_B"].shape == (48, 2)


def test_all_linear_leaves_the_head_and_keeps_adapters_float32(tiny_folder):
    with torch.device("meta"):
        model = MistralForCausalLM(read_shape(tiny_folder)).bfloat16()
    add_adapters(model, SETTINGS["all"])
    adapters = adapter_parameters(model)
    assert len(adapters) == 2 * 2 * 7 and not any("lm_head" in name for name in adapters)
    assert {(p.dtype, p.device.type) for p in adapters.values()} == {(torch.float32, "meta")}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_off_is_the_base_model_to_the_bit(tiny_folder):
    expected = logits(base_model(tiny_folder))
    model = adapted_model(tiny_folder, LoraSettings(4, 8, dropout=0.5)).train()
    state = torch.get_rng_state()
    with adapters_off(model):
        with adapters_off(model):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):
        raise RuntimeError("inside")
    assert not torch.allclose(logits(model), expected)


def test_dropout_is_for_training_alone(tiny_folder):
    model = adapted_model(tiny_folder, LoraSettings(4, 8, dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_recomputation_draws_the_same_dropout(tiny_folder):
    def gradients(recomputed: bool) -> list[torch.Tensor]:
        model = adapted_model(tiny_folder, LoraSettings(4, 8, dropout=0.5)).train()
        for block in model.model.layers if recomputed else ():
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, preserve_rng_state=True
            )
        torch.manual_seed(3)
        lora_ranks.score(model).sum().backward()
        return [parameter.grad for parameter in adapter_parameters(model).values()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(found, expected)


def test_adapters_start_as_in_peft_and_change_nothing(tiny_folder):
    expected = logits(base_model(tiny_folder))
    model = base_model(tiny_folder)
    add_adapters(model, LoraSettings(200, 400, dropout=0.3))
    initialize_adapters(model, seed=7)
    assert torch.equal(logits(model.train()), expected)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            assert not parameter.any()
            continue
        bound = 1 / math.sqrt(parameter.shape[1])
        assert 0.99 * bound < parameter.abs().max() <= bound
        assert abs(parameter.mean()) < 0.05 * bound
        assert abs(parameter.std() / (bound / math.sqrt(3)) - 1) < 0.05


def test_a_start_depends_on_the_seed_and_the_name(tiny_folder):
    def started(seed, targets):
        model = base_model(tiny_folder)
        add_adapters(model, LoraSettings(4, 8, target_modules=targets))
        initialize_adapters(model, seed)
        return adapter_parameters(model)

    one, same, other = started(1, "all-linear"), started(1, ("q_proj",)), started(2, ("q_proj",))
    q, k = (f"model.layers.0.self_attn.{name}_proj.lora_A" for name in "qk")
    assert torch.equal(one[q], same[q])
    assert not torch.equal(one[q], other[q])
    assert not torch.equal(one[q], one[k])


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

    adapter = read_adapter(tmp_path / "theirs")
    assert adapter.base_name == str(tiny_folder)
    ours = base_model(tiny_folder)
    add_adapters(ours, adapter.settings)
    load_adapter(ours, tmp_path / "theirs")
    ours.eval()
    assert relative_error(logits(ours), expected) < 1e-5
    with adapters_off(ours), theirs.disable_adapter():
        assert relative_error(logits(ours), their_logits(theirs)) < 1e-5

    save_adapter(tmp_path / "ours", ours, settings, str(tiny_folder))
    base = transformers.MistralForCausalLM.from_pretrained(tiny_folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert torch.equal(their_logits(again), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_adapter_is_read_back(name, tiny_folder, tmp_path):
    model = adapted_model(tiny_folder, SETTINGS[name])
    save_adapter(tmp_path / "adapter", model, SETTINGS[name], "a base")
    assert is_adapter(tmp_path / "adapter") and not is_adapter(tiny_folder)
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for key, value in adapter_parameters(model).items():
        assert torch.equal(stored.pop(f"base_model.model.{key}.weight"), value)
    assert not stored
    adapter = read_adapter(tmp_path / "adapter")
    again = base_model(tiny_folder)
    add_adapters(again, adapter.settings)
    load_adapter(again, tmp_path / "adapter")
    assert adapter.base_name == "a base"
    assert torch.equal(logits(again.eval()), logits(model))


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
    assert read_adapter(tmp_path).settings.target_modules == (
        f"model.layers.{kept}.self_attn.q_proj",
    )


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
        ({"rank": 0}, "model.lora.rank is 0, expected an integer of at least 1"),
        ({"rank": True}, "model.lora.rank is true"),
        ({"rank": 2.0}, "model.lora.rank is 2.0"),
        ({"alpha": 0}, "model.lora.alpha is 0, expected a number above 0"),
        ({"alpha": math.inf}, "model.lora.alpha is Infinity"),
        ({"dropout": 1.0}, "model.lora.dropout is 1.0, expected .* at least 0 and below 1"),
        ({"target_modules": ()}, r"model.lora.target_modules is \[\], expected names"),
        ({"rslora": 1}, "model.lora.rslora is 1, expected true or false"),
        (
            {"target_modules": ("q_proj", "query")},
            '"query" names no linear layer .* expected some of q_proj, k_proj, v_proj, o_proj, '
            'gate_proj, up_proj, down_proj, or "all-linear"',
        ),
        ({"target_modules": ("lm_head",)}, '"lm_head" names no linear layer'),
        ({"target_modules": ("proj",)}, '"proj" names no linear layer'),
    ],
)
def test_wrong_settings_are_named(changes, message, tiny_folder):
    settings = LoraSettings(**({"rank": 4, "alpha": 8} | changes))
    with pytest.raises(UserError, match=message):
        add_adapters(base_model(tiny_folder), settings)


def test_settings_may_have_their_own_names():
    with pytest.raises(UserError, match="^file: r is -1"):
        check_settings(LoraSettings(-1, 8), {"rank": "file: r"}.__getitem__)


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
        ({"r": 0}, "adapter_config.json: r is 0, expected an integer of at least 1"),
        ({"r": 5}, r"q_proj.lora_A.weight has shape \(4, 32\), expected .* the rank, 5"),
        ({"lora_alpha": "8"}, 'lora_alpha is "8", expected a number above 0'),
        ({"target_modules": [1]}, r"target_modules is \[1\], expected names"),
    ],
)
def test_adapter_files_of_another_kind_are_refused(changes, message, tiny_folder, tmp_path):
    write_adapter(tmp_path, tiny_folder, changes)
    with pytest.raises(UserError, match=f"adapter_.*{message}"):
        read_adapter(tmp_path)


def test_damaged_adapter_folders_are_named(tiny_folder, tmp_path):
    def refused(message):
        with pytest.raises(UserError, match=message):
            read_adapter(tmp_path)

    refused("no adapter_config.json; expected the folder of an adapter")
    for text in ("{", "[]"):
        (tmp_path / "adapter_config.json").write_text(text)
        refused("adapter_config.json: (not valid JSON|found list, expected a JSON object)")
    write_adapter(tmp_path, tiny_folder)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refused("found no complete safetensors file")
    file.unlink()
    refused("no adapter_model.safetensors")
    del config["r"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_adapter(tmp_path, tiny_folder, keep=lambda key: "lora_A" in key)
    refused("found base_model.*lora_A.weight, but no base_model.*lora_B.weight")
    write_adapter(tmp_path, tiny_folder, keep=lambda key: False)
    refused("found no tensors")
    extra = {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 61)}
    write_adapter(tmp_path, tiny_folder, **extra)
    refused("lora_embedding_A is not part of plain LoRA")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{PREFIX}.lora_A.weight": None, f"{PREFIX}.lora_B.weight": None},
            r"layers.0.self_attn.q_proj.lora_A.weight is missing; expected shape \(4, 32\): was",
        ),
        (
            {f"{PREFIX}.lora_A.weight": torch.zeros(4, 64)},
            r"q_proj.lora_A.weight has shape \(4, 64\), expected \(4, 32\): was the adapter made",
        ),
        (
            {
                f"{PREFIX.replace('layers.0', 'layers.9')}.lora_A.weight": torch.zeros(4, 32),
                f"{PREFIX.replace('layers.0', 'layers.9')}.lora_B.weight": torch.zeros(32, 4),
            },
            "layers.9.self_attn.q_proj.lora_A.weight belongs to no adapted linear layer",
        ),
        ({f"{PREFIX}.lora_B.weight": torch.full((32, 4), math.nan)}, "holds NaN"),
    ],
)
def test_an_adapter_for_another_base_is_refused(tensors, message, tiny_folder, tmp_path):
    write_adapter(tmp_path / "adapter", tiny_folder, **tensors)
    model = base_model(tiny_folder)
    add_adapters(model, LoraSettings(4, 8, target_modules=("q_proj",)))
    with pytest.raises(UserError, match=message):
        load_adapter(model, tmp_path / "adapter")
    if "missing" in message:  # one layer fewer is no obstacle to a merge
        return
    with pytest.raises(UserError, match=message):
        merge(tiny_folder, tmp_path / "adapter", tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_another_scaling_is_refused(tiny_folder, tmp_path):
    write_adapter(tmp_path, tiny_folder)
    model = base_model(tiny_folder)
    add_adapters(model, LoraSettings(4, 16, target_modules=("q_proj",)))
    with pytest.raises(UserError, match="make a scaling of 2, expected 4 by model.lora"):
        load_adapter(model, tmp_path)


def write_base(folder, dtype, **options):
    """A model of several files with a tokenizer's files."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        **options,
    )
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
    save_adapter(adapter, model, SETTINGS[name], "a base")
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
    expected = logits(adapted_model(tiny_folder, read_adapter(adapter).settings))
    assert relative_error(logits(base_model(out)), expected) < 1e-5
    assert main(arguments) == 2
    assert "merged: exists already" in capsys.readouterr().err
    assert main(["merge", str(adapter), str(adapter), str(tmp_path / "no")]) == 2
    assert "found an adapter, expected a whole model; merge it first" in capsys.readouterr().err
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
    with pytest.raises(UserError, match="lm_head.lora_A.weight belongs to no adapted linear"):
        merge(base, adapter, tmp_path / "merged")


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(tiny_folder, tmp_path):
    given = adapted_model(tiny_folder, lora_ranks.SETTINGS)
    save_adapter(tmp_path / "given", given, lora_ranks.SETTINGS, None)
    code, told = call(lora_ranks.main, tiny_folder, tmp_path, log=tmp_path / "log", ranks=2)
    assert code == 0, told
    found = load_file(tmp_path / "results.safetensors")

    # Unsharded, bfloat16 compute is a model whose parameters are all bfloat16.
    models = {"float32": given, "bfloat16": copy.deepcopy(given).bfloat16()}
    for dtype, model in models.items():
        for key, expected in lora_ranks.results(model).items():
            # Both ranks score the same sequence, and gradients are summed over ranks, in float32.
            expected = 2 * expected.float() if key.startswith("gradient/") else expected
            if dtype == "bfloat16" and key.startswith("loaded/"):
                continue  # masters in float32
            assert relative_error(found[f"{dtype}/{key}"], expected) < 1e-5, (dtype, key)
    initialize_adapters(given, lora_ranks.SEED)
    for name, value in adapter_parameters(given).items():
        assert torch.equal(found[f"initial/{name}"], value), name
    files = [load_file(Path(tmp_path, n, "adapter_model.safetensors")) for n in ("given", "saved")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
