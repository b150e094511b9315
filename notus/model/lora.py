"""Low-rank adapters, in the file format of Hugging Face's PEFT.

LoRA, arXiv 2106.09685: a frozen linear layer W gains a trained product of two thin matrices,

    y = W x + scaling * B A dropout(x),    A [rank, in], B [out, rank], scaling = alpha / rank,

with B = 0 at first, so that training begins at the base model. rsLoRA, arXiv 2312.03732, scales by
alpha / sqrt(rank) instead, so that a high rank learns as fast as a low one.

Base weights keep their names: a Hugging Face folder still loads without a rename. Switched off, the
adapters leave exactly the base model, which is therefore the reference without a second copy.

    python -m notus.model.lora merge BASE ADAPTER OUT
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from notus.errors import UserError
from notus.model.mistral import MistralForCausalLM, ModelShape, read_entry, read_object
from notus.model.weights import (
    INDEX,
    TOKENIZER_FILES,
    copy_tokenizer,
    local_rows,
    model_folder,
    open_model,
    stored_tensors,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraSettings:
    """Where the adapters sit and how strong they are.

    dropout: probability that an entry of an adapter's input is dropped, in training alone.
    target_modules: names, or ends of names from a dot on, of linear layers ("q_proj",
    "mlp.up_proj"); or "all-linear" for all of the blocks', not the output head.
    rslora: scale by alpha / sqrt(rank).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = ALL_LINEAR
    rslora: bool = False

    @property
    def scaling(self) -> float:
        """The factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


# What PEFT calls the settings.
PEFT_KEYS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "rslora": "use_rslora",
}


def check_settings(
    settings: LoraSettings, key_of: Callable[[str], str] = "model.lora.{}".format
) -> None:
    """Raise UserError for a value that no adapter can have.

    key_of: what the message calls a field; by default its key in the configuration.
    """
    targets = settings.target_modules
    names = targets == ALL_LINEAR or (
        isinstance(targets, tuple) and targets and all(isinstance(name, str) for name in targets)
    )
    number = (int, float)
    valid = {
        "rank": (type(settings.rank) is int and settings.rank >= 1, "an integer of at least 1"),
        "alpha": (
            type(settings.alpha) in number and 0 < settings.alpha < math.inf,
            "a number above 0",
        ),
        "dropout": (
            type(settings.dropout) in number and 0 <= settings.dropout < 1,
            "a number of at least 0 and below 1",
        ),
        "target_modules": (names, f'names of linear layers or "{ALL_LINEAR}"'),
        "rslora": (type(settings.rslora) is bool, "true or false"),
    }
    for field, (ok, expected) in valid.items():
        if not ok:
            found = json.dumps(getattr(settings, field))
            raise UserError(f"{key_of(field)} is {found}, expected {expected}")


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. `weight` and `bias` are those of the layer it replaces."""

    def __init__(self, linear: nn.Linear, settings: LoraSettings) -> None:
        inner, outer, device = linear.in_features, linear.out_features, linear.weight.device
        super().__init__(inner, outer, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        options = {"dtype": torch.float32, "device": device}
        self.lora_A = nn.Parameter(torch.zeros(settings.rank, inner, **options))
        self.lora_B = nn.Parameter(torch.zeros(outer, settings.rank, **options))
        self.scaling = settings.scaling
        self.dropout = settings.dropout
        self.adapter_on = True

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of `input`.

        The product with the adapter is computed in the adapter's dtype as this finds it: float32 as
        it is stored (what PEFT does), FSDP's compute dtype where that has gathered it; the sum is
        rounded once. The factor is applied where a row has only `rank` entries.
        """
        base = super().forward(input)
        if not self.adapter_on:
            return base
        dropped = F.dropout(input, self.dropout, self.training).to(self.lora_A.dtype)
        thin = self.scaling * F.linear(dropped, self.lora_A)
        return (base + F.linear(thin, self.lora_B)).to(base.dtype)


def add_adapters(model: MistralForCausalLM, settings: LoraSettings) -> None:
    """Give the chosen linear layers an adapter, in place, and freeze everything else.

    For a model on any device that is not sharded yet. The base keeps its dtype (call
    `model.to(torch.bfloat16)` first to hold it in 2 bytes); adapters are float32, zero until
    `initialize_adapters` or `load_adapter`. Raises UserError for settings that cannot be, and for
    a target that names no linear layer, with the names there are.
    """
    check_settings(settings)
    linears = {n: module for n, module in model.named_modules() if type(module) is nn.Linear}
    chosen = _chosen(linears, settings.target_modules)
    model.requires_grad_(False)
    for name in chosen:
        model.set_submodule(name, LoraLinear(linears[name], settings))


def _chosen(linears: Iterable[str], targets: tuple[str, ...] | str) -> list[str]:
    """The layers that `targets` mean; a target means all whose name is or ends in it."""
    if targets == ALL_LINEAR:
        return list(linears)
    for target in targets:
        if not any(_ends_in(name, target) for name in linears):
            there = dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears)
            raise UserError(
                f"model.lora.target_modules: {json.dumps(target)} names no linear layer of the "
                f'blocks, expected some of {", ".join(there)}, or "{ALL_LINEAR}"'
            )
    return [name for name in linears if any(_ends_in(name, target) for target in targets)]


def _ends_in(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name, all that is trained: "model.layers.0...q_proj.lora_A"."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith((".lora_A", ".lora_B"))
    }


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model, to the bit: inside, no adapter is computed and no dropout drawn."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    before = [layer.adapter_on for layer in layers]
    for layer in layers:
        layer.adapter_on = False
    try:
        yield
    finally:
        for layer, on in zip(layers, before, strict=True):
            layer.adapter_on = on


@torch.no_grad()
def initialize_adapters(model: nn.Module, seed: int) -> None:
    """PEFT's start: A uniform in +-1 / sqrt(in) (He's with a = sqrt(5)), B = 0.

    A value depends on `seed` and the parameter's name alone: not on the number of ranks, nor on
    which other layers have an adapter. Parameters may be plain or sharded along their first
    dimension; each rank draws all of an A and keeps its rows.
    """
    for name, parameter in adapter_parameters(model).items():
        local, rows = local_rows(parameter)
        whole = torch.zeros(parameter.shape, dtype=torch.float32)
        if name.endswith(".lora_A"):
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        local.copy_(whole[rows])


def save_adapter(
    folder: Path, model: nn.Module, settings: LoraSettings, base_name: str | None
) -> None:
    """Write the adapters as a PEFT folder, float32; it has its name once it is whole.

    folder: must not exist yet. base_name: path or hub id of the base, which PEFT looks up.
    Collective where parameters are sharded; the first rank writes.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    tensors = {}
    for name, parameter in adapter_parameters(model).items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if first:
            tensors[_peft_name(name)] = whole.detach().cpu().contiguous()
        del whole
    if first:
        partial = folder.with_name(f".partial-{folder.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        config = _peft_config(model, settings, base_name)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        os.rename(partial, folder)
    if dist.is_initialized():
        dist.barrier()


def _peft_config(model: nn.Module, settings: LoraSettings, base_name: str | None) -> dict[str, Any]:
    """adapter_config.json; what is left out has PEFT's default."""
    targets = settings.target_modules
    if targets == ALL_LINEAR:  # by name: not every reader of these files knows the short form
        layers = (n for n, module in model.named_modules() if isinstance(module, LoraLinear))
        targets = sorted({name.rsplit(".", 1)[-1] for name in layers})
    return {
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


class Adapter(NamedTuple):
    """A PEFT folder, from its configuration and the header of its weights."""

    settings: LoraSettings
    base_name: str | None
    file: Path
    shapes: dict[str, tuple[int, ...]]  # by our name of the parameter


# Entries of adapter_config.json that are read here or change no result. Any other that is set
# (use_dora, modules_to_save, rank_pattern, whatever PEFT adds next) stands for something that this
# decoder does not compute. Which layers were chosen, and how, is seen from the weights.
KNOWN_KEYS = {
    *PEFT_KEYS.values(),
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
# Ways to begin that leave the base as it was. The others (PiSSA, OLoRA, ...) change its weights.
KNOWN_STARTS = (True, False, "gaussian", "orthogonal", "eva")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """What a PEFT folder holds.

    Raises UserError for missing or damaged files, a setting that changes the result in a way this
    decoder does not compute, and weights that do not fit the settings.
    """
    path = folder / CONFIG
    config = read_object(path, "the folder of an adapter")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f'{path}: peft_type is {json.dumps(kind)}, expected "LORA"')
    if config.get("init_lora_weights", True) not in KNOWN_STARTS:
        raise UserError(
            f"{path}: init_lora_weights is {json.dumps(config['init_lora_weights'])}, which "
            "changes the base's weights; expected an adapter that leaves them as they were"
        )
    for key in sorted(config.keys() - KNOWN_KEYS - {"init_lora_weights"}):
        if config[key] and not (key == "bias" and config[key] == "none"):
            raise UserError(
                f"{path}: {key} is {json.dumps(config[key])}, which is not supported; expected "
                "plain LoRA of linear layers, with this entry unset"
            )
    file = folder / WEIGHTS
    shapes = _read_shapes(file)
    layers = {name.rsplit(".", 1)[0] for name in shapes}
    targets = config.get("target_modules")
    narrowed = config.get("exclude_modules") or config.get("layers_to_transform") is not None
    by_name = isinstance(targets, list) and not narrowed
    settings = LoraSettings(
        rank=read_entry(config, "r", path),
        alpha=read_entry(config, "lora_alpha", path),
        dropout=config.get("lora_dropout", 0.0),
        target_modules=tuple(targets if by_name else sorted(layers)),
        rslora=config.get("use_rslora", False),
    )
    check_settings(settings, lambda field: f"{path}: {PEFT_KEYS[field]}")
    for name, shape in shapes.items():
        rank = shape[0 if name.endswith("A") else -1]
        if len(shape) != 2 or rank != settings.rank:
            raise UserError(
                f"{file}: tensor {_peft_name(name)} has shape {shape}, expected two dimensions of "
                f"which one is the rank, {settings.rank} by {CONFIG}"
            )
    return Adapter(settings, config.get("base_model_name_or_path"), file, shapes)


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter in an adapter's file, by our name; every A has its B."""
    if not file.is_file():
        raise UserError(f"{file.parent}: no {WEIGHTS}; expected the adapter's weights under it")
    try:
        with safe_open(file, framework="pt") as handle:
            stored = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}
    except SafetensorError as error:
        raise UserError(
            f"{file}: found no complete safetensors file ({error}); expected one, so copy or "
            "download it anew"
        ) from None
    shapes = {}
    for key, shape in stored.items():
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
    file's names, shapes or scaling are not those of the model's adapters, and, on the ranks that
    meet it alone, for values that are not finite.
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
    advice = "was the adapter made for another base or other target modules?"
    for name in sorted({*expected, *adapter.shapes}):
        peft_name, shape = _peft_name(name), adapter.shapes.get(name)
        if shape is None:
            raise UserError(
                f"{adapter.file}: tensor {peft_name} is missing; expected shape {expected[name]}: "
                f"{advice}"
            )
        if name not in expected:
            raise UserError(
                f"{adapter.file}: tensor {peft_name} belongs to no adapted linear layer of the "
                f"model: {advice}"
            )
        if shape != expected[name]:
            raise UserError(
                f"{adapter.file}: tensor {peft_name} has shape {shape}, expected {expected[name]}: "
                f"{advice}"
            )


def check_fits(adapter: Adapter, shape: ModelShape) -> set[str]:
    """The layers that the adapter changes in a base of this shape.

    Raises UserError when it was made for another.
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


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write the base with the adapter added to its weights as a Hugging Face folder.

    Each sum W + scaling * B A is made in float32 and rounded once, to W's dtype in the base's
    file; everything else is copied as it stands. The tokenizer is the adapter's where its folder
    brings one. `out` must not exist; it has its name once it is whole, and nothing is left behind
    when that fails. Memory: a few float32 copies of one weight. Not collective: one process
    calls it. Raises UserError when either folder is unusable, or the adapter was made for another
    base.
    """
    opened = read_adapter(adapter)
    base, shape = open_model(str(base))
    layers = check_fits(opened, shape)
    if out.exists():
        raise UserError(f"{out}: exists already; give a folder that does not")
    partial = out.with_name(f".partial-{out.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stored = stored_tensors(base)
        for file in sorted({tensor.file for tensor in stored.values()}):
            here = [layer for layer in layers if stored[f"{layer}.weight"].file == file]
            shutil.copyfile(file, partial / file.name)
            _add_products(file, partial / file.name, opened, here)
        for name in ("config.json", INDEX):
            if (base / name).is_file():
                shutil.copyfile(base / name, partial / name)
        _copy_tokenizer(base, adapter, partial)
        os.rename(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_adapter(
    folder: Path,
    model: nn.Module,
    settings: LoraSettings,
    *,
    base_name: str,
    base: Path,
    merged: bool,
) -> None:
    """Write a trained model's `folder`: adapter/, and with `merged` the whole model beside it.

    base_name: what the base was called, for PEFT; base: its folder, whose tokenizer is copied. The
    folder has its name once it is whole. Collective. Raises UserError, on the first rank alone,
    when it cannot be written.
    """
    adapter, partial = (folder.with_name(f".partial-{name}") for name in ("adapter", folder.name))
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
    save_adapter(adapter, model, settings, base_name)
    if first:
        copy_tokenizer(base, adapter)
        if merged:
            merge(base, adapter, partial)
        else:
            partial.mkdir()
        os.rename(adapter, partial / "adapter")
        os.rename(partial, folder)


def _add_products(source: Path, target: Path, adapter: Adapter, layers: Sequence[str]) -> None:
    """Overwrite the layers' weights in `target`, a copy of `source`, by their sums with B A.

    Neither shape nor dtype changes, so each sum goes where its weight is. A safetensors file is the
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
    """Where the tokenizer is that the adapter was trained with.

    Trainers put it beside the adapter when it has a chat template of its own.
    """
    return adapter if (adapter / "tokenizer_config.json").is_file() else base


def _copy_tokenizer(base: Path, adapter: Path, out: Path) -> None:
    """The tokenizer's files from one of the two folders, never a mixture of both."""
    copy_tokenizer(base, out)
    if tokenizer_folder(base, adapter) == adapter:
        for name in TOKENIZER_FILES:
            if name != "generation_config.json":
                (out / name).unlink(missing_ok=True)
        copy_tokenizer(adapter, out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m notus.model.lora", description="Adapters.")
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
