"""The reference's log-probs kept on disk: computed in one pass, checked whenever they are read.

They depend on the reference's weights, the token ids and the numerics, and on nothing else: not on
the loss, beta or learning rate. These three are a cache's identity, which is recorded next to it
with the SHA-256 of the file. A file that is not the one written is named and computed again.

Runs share a folder of caches. Of those that need the same one at the same time, the first computes
it and the others wait. The parts of an unfinished pass are in the folder of the run that makes it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from notus.data.token_arrays import TokenizedPairs
from notus.errors import UserError, agreed
from notus.files import PARTIAL, write_json, write_whole
from notus.model.hf_config import ModelShape
from notus.objective.logprobs import gather_pairs, response_sums
from notus.objective.reference import OnlineReference
from notus.objective.rounding import compare
from notus.objective.turns import Turn

AUDITED_SHARE = 0.01
SEAL = 32  # bytes
PART = 4096  # pairs scored between two writes to disk: minutes of a 7B model on one GPU


class Progress(Protocol):
    """A progress display."""

    def update(self, steps: int) -> object: ...

    def close(self) -> object: ...


def cache_identity(
    pairs: TokenizedPairs,
    reference: Mapping[str, str],
    shape: ModelShape,
    compute_dtype: torch.dtype,
    prefix_sharing: bool = True,
) -> dict[str, Any]:
    """The inputs of log-probs: caches of one identity are equal up to rounding.

    Without prefix sharing the roundings are others: a policy with the reference's weights would not
    start at rewards of exactly 0 if it read another run's log-probs with it.
    """
    identity = {
        "reference_sha256": reference["sha256"],
        "reference_shape": asdict(shape),
        "tokens_sha256": pairs.fingerprint(),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
    }
    return identity if prefix_sharing else identity | {"prefix_sharing": False}


def cached_log_probs(
    folder: Path,
    own: Path,
    identity: Mapping[str, Any],
    online: OnlineReference,
    show: Callable[[int, int], Progress] | None = None,
    say: Callable[[str], object] = print,
    after_part: Callable[[], object] = lambda: None,
) -> Tensor:
    """The log-probs of all response tokens of `online.pairs`: float32, flat, on every rank.

    They are read from `folder`, or from `own`, if there is a sound cache of this identity, and a
    sample is recomputed. Otherwise they are computed and written to `folder`; an interrupted pass
    repeats only its last part. Only rank 0 reads and writes files. own: the run's own folder, in
    which earlier versions kept their caches, and which has the parts of an unfinished pass. show:
    makes the progress display of a pass from the number of pairs and of those already done. say:
    prints the outcome of the audit, which files are damaged, and whether another run is waited
    for. after_part: is called on every rank when a part has been written, and while waiting; it may
    raise the same there. Collective.

    Raises UserError, on all ranks, if the sample differs from the file by more than rounding, or
    if the file system refuses to read or write.
    """
    path = folder / f"{_key(identity)}.safetensors"
    found = _find(path, own, identity, online, lambda words: None)
    if found is None:
        with _agreed_on_files(path):
            if dist.get_rank() == 0:
                folder.mkdir(parents=True, exist_ok=True)
        with Turn(path.with_suffix(".lock")) as turn:
            turn.wait(say, after_part)
            found = _find(path, own, identity, online, say)  # another run may have made it
            if found is None:
                parts = own / f"{path.stem}.parts"
                flat = _score_in_parts(parts, identity, online, show, say, after_part)
                with _agreed_on_files(path):
                    if dist.get_rank() == 0:
                        _write(path, own, flat, online.pairs, identity, turn.held)
                        turn.finish()
                return flat
    path, flat = found
    words = _audit(path, flat, len(online.pairs), identity, online)
    say(f"reference log-probs read from {path}, no pass: in a sample computed again, {words}")
    return flat


def _find(
    path: Path,
    own: Path,
    identity: Mapping[str, Any],
    online: OnlineReference,
    say: Callable[[str], object],
) -> tuple[Path, Tensor] | None:
    """The file of a sound cache and its log-probs, on every rank; None if there is none."""
    cache, tokens = None, int(online.pairs.response_starts[-1])
    with _agreed_on_files(path):
        if dist.get_rank() == 0:
            cache = _read(path, own, identity, tokens, say)
    found = [cache and cache[0]]
    dist.broadcast_object_list(found, 0)
    if found[0] is None:
        return None
    flat = torch.zeros(tokens, device=online.rows.device)
    if cache is not None:
        flat.copy_(cache[1])
    dist.broadcast(flat, 0)
    return found[0], flat


def _score_in_parts(
    file: Path,
    identity: Mapping[str, Any],
    online: OnlineReference,
    show: Callable[[int, int], Progress] | None,
    say: Callable[[str], object],
    after_part: Callable[[], object],
) -> Tensor:
    """All pairs' flat log-probs. They are collected in `file`, and resumed there."""
    pairs, device, starts = online.pairs, online.rows.device, online.pairs.response_starts
    known, kept = 0, np.zeros(0, np.float32)
    with _agreed_on_files(file):
        if dist.get_rank() == 0:
            known, kept = _read_parts(file, starts, say)
    done = torch.tensor(known, device=device)
    flat = torch.zeros(int(starts[-1]), device=device)
    flat[: len(kept)] = torch.from_numpy(kept).to(device)
    dist.broadcast(done, 0)
    done = int(done)
    if done:
        dist.broadcast(flat, 0)
        _audit(file, flat, done, identity, online)
    bar = show(len(pairs), done) if show is not None else None
    for begin in range(done, len(pairs), PART):
        part = range(begin, min(begin + PART, len(pairs)))
        flat[starts[begin] : starts[part.stop]] = scored = online.of_pairs(
            part, bar.update if bar is not None else lambda pairs: None
        )
        with _agreed_on_files(file):
            if dist.get_rank() == 0:
                _append(file, begin, scored)
        after_part()
    if bar is not None:
        bar.close()
    return flat


