"""Adapters in the file format of Hugging Face's PEFT, and their sum with the base.

python -m notus.model.peft merge BASE ADAPTER OUT
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from notus.console import run_command
from notus.errors import UserError
from notus.files import new_folder, read_object, write_json
from notus.model.hf_config import INDEX, ModelShape, Size, decoder_config, has_vision
from notus.model.hub import copy_tokenizer, model_folder
from notus.model.lora import ALL_LINEAR, LoraSettings, adapter_parameters
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import (
    check_shapes,
    decoder_name,
    header_shapes,
    open_model,
    save_tensors,
    stored_tensors,
)
from notus.strict import Positive, keys_of, parse_part

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The entries of adapter_config.json that are used, under PEFT's names."""

    r: Size
    lora_alpha: Positive
    use_rslora: bool = False
    base_model_name_or_path: str | None = None


# Other entries that change no result. Any further one that is set (use_dora, modules_to_save,
# rank_pattern, whatever PEFT adds next) stands for something that this decoder does not compute.
# Which layers have an adapter is read from the weights.
KNOWN_KEYS = {
    "auto_mapping",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
}
# Initialisations that leave the base unchanged. The others (PiSSA, OLoRA, ...) change its weights.
KNOWN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class Adapter(NamedTuple):
    """The contents of a PEFT folder, from its configuration."""

    rank: int
    scaling: float  # of B A
    base_name: str | None
    file: Path


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a PEFT folder.

    Raises UserError for a missing or damaged configuration, and a setting that changes the result
    in a way that this decoder does not compute.
    """
    path = folder / CONFIG
    config = read_object(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f'{path}: peft_type is {json.dumps(kind)}, expected "LORA"')
    if config.get("init_lora_weights", True) not in KNOWN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights is {json.dumps(config['init_lora_weights'])}, which "
            "changes the base's weights; expected an adapter that leaves them unchanged"
        )
    for key in sorted(config.keys() - KNOWN_KEYS - keys_of(PeftConfig).keys()):
        if config[key] and not (key == "bias" and config[key] == "none"):
            raise UserError(
                f"{path}: {key} is {json.dumps(config[key])}, which is not supported; expected "
                "plain LoRA of linear layers, with this entry unset"
            )
    theirs = parse_part(config, PeftConfig, path)
    scaling = LoraSettings(theirs.r, theirs.lora_alpha, rslora=theirs.use_rslora).scaling
    return Adapter(theirs.r, scaling, theirs.base_model_name_or_path, folder / WEIGHTS)


def _peft_name(name: str) -> str:
    """PEFT's name of a parameter: its model wraps the base, and its A and B are modules."""
    return f"base_model.model.{name}.weight"


def check_fits(adapter: Adapter, shape: ModelShape) -> set[str]:
    """The layers that the adapter changes in a base of this shape.

    Raises UserError for a damaged file, and one that is not plain LoRA for linear layers of it.
    """
    with torch.device("meta"):
        weights = {name: p.shape for name, p in MistralForCausalLM(shape).named_parameters()}
    found, expected = header_shapes(adapter.file), {}
    named = (re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key) for key in found)
    layers = {match[1] for match in named if match}
    for layer in layers:
        if len(weight := weights.get(f"{layer}.weight", ())) == 2:
            expected[_peft_name(f"{layer}.lora_A")] = (adapter.rank, weight[1])
            expected[_peft_name(f"{layer}.lora_B")] = (weight[0], adapter.rank)
    check_shapes(adapter.file, found, expected, "of plain LoRA for this base")
    if not layers:
        raise UserError(f"{adapter.file}: found no tensors, expected an adapter's")
    return layers


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's adapters under PEFT's names, float32 on the host; nothing on ranks above 0.

    Collective where parameters are sharded.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    tensors = {}
    for name, parameter in adapter_parameters(model).items():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if first:
            tensors[_peft_name(name)] = full.detach().cpu().contiguous()
        del full
    return tensors


