"""The reference's log-probs kept on disk: computed in one pass, checked whenever they are read.

They depend on the reference's weights, the token ids and the numerics, and on nothing else: not on
the loss, beta or learning rate. These three are a cache's identity, which is recorded next to it
(cache_files.py).

Runs share a folder of caches. Of those that need the same one at the same time, the first computes
it and the others wait. The parts of an unfinished pass are in the folder of the run that makes it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from notus.console import counted
from notus.data.token_arrays import TokenizedPairs
from notus.errors import UserError, agreed
from notus.model.hf_config import ModelShape
from notus.objective.cache_files import CacheFiles
from notus.objective.logprobs import gather_pairs, response_sums
from notus.objective.reference import OnlineReference
from notus.objective.rounding import compare
from notus.objective.turns import Turn

Result = TypeVar("Result")

AUDITED_SHARE = 0.01


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
    show: Callable[[int, int], tqdm] = lambda total, done: tqdm(disable=True),
    say: Callable[[str], object] = print,
    after_part: Callable[[], object] = lambda: None,
) -> Tensor:
    """The log-probs of all response tokens of `online.pairs`: float32, flat, on every rank.

    They are read from `folder`, or from `own`, if there is a sound cache of this identity, and a
    sample is recomputed. Otherwise they are computed and written to `folder`; an interrupted pass
    repeats only its last part. Only rank 0 reads and writes files. folder, own: see `CacheFiles`.
    show: makes the progress display of a pass from the number of pairs and of those already done.
    say: prints the outcome of the audit, which files are damaged, and whether another run is waited
    for. after_part: is called on every rank when a part has been written, and while waiting; it may
    raise the same there. Collective.

    Raises UserError, on all ranks, if the sample differs from the file by more than rounding, or
    if the file system refuses to read or write.
    """
    files = CacheFiles(folder, own, identity, online.pairs.response_starts)
    found = _find(files, online, lambda words: None)
    if found is None:
        _on_first_rank(files.path, partial(folder.mkdir, parents=True, exist_ok=True))
        with Turn(files.path.with_suffix(".lock")) as turn:
            turn.wait(say, after_part)
            found = _find(files, online, say)  # another run may have made it
            if found is None:
                flat = _score_in_parts(files, online, show, say, after_part)
                _on_first_rank(files.path, files.write, flat, turn.held)
                _on_first_rank(files.path, turn.finish)
                return flat
    path, flat = found
    words = _audit(path, flat, len(online.pairs), identity, online)
    say(f"reference log-probs read from {path}, no pass: in a sample computed again, {words}")
    return flat


def _find(
    files: CacheFiles, online: OnlineReference, say: Callable[[str], object]
) -> tuple[Path, Tensor] | None:
    """The file of a sound cache and its log-probs, on every rank; None if there is none."""
    cache = _on_first_rank(files.path, files.read, say)
    found = [cache and cache[0]]
    dist.broadcast_object_list(found, 0)
    if found[0] is None:
        return None
    flat = torch.zeros(int(files.starts[-1]), device=online.rows.device)
    if cache is not None:
        flat.copy_(cache[1])
    dist.broadcast(flat, 0)
    return found[0], flat


def _score_in_parts(
    files: CacheFiles,
    online: OnlineReference,
    show: Callable[[int, int], tqdm],
    say: Callable[[str], object],
    after_part: Callable[[], object],
) -> Tensor:
    """All pairs' flat log-probs. They are collected in `files.parts`, and resumed there."""
    device, starts = online.rows.device, files.starts
    nothing = 0, np.zeros(0, np.float32)
    known, kept = _on_first_rank(files.parts, files.read_parts, say) or nothing
    done = torch.tensor(known, device=device)
    flat = torch.zeros(int(starts[-1]), device=device)
    flat[: len(kept)] = torch.from_numpy(kept).to(device)
    dist.broadcast(done, 0)
    done = int(done)
    if done:
        dist.broadcast(flat, 0)
        _audit(files.parts, flat, done, files.identity, online)
    bar = show(len(online.pairs), done)
    while part := files.part_from(done):
        flat[starts[done] : starts[part.stop]] = log_probs = online.of_pairs(part, bar.update)
        _on_first_rank(files.parts, files.append, done, log_probs)
        after_part()
        done = part.stop
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
            f"of {counted(len(sample), 'pairs')}: {found.words}. Remove the file to have them "
            "computed again"
        )
    return found.words


def audit_sample(pairs: int) -> np.ndarray:
    """Indices of the pairs recomputed when a cache is read: 1 %, at least one."""
    size = max(1, round(AUDITED_SHARE * pairs))
    return np.sort(np.random.default_rng(0).choice(pairs, size, replace=False))


def _on_first_rank(path: Path, action: Callable[..., Result], *arguments: object) -> Result | None:
    """The result of a call on rank 0, None on the others; `path` is named if a file is refused.

    Collective. Raises UserError, on every rank.
    """
    with agreed():
        if dist.get_rank() > 0:
            return None
        try:
            return action(*arguments)
        except OSError as error:
            place = error.filename or path
            raise UserError(f"{place}: cannot be read or written ({error.strerror})") from None