def _audit(
    path: Path, flat: Tensor, known: int, identity: Mapping[str, Any], online: OnlineReference
) -> str:
    """Recompute a sample of the first `known` pairs, which were read from `path`; the outcome."""
    sample = audit_sample(known)
    stored = gather_pairs(flat, online.pairs, sample)
    lengths = torch.from_numpy(online.pairs.lengths[sample, 1:]).to(flat.device)
    differences = response_sums(online.of_pairs(sample) - stored, lengths)
    dtype = getattr(torch, identity["compute_dtype"])
    found = compare(differences.flatten(), lengths.flatten(), dtype)
    if not found.within:
        raise UserError(
            f"{path}: the cached reference log-probs are not those of this reference, by a sample "
            f"of {len(sample)} pairs: {found.words}. Remove the file to have them computed again"
        )
    return found.words


def audit_sample(pairs: int) -> np.ndarray:
    """Indices of the pairs recomputed when a cache is read: 1 %, at least one."""
    size = max(1, round(AUDITED_SHARE * pairs))
    return np.sort(np.random.default_rng(0).choice(pairs, size, replace=False))


# --- files, touched by rank 0 only ---


@contextmanager
def _agreed_on_files(path: Path) -> Iterator[None]:
    """`agreed`, where an OSError becomes a UserError that names `path`. Collective."""
    with agreed():
        try:
            yield
        except OSError as error:
            place = error.filename or path
            raise UserError(f"{place}: cannot be read or written ({error.strerror})") from None


