"""Gradients and files of a model with adapters, sharded over ranks, each of which calls `main`.

`results` is what a test computes itself, without ranks, to compare.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from notus.data.packing import Layout
from notus.engine import distributed
from notus.model.attention import build_mask
from notus.model.hf_config import read_shape
from notus.model.lora import (
    LoraSettings,
    adapter_parameters,
    adapters_off,
    add_adapters,
    initialize_adapters,
)
from notus.model.mistral import MistralForCausalLM
from notus.model.peft import adapter_tensors, save_adapter
from notus.model.weights import local_rows

# A rank of 3 does not divide by 2: the last rank holds one row of every A.
SETTINGS = LoraSettings(rank=3, alpha=6, target_modules="all-linear")
SEED = 5
# One sequence.
TOKENS = torch.arange(3, 19)
POSITION = torch.arange(len(TOKENS), dtype=torch.int32)
LAYOUT = Layout(
    torch.zeros_like(POSITION), torch.zeros_like(POSITION), POSITION, torch.zeros(16).bool()
)


def hidden_states(model: MistralForCausalLM) -> Tensor:
    """The decoder's output: [16, D]."""
    mask = build_mask(LAYOUT, model.shape.sliding_window, "dense")
    return model.model(TOKENS, POSITION, mask, torch.arange(16))


def score(model: MistralForCausalLM) -> Tensor:
    """Log-prob of each next token: float32 [15]."""
    mask = build_mask(LAYOUT, model.shape.sliding_window, "dense")
    return model(TOKENS, POSITION, mask, torch.arange(15), TOKENS[1:])[0]


def results(model: MistralForCausalLM) -> dict[str, Tensor]:
    """Adapters as loaded; base and adapted log-probs; gradients of their sum by name."""
    found = {f"loaded/{name}": value for name, value in adapter_parameters(model).items()}
    found["adapted"] = score(model)
    found["adapted"].sum().backward()
    with adapters_off(model), torch.no_grad():
        found["base"] = score(model)
    frozen = {n for n, p in model.named_parameters() if p.grad is None}
    assert frozen == {n for n, p in model.named_parameters() if not p.requires_grad}
    found |= {f"gradient/{n}": p.grad for n, p in adapter_parameters(model).items()}
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in found.items()
    }


def sharded(folder: Path, base_dtype: torch.dtype, compute_dtype: torch.dtype, recompute: str):
    """The model of `folder` over all ranks: frozen base in one dtype, float32 adapters."""
    ranks = distributed.start("cpu")
    with torch.device("meta"):
        model = MistralForCausalLM(read_shape(folder)).to(base_dtype)
    add_adapters(model, SETTINGS)
    distributed.shard_model(
        model,
        distributed.make_mesh(ranks, None, 1),
        ranks.device,
        compute_dtype=compute_dtype,
        activation_checkpointing=recompute,
        compile_blocks=False,
        cpu_offload=False,
    )
    with safe_open(folder / "model.safetensors", framework="pt") as handle, torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                local, rows = local_rows(parameter)
                local.copy_(handle.get_slice(name)[rows])
    return model


@torch.no_grad()
def fill(model: MistralForCausalLM, file: Path) -> None:
    """Give the model's adapters the values in PEFT's file, each rank its own rows."""
    with safe_open(file, framework="pt") as handle:
        for name, parameter in adapter_parameters(model).items():
            local, rows = local_rows(parameter)
            local.copy_(handle.get_slice(f"base_model.model.{name}.weight")[rows])


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    model = sharded(folder, torch.float32, torch.float32, "none")
    initialize_adapters(model, SEED)
    starting = {name: p.full_tensor() for name, p in adapter_parameters(model).items()}
    # B = 0 would hide A's gradient, so the comparison is of an adapter from a file.
    fill(model, out / "given/adapter_model.safetensors")
    found = {"float32": results(model)}
    tensors = adapter_tensors(model)
    assert bool(tensors) == (dist.get_rank() == 0)
    if tensors:
        save_adapter(out / "saved", tensors, SETTINGS, "a base")

    model = sharded(folder, torch.bfloat16, torch.bfloat16, "full")
    fill(model, out / "given/adapter_model.safetensors")
    dtypes = {p.to_local().dtype for p in adapter_parameters(model).values()}
    assert dtypes == {torch.float32}, dtypes
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    found["bfloat16"] = results(model)
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(model).values())

    tensors = {f"{kind}/{n}": v for kind, values in found.items() for n, v in values.items()}
    tensors |= {f"initial/{name}": value for name, value in starting.items()}
    if dist.get_rank() == 0:
        save_file(tensors, out / "results.safetensors")
    distributed.stop()