def save_adapter(
    folder: Path, tensors: Mapping[str, Tensor], settings: LoraSettings, base_name: str | None
) -> None:
    """Write `adapter_tensors` as the PEFT folder `folder`, which must not exist yet.

    base_name: path or hub id of the base, which PEFT looks up. An absolute path is written relative
    to the working directory, from where PEFT still finds it: the folder may be published. Raises
    OSError.
    """
    targets = settings.target_modules
    if targets == ALL_LINEAR:  # by name: not every reader of these files knows the short form
        targets = sorted({key.split(".")[-3] for key in tensors})
    if base_name is not None and os.path.isabs(base_name):
        base_name = os.path.relpath(base_name)
    folder.mkdir(parents=True)
    save_tensors(folder / WEIGHTS, tensors)
    config = {  # PEFT has defaults for the other entries
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    write_json(folder / CONFIG, config)


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write the base with the adapter added to its weights as a Hugging Face folder.

    Each sum W + scaling * B A is computed in float32 and rounded once, to W's dtype in the base's
    file; everything else is copied unchanged. The tokenizer is the adapter's if its folder has one.
    `out` must not exist and appears only when it is complete. Memory: the largest of the base's
    files. Not collective: one process calls it. Raises UserError when either folder is unusable,
    the adapter was made for another base, or `out` cannot be written.
    """
    with new_folder(out) as partial:
        write_merged(partial, base, adapter)


def write_merged(folder: Path, base: Path, adapter: Path) -> None:
    """Write the files of the merged model into an existing folder."""
    opened = read_adapter(adapter)
    base, shape = open_model(str(base))
    layers = check_fits(opened, shape)
    for file in sorted({tensor.file for tensor in stored_tensors(base).values()}):
        tensors = {decoder_name(name): tensor for name, tensor in load_file(file).items()}
        tensors.pop(None, None)
        _add_products(tensors, opened, [name for name in layers if f"{name}.weight" in tensors])
        save_tensors(folder / file.name, tensors)
    for name in ("config.json", "generation_config.json", INDEX):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if has_vision(base):
        write_json(folder / "config.json", decoder_config(base))
        if (base / INDEX).is_file():
            files = {name: tensor.file.name for name, tensor in stored_tensors(base).items()}
            write_json(folder / INDEX, {"metadata": {}, "weight_map": files})
    copy_tokenizer(tokenizer_folder(base, adapter), folder)


def _add_products(tensors: dict[str, Tensor], adapter: Adapter, layers: Sequence[str]) -> None:
    """Replace the weights of `layers` by their sums with B A, in place."""
    with safe_open(adapter.file, framework="pt") as products:
        for layer in layers:
            a, b = (
                products.get_tensor(_peft_name(f"{layer}.{matrix}")).float()
                for matrix in ("lora_A", "lora_B")
            )
            weight = tensors[f"{layer}.weight"]
            merged = torch.addmm(weight.float(), b, a, alpha=adapter.scaling).to(weight.dtype)
            if not merged.isfinite().all():
                raise UserError(
                    f"{adapter.file}: with it, {layer}.weight holds NaN or infinite values; "
                    "expected finite ones"
                )
            tensors[f"{layer}.weight"] = merged


def tokenizer_folder(base: Path, adapter: Path) -> Path:
    """The folder of the tokenizer that the adapter was trained with.

    Trainers put it into the adapter's folder when it has its own chat template.
    """
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m notus.model.peft", description="Adapters.")
    parser.add_argument("command", choices=["merge"], help="add ADAPTER to the weights of BASE")
    parser.add_argument("base", metavar="BASE", help="model folder or hub id")
    parser.add_argument("adapter", metavar="ADAPTER", help="PEFT folder or hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write, not there yet")
    options = parser.parse_args(arguments)

    def command() -> str:
        merge(model_folder(options.base), model_folder(options.adapter), options.out)
        return f"wrote {options.out}"

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