def _key(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _read(
    new: Path,
    own: Path,
    identity: Mapping[str, Any],
    tokens: int,
    say: Callable[[str], object],
) -> tuple[Path, Tensor] | None:
    """The file of a sound cache with this identity and its log-probs; None if there is none.

    new: the file that a new cache would have; an unusable one is named by `say`. Caches of the
    folder `own` count too. A shape field that the recorded identity lacks, because it was added
    since, has its default.
    """
    defaults = {f.name: f.default for f in fields(ModelShape) if f.default is not MISSING}
    unusable = {new} if new.exists() or new.with_suffix(".json").exists() else set()
    folders = dict.fromkeys((new.parent, own))
    for description in (file for each in folders for file in sorted(each.glob("[!.]*.json"))):
        path = description.with_suffix(".safetensors")
        try:
            about = json.loads(description.read_bytes())
            shape = defaults | about["identity"]["reference_shape"]
            if about["identity"] | {"reference_shape": shape} != identity:
                continue
            unusable.add(path)
            content = path.read_bytes()
            # Earlier versions recorded no checksum; their caches are audited like all others.
            if about.get("sha256") in (None, hashlib.sha256(content).hexdigest()):
                log_probs = load(content)["log_probs"]
                if len(log_probs) == tokens:
                    _tidy(own, own.glob(f"{new.stem}.parts"))  # killed before `_write` did
                    with suppress(OSError):  # or before the turn ended; the cache may be others'
                        path.with_suffix(".lock").unlink()
                    return path, log_probs
        except (
            FileNotFoundError,
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ):
            continue
    for path in sorted(unusable):
        say(f"{path}: incomplete or damaged; its log-probs are computed again")
    return None


def _write(
    path: Path,
    own: Path,
    flat: Tensor,
    pairs: TokenizedPairs,
    identity: Mapping[str, Any],
    alone: bool,
) -> None:
    """Write a cache, and remove what interrupted passes have left, in `own` and, if alone, here.

    alone: whether no other run writes this cache at the same time.
    """
    tensors = {"log_probs": flat.cpu(), "starts": torch.from_numpy(pairs.response_starts)}
    content = save(tensors)
    write_whole(path, lambda partial: partial.write_bytes(content), durable=True, shared=True)
    about = {
        "identity": identity,
        "pairs": len(pairs),
        "response_tokens": len(flat),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_json(path.with_suffix(".json"), about, durable=True, shared=True)
    if alone:
        _tidy(path.parent, path.parent.glob(f"{PARTIAL}{path.stem}*"))
    _tidy(own, (*own.glob("*.parts"), *own.glob(f"{PARTIAL}*")))


def _tidy(folder: Path, left: Iterable[Path]) -> None:
    """Remove files of a folder, and then the folder if it is empty."""
    for file in left:
        file.unlink()
    with suppress(OSError):
        folder.rmdir()


def _read_parts(
    file: Path, starts: np.ndarray, say: Callable[[str], object]
) -> tuple[int, np.ndarray]:
    """The number of pairs in the file and their log-probs, float32; made if absent.

    Each part is plain float32, followed by its `_seal`. The file is cut to complete, sound parts:
    on the same number of ranks, the remaining pairs then share rows as in an uninterrupted pass.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    content, parts, done, end = file.read_bytes(), [], 0, 0
    while end < len(content) and done < len(starts) - 1:
        after = min(done + PART, len(starts) - 1)
        size = 4 * int(starts[after] - starts[done])
        part, seal = content[end : end + size], content[end + size : end + size + SEAL]
        if seal != _seal(file, done, part):
            break
        parts.append(part)
        done, end = after, end + size + SEAL
    if end < len(content):
        say(f"{file}: incomplete or damaged after {done:,} pairs; the others are computed again")
        os.truncate(file, end)
    return done, np.frombuffer(bytearray().join(parts), np.float32)


def _append(file: Path, begin: int, log_probs: Tensor) -> None:
    """Add the part of the pairs from `begin` on to the file, and to the disk."""
    part = log_probs.cpu().numpy().tobytes()
    with open(file, "ab") as handle:
        handle.write(part + _seal(file, begin, part))
        handle.flush()
        os.fsync(handle.fileno())


def _seal(file: Path, begin: int, part: bytes) -> bytes:
    """The SHA-256 of a part's cache, first pair and contents: its place cannot change unnoticed."""
    return hashlib.sha256(f"{file.stem} {begin} ".encode() + part).digest()
