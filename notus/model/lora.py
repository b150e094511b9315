"""Low-rank adapters.

LoRA, arXiv 2106.09685: a frozen linear layer W gains a trained product of two thin matrices,

    y = W x + scaling * B A dropout(x),    A [rank, in], B [out, rank], scaling = alpha / rank,

with B = 0 at first, so that training begins at the base model. rsLoRA, arXiv 2312.03732, scales by
alpha / sqrt(rank) instead, so that a high rank learns as fast as a low one.

Base weights keep their names. With its adapters switched off the model is exactly the base, which
is therefore the reference without a second copy.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from notus.errors import UserError
from notus.model.hf_config import Size
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import local_rows
from notus.strict import FractionBelowOne, Positive, Text

ALL_LINEAR = "all-linear"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters: only they are trained, and the base is kept in compute_dtype."""

    rank: Size  # of a layer's change B A: rows of A, columns of B
    alpha: Positive  # the adapters' product is scaled by alpha / rank
    # probability that an entry of an adapter's input is dropped in training
    dropout: FractionBelowOne = 0.0
    # linear layers by name or by the end of their name from a dot on ("q_proj", "mlp.up_proj"),
    # or "all-linear" for all those of the blocks
    target_modules: tuple[Text, ...] | Literal["all-linear"] = ATTENTION
    rslora: bool = False  # scaled by alpha / sqrt(rank) instead
    merge: bool = False  # final/ also gets base and adapters as one model

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; `weight` and `bias` are those of the layer it replaces."""

    def __init__(self, linear: nn.Linear, settings: LoraSettings) -> None:
        inner, outer = linear.in_features, linear.out_features
        super().__init__(inner, outer, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        options = {"dtype": torch.float32, "device": linear.weight.device}
        self.lora_A = nn.Parameter(torch.zeros(settings.rank, inner, **options))
        self.lora_B = nn.Parameter(torch.zeros(outer, settings.rank, **options))
        self.scaling, self.dropout = settings.scaling, settings.dropout
        self.adapter_on = True

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of `input`.

        The product with the adapter is computed in the adapter's dtype: float32 as it is stored
        (as in PEFT), or the compute dtype in which FSDP has gathered it; the sum is rounded once.
        The factor is applied where a row has only `rank` entries.
        """
        base = super().forward(input)
        if not self.adapter_on:
            return base
        # A compiler would copy the input for a dropout of 0, and keep the copy.
        dropped = F.dropout(input, self.dropout, self.training) if self.dropout else input
        thin = self.scaling * F.linear(dropped.to(self.lora_A.dtype), self.lora_A)
        return (base + F.linear(thin, self.lora_B)).to(base.dtype)


def add_adapters(model: MistralForCausalLM, settings: LoraSettings) -> None:
    """Give the chosen linear layers an adapter, in place, and freeze everything else.

    The model may be on any device and must not be sharded yet. The base keeps its dtype (call
    `model.to(torch.bfloat16)` first to hold it in 2 bytes); adapters are float32, zero until
    `initialize_adapters`. Raises UserError for a target that names no linear layer, with the names
    that exist.
    """
    linears = {n: module for n, module in model.named_modules() if type(module) is nn.Linear}
    targets = settings.target_modules
    if targets == ALL_LINEAR:
        targets = tuple(linears)
    chosen = []
    for target in targets:
        named = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not named:
            there = dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears)
            raise UserError(
                f"model.lora.target_modules: {json.dumps(target)} names no linear layer of the "
                f'blocks, expected some of {", ".join(there)}, or "{ALL_LINEAR}"'
            )
        chosen += named
    model.requires_grad_(False)
    for name in dict.fromkeys(chosen):
        model.set_submodule(name, LoraLinear(linears[name], settings))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters, the only trained ones: "model.layers.0...q_proj.lora_A"."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith((".lora_A", ".lora_B"))
    }


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model is bit-identical to its base: no adapter is computed, no dropout drawn."""
    layers = [m for m in model.modules() if isinstance(m, LoraLinear) and m.adapter_on]
    for layer in layers:
        layer.adapter_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.adapter_on = True


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> None:
    """PEFT's initial values: A uniform in +-1 / sqrt(in) (He's with a = sqrt(5)), B = 0.

    A value depends only on `seed` and the parameter's name: not on the number of ranks, nor on
    which other layers have an adapter. Parameters may be plain or sharded along their first
    dimension; each rank draws all of an A and keeps its rows.
    """
    for name, parameter in adapter_parameters(model).items():
        local, rows = local_rows(parameter)
        full = torch.zeros(parameter.shape, dtype=torch.float32)
        if name.endswith(".lora_A"):
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            nn.init.kaiming_uniform_(full, a=math.sqrt(5), generator=generator)
        local.copy_(full[rows])
