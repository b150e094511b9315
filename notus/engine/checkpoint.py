"""Complete checkpoints in sharded safetensors, and the final export.

    checkpoints/step-00000500/
        model-0000r-of-0000W.safetensors      float32 masters; the folder loads with transformers
        model.safetensors.index.json, config.json, tokenizer files
        optimizer-0000r-of-0000W.safetensors  state tensors, named "<state>/<parameter>"
        optimizer.safetensors.index.json
        reference-*                           the reference, if it follows the policy (TR-DPO)
        state.json                            step, and what a resumed run must have in common
        manifest.json                         size and SHA-256 of every file, written last

A folder has its final name only once everything in it is on disk, so every folder named step-* is
complete unless it was damaged later. All ranks need the same output_dir: a shared file system.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.optim import Optimizer

from notus.data.tokenization import TokenizedPairs
from notus.errors import UserError
from notus.model.mistral import MistralForCausalLM, ModelShape
from notus.model.weights import copy_tokenizer, local_rows, save_sharded

Plain = dict[str, Any]
Item = TypeVar("Item")


def save_checkpoint(
    root: Path,
    step: int,
    model: MistralForCausalLM,
    optimizer: Optimizer,
    reference: MistralForCausalLM | None,
    *,
    common: Mapping[str, Any],
    totals: Mapping[str, list[float]],
    source: Path,
    keep: int,
) -> None:
    """Write root/step-<step> from all ranks, then remove all but the newest `keep`.

    reference: one that changes during training. common: what a run that resumes from here must have
    in common with this one. totals: metrics summed since the last report. source: the folder whose
    config.json and tokenizer describe the model. Collective.
    """
    folder = root / f"step-{step:08d}"
    partial = root / f".partial-{folder.name}"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_model(partial, model, torch.float32, source)
    _save_tensors(partial, "optimizer", _optimizer_tensors(model, optimizer))
    if reference is not None:
        _save_tensors(partial, "reference", reference.named_parameters())
    if first:
        _write_json(
            partial / "state.json", {"step": step, "common": dict(common), "totals": totals}
        )
    _write_manifest(partial)
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
        _to_disk(root)
        for old in checkpoints(root)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def export(folder: Path, model: MistralForCausalLM, source: Path) -> None:
    """Write the finished model as a bfloat16 Hugging Face folder; it has its name once whole.

    Collective.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    save_model(partial, model, torch.bfloat16, source)
    if dist.get_rank() == 0:
        os.rename(partial, folder)
    dist.barrier()


def save_model(folder: Path, model: MistralForCausalLM, dtype: torch.dtype, source: Path) -> None:
    """Write the model as a Hugging Face folder in `dtype`: weights, index, config, tokenizer.

    The folder must exist. Collective: every rank writes its own whole tensors.
    """
    names = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    _save_tensors(folder, "model", ((name, tensor.to(dtype)) for name, tensor in names))
    if dist.get_rank() == 0:
        config = json.loads((source / "config.json").read_text())
        config.pop("torch_dtype", None)  # the key's name before transformers 5
        config["dtype"] = str(dtype).removeprefix("torch.")
        _write_json(folder / "config.json", config)
        copy_tokenizer(source, folder)
    dist.barrier()


# Settings that may change between a run and its continuation: none of them changes what is learnt.
FREE = (
    "output_dir",
    "parallel",
    "log",
    "checkpoint",
    "evaluation",
    "data.eval",
    "data.tokens_per_microbatch",
    "data.prefix_sharing",
    "reference.log_probs",
)
# Where things lie; a checkpoint holds the hashes of what they are instead.
PATHS = ("model.policy", "model.reference", "data.train")


def essence(settings: Plain, ignored: tuple[str, ...] = FREE) -> Plain:
    """The resolved configuration by dotted key, without the `ignored` sections and keys."""
    flat = {
        f"{section}.{key}" if isinstance(values, dict) else section: value
        for section, values in settings.items()
        for key, value in (values if isinstance(values, dict) else {section: values}).items()
    }
    return {
        key: value
        for key, value in flat.items()
        if key not in ignored and key.split(".")[0] not in ignored
    }


