"""Adapters in the file format of Hugging Face's PEFT, and their sum with the base.

python -m notus.model.peft merge BASE ADAPTER OUT
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from notus.errors import UserError, agreed
from notus.files import PARTIAL, new_folder, read_object, write_json
from notus.model.hf_config import ModelShape
from notus.model.lora import ALL_LINEAR, LoraLinear, LoraSettings, adapter_parameters
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import (
    INDEX,
    TOKENIZER_FILES,
    copy_tokenizer,
    header_shapes,
    local_rows,
    model_folder,
    open_model,
    stored_tensors,
)
from notus.strict import Count, FractionBelowOne, Invalid, Positive, Text, keys_of, parse

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The entries of adapter_config.json that say what the adapters compute, under PEFT's names."""

    r: Count
    lora_alpha: Positive
    lora_dropout: FractionBelowOne = 0.0
    use_rslora: bool = False
    target_modules: tuple[Text, ...] | Text | None = None  # names, or a pattern


# Other entries that change no result. Any further one that is set (use_dora, modules_to_save,
# rank_pattern, whatever PEFT adds next) stands for something that this decoder does not compute.
# Which layers have an adapter is read from the weights.
KNOWN_KEYS = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
# Initialisations that leave the base unchanged. The others (PiSSA, OLoRA, ...) change its weights.
KNOWN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


class Adapter(NamedTuple):
    """The contents of a PEFT folder, from its configuration and the header of its weights."""

    settings: LoraSettings
    base_name: str | None
    file: Path
    shapes: dict[str, tuple[int, ...]]  # by our name of the parameter


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a PEFT folder.

    Raises UserError for missing or damaged files, a setting that changes the result in a way that
    this decoder does not compute, and weights that do not fit the settings.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG}; expected the folder of an adapter")
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
    try:
        given = {key: config[key] for key in keys_of(PeftConfig) if key in config}
        theirs = parse(given, PeftConfig)
    except Invalid as error:
        raise UserError(f"{path}: {error}") from None
    file = folder / WEIGHTS
    shapes = _read_shapes(file)
    layers = {name.rsplit(".", 1)[0] for name in shapes}
    narrowed = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    by_name = isinstance(theirs.target_modules, tuple) and not narrowed
    settings = LoraSettings(
        rank=theirs.r,
        alpha=theirs.lora_alpha,
        dropout=theirs.lora_dropout,
        target_modules=theirs.target_modules if by_name else tuple(sorted(layers)),
        rslora=theirs.use_rslora,
    )
    for name, shape in shapes.items():
        rank = shape[0 if name.endswith("A") else -1]
        if len(shape) != 2 or rank != settings.rank:
            raise UserError(
                f"{file}: tensor {_peft_name(name)} has shape {shape}, expected two dimensions of "
                f"which one is the rank, {settings.rank} by {CONFIG}"
            )
    return Adapter(settings, config.get("base_model_name_or_path"), file, shapes)


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter in an adapter's file, by our name; every A has its B."""
    if not file.is_file():
        raise UserError(f"{file.parent}: no {WEIGHTS}; expected the adapter's weights under it")
    shapes = {}
    for key, shape in header_shapes(file).items():
        match = re.fullmatch(r"base_model\.model\.(.+\.lora_[AB])\.weight", key)
        if match is None:
            raise UserError(
                f"{file}: tensor {key} is not part of plain LoRA; expected names such as "
                f"{_peft_name('model.layers.0.self_attn.q_proj.lora_A')}"
            )
        shapes[match[1]] = shape
    for name in shapes:
        other = name[:-1] + ("B" if name.endswith("A") else "A")
        if other not in shapes:
            raise UserError(f"{file}: found {_peft_name(name)}, but no {_peft_name(other)}")
    if not shapes:
        raise UserError(f"{file}: found no tensors, expected an adapter's")
    return shapes


def _peft_name(name: str) -> str:
    """PEFT's name of a parameter: its model wraps the base, and its A and B are modules."""
    return f"base_model.model.{name}.weight"


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path) -> None:
    """Fill the model's adapters from a PEFT folder, each rank its own rows.

    Parameters may be plain or sharded along their first dimension. Raises UserError when the
    file's names, shapes or scaling are not those of the model's adapters, and, only on the ranks
    that read them, for values that are not finite.
    """
    adapter = read_adapter(folder)
    parameters = adapter_parameters(model)
    _check_shapes(adapter, {name: tuple(p.shape) for name, p in parameters.items()})
    scaling = next(m.scaling for m in model.modules() if isinstance(m, LoraLinear))
    if not math.isclose(adapter.settings.scaling, scaling):
        raise UserError(
            f"{folder / CONFIG}: r, lora_alpha and use_rslora make a scaling of "
            f"{adapter.settings.scaling:g}, expected {scaling:g} by model.lora"
        )
    with safe_open(adapter.file, framework="pt") as handle:
        for name, parameter in parameters.items():
            local, rows = local_rows(parameter)
            local.copy_(handle.get_slice(_peft_name(name))[rows])
            if not local.isfinite().all():
                raise UserError(
                    f"{adapter.file}: tensor {_peft_name(name)} holds NaN or infinite values; "
                    "expected finite ones"
                )


