"""Hugging Face safetensors <-> a sharded model, tensor by tensor.

Names are kept; of a vision model's folder the decoder's tensors are read, without the prefix that
they have there. Loading reads only this rank's slices; saving divides unsharded tensors over the
ranks by bytes, so that every rank writes one file and none ever holds the entire model.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from notus.errors import UserError
from notus.files import read_object
from notus.masking import mask_text
from notus.model.hf_config import INDEX, SINGLE, ModelShape, read_shape
from notus.model.host_copies import HostCopies
from notus.model.hub import model_folder
from notus.model.mistral import MistralForCausalLM

DTYPES = ("F64", "F32", "BF16", "F16")  # safetensors' names of those that weights may have
# Buffers that old checkpoints carry; the decoder computes them.
IGNORED_SUFFIX = ".rotary_emb.inv_freq"
# Of a model with a vision tower: as published and as saved by transformers, and its modules' names.
DECODER_PREFIXES = (("language_model.", ""), ("model.language_model.", "model."))
VISION_PREFIXES = tuple(
    f"{prefix}{part}."
    for prefix in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector")
)

Shape = tuple[int, ...]


class Stored(NamedTuple):
    """A tensor's file, and its name and shape there."""

    file: Path
    name: str
    shape: Shape


def decoder_name(stored: str) -> str | None:
    """The decoder's name of a tensor in a file; None for one of a vision tower."""
    if stored.startswith(VISION_PREFIXES):
        return None
    for prefix, ours in DECODER_PREFIXES:
        if stored.startswith(prefix):
            return ours + stored.removeprefix(prefix)
    return stored


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's decoder by its name there, read only from the files' headers.

    Raises UserError for missing, truncated or unreadable files, and those of another folder.
    """
    if (folder / INDEX).is_file():
        files = read_object(folder / INDEX).get("weight_map")
        if not isinstance(files, dict):
            raise UserError(f'{folder / INDEX}: found no "weight_map", expected files by tensor')
        files = sorted({str(file) for file in files.values()})
    elif (folder / SINGLE).is_file():
        files = [SINGLE]
    else:
        raise UserError(f"{folder}: no {SINGLE} or {INDEX}; expected safetensors weights")
    tensors = {}
    for name in files:
        file = folder / name
        if "/" in name or not name.isprintable():
            raise UserError(f"{folder / INDEX}: found {name!r}, expected a file of this folder")
        for stored, shape in header_shapes(file).items():
            if (key := decoder_name(stored)) is not None:
                tensors[key] = Stored(file, stored, shape)
    return tensors


def header_shapes(file: Path) -> dict[str, Shape]:
    """The shape of every tensor in a safetensors file.

    Raises UserError if it is unreadable, and names a tensor that does not hold DTYPES.
    """
    try:
        file.open("rb").close()  # safetensors takes every refusal for a missing file
        with safe_open(file, framework="pt") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            dtypes = {name: found.get_dtype() for name, found in slices.items()}
            shapes = {name: tuple(found.get_shape()) for name, found in slices.items()}
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(
            f"{file}: found no complete safetensors file ({error}); expected one; copy or "
            "download it again"
        ) from None
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise UserError(
                f"{file}: tensor {name}: found {dtype}, expected one of {', '.join(DTYPES)}"
            )
    return shapes


def check_shapes(
    place: Path, found: Mapping[str, Shape], expected: Mapping[str, Shape], why: str
) -> None:
    """Raise UserError that names the first tensor which is missing, unknown or of another shape."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{place}: tensor {name}: found {found.get(name, 'none')}, expected "
                f"{expected.get(name, 'none')} {why}"
            )


def check_weights(
    folder: Path, expected: Mapping[str, torch.Size], tied: bool
) -> dict[str, Stored]:
    """The stored tensors, after a check that they are the expected ones in name and shape.

    expected: full shapes by name. tied: the head shares the embedding, and a stored
    `lm_head.weight` is redundant. Raises UserError that names folder, tensor and both shapes.
    """
    stored = stored_tensors(folder)
    ignored = (IGNORED_SUFFIX, "lm_head.weight") if tied else IGNORED_SUFFIX
    found = {n: t.shape for n, t in stored.items() if n in expected or not n.endswith(ignored)}
    check_shapes(folder, found, {n: tuple(s) for n, s in expected.items()}, "by config.json")
    return stored


