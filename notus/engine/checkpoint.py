"""Checkpoints on disk: what they hold, how they are found and checked, and how they are loaded.

    checkpoints/step-00000500/
        model-0000r-of-0000W.safetensors      float32 masters; the folder loads with transformers
        model.safetensors.index.json, config.json, tokenizer files
        optimizer-0000r-of-0000W.safetensors  state tensors, named "<state>/<parameter>"
        optimizer.safetensors.index.json
        reference-*                           the reference, if it follows the policy (TR-DPO)
        state.json                            the run's progress, and what a resumed one must share
        manifest.json                         size and SHA-256 of every file, written last

Only trained parameters are stored. With a frozen base they are not a model, and nothing must take
the folder for one: it then has adapter-*.safetensors with their own index, and neither config.json
nor tokenizer. No random state is stored: random numbers are drawn again from the seed and the step.

A folder named step-* is complete (saver.py) unless it was damaged later. A resumed run takes the
newest checkpoint whose files match the manifest, and names those that it passes over. All ranks
need the same output_dir, on a shared file system.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.optim import Optimizer

from notus.engine.metrics import Progress
from notus.errors import UserError
from notus.files import Plain, write_whole, writing
from notus.model.mistral import MistralForCausalLM
from notus.model.weights import Shape, check_shapes, header_shapes, read_rows

MANIFEST = "manifest.json"
STATE = "state.json"
# Prefixes of the files with trained parameters: those of a complete model, or next to a frozen base
MODEL, ADAPTER = "model", "adapter"


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(root: Path, upto: int = 99_999_999) -> list[Path]:
    """The complete checkpoints under `root` of steps up to `upto`, oldest first."""
    found = root.glob("step-" + "[0-9]" * 8)  # no copies under other names, which are the user's
    return sorted(path for path in found if path.name <= checkpoint_name(upto))


def find_checkpoint(root: Path, resume: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that --resume names: "auto" (the newest sound one), "never", or a path.

    say: prints a line about each damaged one that is passed over. Collective. Raises UserError, on
    every rank, when a path is no sound checkpoint, or when there are some and all are damaged.
    """
    if resume == "never":
        return None
    if resume != "auto":
        check_sound(Path(resume))
        return Path(resume)
    # One listing for all: a shared file system may show the ranks different ones.
    listed = [checkpoints(root)]
    dist.broadcast_object_list(listed, 0)
    for folder in reversed(listed[0]):
        problem = damage(folder)
        if problem is None:
            return folder
        say(f"passed over the damaged checkpoint {folder.name}: {problem}")
    if listed[0]:
        raise UserError(
            f"{problem}; no sound checkpoint is left in {root}: restore one, or start anew in "
            "another output_dir"
        )
    return None


def check_sound(folder: Path) -> None:
    """Raise UserError, on every rank, when `folder` is not an undamaged checkpoint.

    Collective: the ranks read different files.
    """
    if not (folder / STATE).is_file() and not (folder / MANIFEST).is_file():
        raise UserError(
            f"--resume {folder}: no {MANIFEST} there; expected auto, never, or the folder of a "
            "complete checkpoint, such as checkpoints/step-00000500 in an output_dir"
        )
    problem = damage(folder)
    if problem is not None:
        raise UserError(f"--resume {folder}: the checkpoint is damaged: {problem}")


def read_state(folder: Path) -> Plain:
    """The contents of a sound checkpoint's state.json."""
    return json.loads((folder / STATE).read_text())


def newest_state(root: Path) -> tuple[Path, Plain] | None:
    """The newest checkpoint whose state.json is the one that was written, and its contents."""
    for folder in reversed(checkpoints(root)):
        try:
            written = json.loads((folder / MANIFEST).read_text())["files"][STATE]["sha256"]
            if sha256(folder / STATE) == written:
                return folder, read_state(folder)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return None


def checkpoint_identity(folder: Path) -> dict[str, str]:
    """The identity of a sound checkpoint's weights, from its manifest: {"path", "sha256"}."""
    files = json.loads((folder / MANIFEST).read_text())["files"]
    hashes = {
        name: about["sha256"]
        for name, about in files.items()
        if name.startswith((f"{MODEL}-", f"{ADAPTER}-"))
    }
    digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
    return {"path": str(folder.resolve()), "sha256": digest}