def _check_shapes(adapter: Adapter, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError unless the adapter's parameters are the expected ones."""
    for name in sorted({*expected, *adapter.shapes}):
        found, wanted = adapter.shapes.get(name), expected.get(name)
        if found == wanted:
            continue
        if found is None:
            problem = f"is missing; expected shape {wanted}"
        elif wanted is None:
            problem = "belongs to no adapted linear layer of the model"
        else:
            problem = f"has shape {found}, expected {wanted}"
        raise UserError(
            f"{adapter.file}: tensor {_peft_name(name)} {problem}: was the adapter made for "
            "another base or other target modules?"
        )


def check_fits(adapter: Adapter, shape: ModelShape) -> set[str]:
    """The layers that the adapter changes in a base of this shape.

    Raises UserError when it was made for another base.
    """
    with torch.device("meta"):
        model = MistralForCausalLM(shape)
    weights = {name: p.shape for name, p in model.named_parameters()}
    layers = {name.rsplit(".", 1)[0] for name in adapter.shapes}
    expected = {}
    for layer in layers:
        if len(rows_columns := weights.get(f"{layer}.weight", ())) == 2:
            expected[f"{layer}.lora_A"] = (adapter.settings.rank, rows_columns[1])
            expected[f"{layer}.lora_B"] = (rows_columns[0], adapter.settings.rank)
    _check_shapes(adapter, expected)
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

    base_name: path or hub id of the base, which PEFT looks up. Raises OSError or SafetensorError
    when the files cannot be written.
    """
    targets = settings.target_modules
    if targets == ALL_LINEAR:  # by name: not every reader of these files knows the short form
        targets = sorted({key.split(".")[-3] for key in tensors})
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
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


def export_adapter(
    folder: Path, model: nn.Module, settings: LoraSettings, *, base_name: str, base: Path
) -> None:
    """Write a trained model's `folder`: adapter/, and with `settings.merge` the merged model too.

    base_name: path or hub id of the base, for PEFT; base: its folder, whose tokenizer is copied.
    The folder appears only when it is complete. Collective. Raises UserError, on every rank, when
    it cannot be written.
    """
    tensors = adapter_tensors(model)
    with agreed():
        if dist.get_rank() == 0:
            for left in folder.parent.glob(f"{PARTIAL}*-{folder.name}"):  # of a killed export
                shutil.rmtree(left, ignore_errors=True)
            with _complete_folder(folder) as partial:
                save_adapter(partial / "adapter", tensors, settings, base_name)
                copy_tokenizer(base, partial / "adapter")
                if settings.merge:
                    _write_merged(partial, base, partial / "adapter")


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write the base with the adapter added to its weights as a Hugging Face folder.

    Each sum W + scaling * B A is computed in float32 and rounded once, to W's dtype in the base's
    file; everything else is copied unchanged. The tokenizer is the adapter's if its folder has one.
    `out` must not exist and appears only when it is complete. Memory: a few float32 copies of one
    weight. Not collective: one process calls it. Raises UserError when either folder is unusable,
    the adapter was made for another base, or `out` cannot be written.
    """
    if out.exists():
        raise UserError(f"{out}: exists already; give a folder that does not")
    with _complete_folder(out) as partial:
        _write_merged(partial, base, adapter)


@contextmanager
def _complete_folder(path: Path) -> Iterator[Path]:
    """`new_folder`, with a UserError when the file system refuses."""
    try:
        with new_folder(path) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from None


def _write_merged(folder: Path, base: Path, adapter: Path) -> None:
    """Write the files of the merged model into an existing folder."""
    opened = read_adapter(adapter)
    base, shape = open_model(str(base))
    layers = check_fits(opened, shape)
    stored = stored_tensors(base)
    for file in sorted({tensor.file for tensor in stored.values()}):
        here = [layer for layer in layers if stored[f"{layer}.weight"].file == file]
        shutil.copyfile(file, folder / file.name)
        _add_products(file, folder / file.name, opened, here)
    for name in ("config.json", INDEX):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    _copy_tokenizer(base, adapter, folder)


def _add_products(source: Path, target: Path, adapter: Adapter, layers: Sequence[str]) -> None:
    """Overwrite the layers' weights in `target`, a copy of `source`, with their sums with B A.

    Neither shape nor dtype changes, so each sum takes its weight's place. A safetensors file is the
    header's length (8 bytes, little-endian), the header (JSON) and the tensors' bytes; offsets
    count from the header's end.
    """
    with (
        safe_open(source, framework="pt") as weights,
        safe_open(adapter.file, framework="pt") as products,
        target.open("r+b") as handle,
    ):
        length = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(length))
        for layer in layers:
            a, b = (
                products.get_tensor(_peft_name(f"{layer}.{matrix}")).float()
                for matrix in ("lora_A", "lora_B")
            )
            weight = weights.get_tensor(f"{layer}.weight")
            summed = torch.addmm(weight.float(), b, a, alpha=adapter.settings.scaling)
            merged = summed.to(weight.dtype)
            if not merged.isfinite().all():
                raise UserError(
                    f"{adapter.file}: with it, {layer}.weight holds NaN or infinite values; "
                    "expected finite ones"
                )
            start, _ = header[f"{layer}.weight"]["data_offsets"]
            handle.seek(8 + length + start)
            handle.write(merged.view(torch.uint8).numpy())


def tokenizer_folder(base: Path, adapter: Path) -> Path:
    """The folder of the tokenizer that the adapter was trained with.

    Trainers put it into the adapter's folder when it has its own chat template.
    """
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def _copy_tokenizer(base: Path, adapter: Path, out: Path) -> None:
    """Copy the tokenizer's files from one of the two folders, never a mixture of both."""
    copy_tokenizer(base, out)
    if tokenizer_folder(base, adapter) == adapter:
        for name in TOKENIZER_FILES:
            if name != "generation_config.json":
                (out / name).unlink(missing_ok=True)
        copy_tokenizer(adapter, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m notus.model.peft", description="Adapters.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="add an adapter to its base's weights")
    command.add_argument("base", metavar="BASE", help="model folder or hub id")
    command.add_argument("adapter", metavar="ADAPTER", help="PEFT folder")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write, not there yet")
    options = parser.parse_args(arguments)
    try:
        merge(model_folder(options.base), model_folder(options.adapter), options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