def check_output_dir(folder: Path, settings: Plain, resume: str) -> None:
    """Refuse an output_dir that holds anything but an earlier part of this same run.

    Raises UserError that names the first differing setting, or what was found there.
    """
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        found = "cannot be written to" if nearest.is_dir() else "is a file"
        raise UserError(f"output_dir: {folder} cannot be used: {nearest} {found}; give another one")
    if not folder.exists() or not any(folder.iterdir()):
        return
    advice = "give another output_dir or remove it"
    try:
        earlier = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        earlier = None
    if not isinstance(earlier, dict) or earlier.keys() != settings.keys():
        raise UserError(f"output_dir: {folder} is not empty and holds no run; {advice}")
    different = differences(essence(earlier), essence(settings))
    if different:
        raise UserError(f"output_dir: {folder} holds another run ({different}); {advice}")
    if resume == "never":
        raise UserError(f"output_dir: {folder} holds a run, and --resume is never; {advice}")


def write_settings(folder: Path, settings: Plain) -> None:
    """Create output_dir and write its config.json; rank 0 alone does it.

    Raises UserError on rank 0 when the folder cannot be made or written to.
    """
    if dist.get_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / "config.json", settings)
        except OSError as error:
            raise UserError(f"output_dir: {folder} cannot be written ({error.strerror})") from None


def check_shared(folder: Path) -> None:
    """Refuse an output_dir that rank 0 wrote to and this rank does not see."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"output_dir: rank {dist.get_rank()} does not see {folder.resolve()}/config.json, "
            "which rank 0 wrote; expected a folder on a file system that all machines share"
        )


def common_ground(
    settings: Plain,
    shape: ModelShape,
    pairs: TokenizedPairs,
    reference: Mapping[str, Any] | None,
    steps: int,
) -> Plain:
    """What a run and its continuation must share: settings, model, tokens, reference, steps."""
    return essence(settings, FREE + PATHS) | {
        "model_shape": asdict(shape),
        "tokens_sha256": pairs.fingerprint(),
        "reference_sha256": reference["sha256"] if reference else None,
        "steps": steps,
    }


# A hash tells a reader nothing but that something differs; this says what.
HASHED = {
    "tokens_sha256": "the training pairs' tokens differ (the data, its order or the tokenizer)",
    "reference_sha256": "the reference's weights differ",
}


def differences(before: Plain, now: Plain) -> str:
    """The first entries that differ, in words, and how many more do; empty if none do."""
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    words = [
        HASHED.get(key, f"{key} was {_short(before.get(key))} and is {_short(now.get(key))}")
        for key in keys[:3]
    ]
    return "; ".join([*words, f"and {len(keys) - 3} more"] if len(keys) > 3 else words)


def checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints under `root`, oldest first."""
    return sorted(root.glob("step-*"))


