"""Small models with adapters, and transformers' models to compare them with."""

import lora_ranks
import torch
import transformers
from torch.nn import functional as F

from notus.model.hf_config import read_shape
from notus.model.lora import LoraLinear, LoraSettings, adapter_parameters, add_adapters
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import load_weights

SETTINGS = {
    "two by name": LoraSettings(4, 8, target_modules=("q_proj", "v_proj")),
    "published": LoraSettings(6, 2, 0.1, ("q_proj", "k_proj", "v_proj", "o_proj")),
    "all": LoraSettings(5, 7.5, target_modules="all-linear"),
    "rslora": LoraSettings(4, 8, target_modules="all-linear", rslora=True),
    "by end of name": LoraSettings(2, 3, target_modules=("mlp.up_proj", "1.self_attn.o_proj")),
}


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