def open_model(path: str, weights: bool = True) -> tuple[Path, ModelShape]:
    """The folder and shape of a model, local or on the hub, with its weights checked.

    weights: False if they are not needed. Then they are never downloaded, and checked only if a
    local folder holds some. Raises UserError when anything needed is missing or inconsistent.
    """
    folder = model_folder(path, weights)
    for place in (folder, folder / "adapter"):
        if not (folder / "config.json").is_file() and (place / "adapter_config.json").is_file():
            raise UserError(
                f"{place}: found an adapter, expected a complete model; merge it first: "
                f"python -m notus.model.peft merge BASE {place} OUT"
            )
    shape = read_shape(folder)
    if not weights and (folder != Path(path) or not any(folder.glob("*.safetensors"))):
        return folder, shape
    with torch.device("meta"):
        parameters = MistralForCausalLM(shape).named_parameters()
    check_weights(folder, {n: p.shape for n, p in parameters}, shape.tie_word_embeddings)
    return folder, shape


def load_weights(model: nn.Module, folder: Path, others: Collection[str] = ()) -> None:
    """Fill the model's parameters from a Hugging Face folder, each rank its own slices.

    Parameters may be plain or sharded along their first dimension; values are cast to their dtype.
    others: names of parameters that are not in the folder and stay unchanged. Raises UserError,
    only on the ranks that read them, for values that are not finite.
    """
    # A tied head appears once, as the embedding.
    parameters = {name: p for name, p in model.named_parameters() if name not in others}
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    stored = check_weights(folder, shapes, tied=model.shape.tie_word_embeddings)
    for name, parameter in parameters.items():
        file, key, _ = stored[name]
        if not read_rows(parameter, file, key).isfinite().all():
            raise UserError(
                f"{file}: tensor {key} holds NaN or infinite values; expected finite ones"
            )


@torch.no_grad()
def read_rows(tensor: Tensor, file: Path, name: str) -> Tensor:
    """Fill a plain or sharded tensor from a safetensors file; returns this rank's part of it."""
    local, rows = local_rows(tensor)
    with safe_open(file, framework="pt") as handle:
        return local.copy_(handle.get_slice(name)[rows])


def local_rows(tensor: Tensor) -> tuple[Tensor, slice]:
    """This rank's part of a tensor, and the rows of the full tensor that it holds."""
    if not isinstance(tensor, DTensor):
        return tensor, slice(0, len(tensor))
    mesh, placements = tensor.device_mesh, tensor.placements
    sharded = [dim for dim, placement in enumerate(placements) if placement.is_shard()]
    assert len(sharded) == 1 and placements[sharded[0]].dim == 0, placements
    ranks = mesh.size(sharded[0])
    chunk = -(-len(tensor) // ranks)  # as torch.chunk divides: the last ranks may get fewer
    start = min(chunk * mesh.get_local_rank(sharded[0]), len(tensor))
    local = tensor.to_local()
    return local, slice(start, start + len(local))


def hash_weights(path: str, folder: Path) -> dict[str, str]:
    """{"path", "sha256"} of a model: its path, masked, and the hash of its safetensors files.

    The ranks hash different files at the same time. Collective: all ranks must call it.
    """
    files = sorted({tensor.file for tensor in stored_tensors(folder).values()})
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    digests = torch.zeros(len(files), 32, dtype=torch.int64)
    for i in range(rank, len(files), ranks):
        with files[i].open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").digest()
        digests[i] = torch.tensor(list(digest))
    if dist.is_initialized():
        dist.all_reduce(digests)
    combined = hashlib.sha256(bytes(digests.flatten().tolist())).hexdigest()
    return {"path": mask_text(path), "sha256": combined}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file. Raises OSError, which names it, when the file system refuses."""
    path.touch()
    mode = path.stat().st_mode  # of a new file, by the umask; safetensors makes it the owner's only
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:  # what safetensors makes of an OSError, without the path
        raise OSError(0, str(error), str(path)) from None


def gather_own(
    tensors: Iterable[tuple[str, Tensor]], prefix: str
) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    """Divide full tensors over the ranks by bytes, and copy this rank's to the host.

    tensors: (name, plain or sharded tensor) in the same order on all ranks. A tensor belongs to
    the rank with the fewest bytes so far. Returns the Hugging Face index, equal on all ranks, the
    name of this rank's file, and the copies that belong in it. Collective. Memory: the copies on
    the host, and two full tensors at a time on the device.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    given = [0] * ranks
    weight_map = {}
    own = {}
    copies = HostCopies()
    for name, tensor in tensors:
        owner = given.index(min(given))
        given[owner] += tensor.numel() * tensor.element_size()
        weight_map[name] = f"{prefix}-{owner + 1:05d}-of-{ranks:05d}.safetensors"
        full = tensor.detach()
        full = full.full_tensor() if isinstance(full, DTensor) else full
        if owner == rank:
            own[name] = copies.add(full)
        del full
    copies.wait()
    index = {"metadata": {"total_size": sum(given)}, "weight_map": weight_map}
    return index, f"{prefix}-{rank + 1:05d}-of-{ranks:05d}.safetensors", own