def find_checkpoint(root: Path, resume: str) -> Path | None:
    """The checkpoint that --resume names: "auto" (the newest, if any), "never", or a path.

    Raises UserError when a path is not a checkpoint.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return checkpoints(root)[-1] if checkpoints(root) else None
    if not (Path(resume) / "manifest.json").is_file():
        raise UserError(
            f"--resume {resume}: no manifest.json there; expected auto, never, or the folder of a "
            "complete checkpoint, such as checkpoints/step-00000500 in an output_dir"
        )
    return Path(resume)


def check_checkpoint(folder: Path, common: Mapping[str, Any]) -> None:
    """Raise UserError when the checkpoint is damaged, or made by a run that differs in `common`.

    Each rank reads a share of the files: what one finds, `agree` tells the others.
    """
    _verify(folder)
    state = json.loads((folder / "state.json").read_text())
    different = differences(state["common"], dict(common))
    if different:
        raise UserError(
            f"{folder}: made by another run ({different}); resume with the settings it was made "
            "with, or begin a new run in another output_dir"
        )


def load_checkpoint(
    folder: Path,
    model: MistralForCausalLM,
    optimizer: Optimizer,
    reference: MistralForCausalLM | None,
) -> tuple[int, dict[str, list[float]]]:
    """Restore what `save_checkpoint` was given, each rank its own slices.

    Returns the steps done and the metrics' totals. `check_checkpoint` must have passed the folder.
    """
    state = json.loads((folder / "state.json").read_text())
    _load_tensors(folder, "model", dict(model.named_parameters()))
    if reference is not None:
        _load_tensors(folder, "reference", dict(reference.named_parameters()))
    _load_optimizer(folder, model, optimizer, state["step"])
    return state["step"], state["totals"]


def _save_tensors(folder: Path, prefix: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    index = save_sharded(tensors, folder, prefix)
    if dist.get_rank() == 0:
        _write_json(folder / f"{prefix}.safetensors.index.json", index)
    dist.barrier()


@torch.no_grad()
def _load_tensors(folder: Path, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill plain or sharded tensors, each rank its own rows."""
    index = json.loads((folder / f"{prefix}.safetensors.index.json").read_text())
    for name, tensor in tensors.items():
        local, rows = local_rows(tensor)
        with safe_open(folder / index["weight_map"][name], framework="pt") as handle:
            local.copy_(handle.get_slice(name)[rows])


def _optimizer_tensors(
    model: MistralForCausalLM, optimizer: Optimizer
) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state, f"{name} has no optimiser state: is it the sharded parameter?"
        for key, value in sorted(state.items()):
            if key != "step":  # equal to the run's step, which state.json holds
                yield f"{key}/{name}", value


def _load_optimizer(
    folder: Path, model: MistralForCausalLM, optimizer: Optimizer, step: int
) -> None:
    index = json.loads((folder / "optimizer.safetensors.index.json").read_text())
    # Fused optimisers keep the step on the device, the others on the host.
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter in model.parameters():
        device = parameter.device if fused else "cpu"
        optimizer.state[parameter]["step"] = torch.tensor(float(step), device=device)
    tensors = {}
    for tensor_name in index["weight_map"]:
        key, name = tensor_name.split("/", 1)
        parameter = model.get_parameter(name)
        tensors[tensor_name] = torch.zeros_like(parameter, requires_grad=False)
        optimizer.state[parameter][key] = tensors[tensor_name]
    _load_tensors(folder, "optimizer", tensors)


def _write_json(path: Path, value: Plain) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_manifest(folder: Path) -> None:
    """Record every file's size and SHA-256, once its contents are on disk. Collective."""
    dist.barrier()
    own = {}
    for path in _own_share(sorted(folder.iterdir())):
        _to_disk(path)
        own[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    shares: list[Plain] = [{}] * dist.get_world_size()
    dist.all_gather_object(shares, own)
    if dist.get_rank() == 0:
        files = {name: about for share in shares for name, about in share.items()}
        _write_json(folder / "manifest.json", files)
        _to_disk(folder / "manifest.json")
        _to_disk(folder)


def _verify(folder: Path) -> None:
    """Compare this rank's share of the files with the manifest."""
    advice = f"the checkpoint is damaged: remove {folder} to resume from an earlier one"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{folder}/manifest.json: missing or not valid JSON; {advice}") from None
    for name in _own_share(sorted(manifest)):
        path, expected = folder / name, manifest[name]
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            found = "nothing" if size is None else f"{size} bytes"
            raise UserError(f"{path}: found {found}, expected {expected['bytes']} bytes; {advice}")
        if _sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: its contents are not those that were written; {advice}")


def _own_share(items: list[Item]) -> list[Item]:
    return items[dist.get_rank() :: dist.get_world_size()]


def _to_disk(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
