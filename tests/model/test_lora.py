"""Adapters against written-out formulas, and on two ranks against one."""

import copy
import math
from functools import partial
from pathlib import Path

import lora_ranks
import pytest
import torch
from lora_models import (
    SETTINGS,
    adapted_model,
    base_model,
    logits,
    merged_by_hand,
    relative_error,
    their_logits,
)
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from notus.errors import UserError
from notus.model.hf_config import read_shape
from notus.model.lora import (
    LoraLinear,
    LoraSettings,
    adapter_parameters,
    adapters_off,
    add_adapters,
    initialize_adapters,
)
from notus.model.mistral import MistralForCausalLM
from notus.model.peft import adapter_tensors, save_adapter
from notus.strict import parse
from ranks import call


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


def test_dropout_is_only_for_training(tiny_folder):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "model.lora.rank: found 0, expected an integer from 1 to 1048576"),
        ({"rank": 10**9}, "model.lora.rank: found 1000000000, expected an integer from 1"),
        ({"rank": True}, "model.lora.rank: found true"),
        ({"rank": 2.0}, "model.lora.rank: found 2.0"),
        ({"alpha": 0}, "model.lora.alpha: found 0.0, expected a number above 0"),
        ({"alpha": math.inf}, "model.lora.alpha: found Infinity, expected a finite number"),
        ({"dropout": 1.0}, "model.lora.dropout: found 1.0, expected a number from 0 to below 1"),
        ({"target_modules": ()}, r"model.lora.target_modules: found \[\], expected a list of one"),
        ({"rslora": 1}, "model.lora.rslora: found 1, expected true or false"),
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
    with pytest.raises(UserError, match=message):
        settings = parse({"rank": 4, "alpha": 8} | changes, LoraSettings, "model.lora")
        add_adapters(base_model(tiny_folder), settings)


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(tiny_folder, tmp_path):
    given = adapted_model(tiny_folder, lora_ranks.SETTINGS)
    save_adapter(tmp_path / "given", adapter_tensors(given), lora_ranks.SETTINGS, None)
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