def load_checkpoint(
    folder: Path,
    model: MistralForCausalLM,
    optimizer: Optimizer,
    reference: MistralForCausalLM | None,
) -> Progress:
    """Restore what `Saver.save` was given, each rank its own slices, on any number of ranks.

    The folder must be sound, and `resume.check_checkpoint` must have accepted it.
    """
    state = read_state(folder)
    _load_tensors(folder, weights_prefix(model), dict(trained_parameters(model)))
    if reference is not None:
        _load_tensors(folder, "reference", dict(reference.named_parameters()))
    _load_optimizer(folder, model, optimizer, state["updates"])
    return Progress(state["step"], state["totals"], state["skipped"])


def load_trained(folder: Path, model: MistralForCausalLM) -> None:
    """Fill the trained parameters from a checkpoint of another run, each rank its slices.

    Raises UserError when these are not the tensors that it holds.
    """
    prefix = next((p for p in (MODEL, ADAPTER) if index_file(folder, p).is_file()), None)
    if prefix is None:
        raise UserError(f"{folder}: no longer there; this run starts with its weights")
    found: dict[str, Shape] = {}
    for file in folder.glob(f"{prefix}-*.safetensors"):
        found |= header_shapes(file)
    tensors = dict(trained_parameters(model))
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(folder, found, expected, "as this run trains")
    _load_tensors(folder, prefix, tensors)


def trained_parameters(model: MistralForCausalLM) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def weights_prefix(model: MistralForCausalLM) -> str:
    return MODEL if all(p.requires_grad for p in model.parameters()) else ADAPTER


def index_file(folder: Path, prefix: str) -> Path:
    return folder / f"{prefix}.safetensors.index.json"


def _read_files(folder: Path, prefix: str) -> dict[str, str]:
    """The file of each tensor, from the index."""
    return json.loads(index_file(folder, prefix).read_text())["weight_map"]


def _load_tensors(folder: Path, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Fill plain or sharded tensors, each rank its own rows."""
    files = _read_files(folder, prefix)
    for name, tensor in tensors.items():
        read_rows(tensor, folder / files[name], name)


def _load_optimizer(
    folder: Path, model: MistralForCausalLM, optimizer: Optimizer, updates: int
) -> None:
    if updates == 0:
        return
    for _, parameter in trained_parameters(model):
        # Fused optimisers keep the step on the device, the others on the host.
        device = parameter.device if optimizer.defaults.get("fused") else "cpu"
        optimizer.state[parameter]["step"] = torch.tensor(float(updates), device=device)
    for tensor_name, file in _read_files(folder, "optimizer").items():
        key, name = tensor_name.split("/", 1)
        parameter = model.get_parameter(name)
        with safe_open(folder / file, framework="pt") as handle:
            dtype = handle.get_slice(tensor_name)[:0].dtype
        tensor = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        optimizer.state[parameter][key] = tensor
        read_rows(tensor, folder / file, tensor_name)


def render_manifest(files: Plain) -> str:
    """The text of the manifest, which holds a checksum of itself.

    files: {"bytes", "sha256"} by name.
    """
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": digest}, indent=2) + "\n"


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Add a manifest of an exported model's weights, the adapters' too.

    Other files are the user's to edit. Raises UserError when it cannot be written.
    """
    with writing(folder):
        weights = sorted(folder.rglob("*.safetensors"))
        files = {path.relative_to(folder).as_posix(): entry(path) for path in weights}
        write_whole(folder / MANIFEST, render_manifest(files), durable=True)


def entry(path: Path) -> Plain:
    """The file's entry in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def damage(folder: Path) -> str | None:
    """The first difference from the manifest, the same on every rank, or None. Collective."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, _own_damage(folder))
    return next((problem for problem in found if problem is not None), None)


def _own_damage(folder: Path) -> str | None:
    """The first damage among this rank's share of the files."""
    try:
        text = (folder / MANIFEST).read_text()
        files = json.loads(text)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder / MANIFEST}: missing or not valid JSON"
    if text != render_manifest(files):
        return f"{folder / MANIFEST}: its contents are not those that were written"
    for name in sorted(files)[dist.get_rank() :: dist.get_world_size()]:
        path, expected = folder / name, files[name]
        try:
            if (size := path.stat().st_size) != expected["bytes"]:
                return f"{path}: found {size} bytes, expected {expected['bytes']}"
            if sha256(path) != expected["sha256"]:
                return f"{path}: its contents are not those that were written"
        except OSError as error:  # it is gone, or of a bad disk
            return f"{path}: {error.strerror}"
    return None
