"""The frozen reference: its identity, its cached log-probs, and the check of a run's start.

The reference's log-probs depend on its weights, the token ids and the numerics, on nothing else:
not on the loss, beta or learning rate. They are computed in one pass, kept on disk under a key made
of those three, and a sample is recomputed whenever they are read back.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from notus.agreement import agree
from notus.data.packing import Microbatch
from notus.data.tokenization import TokenizedPairs
from notus.errors import UserError
from notus.model.hf_config import ModelShape
from notus.model.lora import adapters_off
from notus.model.mistral import MistralForCausalLM
from notus.objective.logprobs import (
    Scorer,
    flat_positions,
    gather_pairs,
    response_sums,
    token_log_probs,
)
from notus.objective.losses import Loss, PairLogProbs

Result = TypeVar("Result")

AUDITED_SHARE = 0.01
PART = 4096  # pairs scored between two writes to disk: minutes of a 7B model on one GPU
# Nats per token by which two computations of one log-prob may differ on average over a response:
# rounding in other packings. A wrong template, model or cache differs by tenths.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Progress(Protocol):
    """Displays how far something is."""

    def update(self, steps: int) -> object: ...

    def close(self) -> object: ...


class Reference(NamedTuple):
    """Where the reference's log-probs over one data set come from.

    of_batch: a microbatch's scored tokens, float32 [S]. of_pairs: the given pairs' response tokens,
    flat, in that order; collective.
    """

    of_batch: Callable[[Microbatch], Tensor]
    of_pairs: Scorer


def cached_reference(flat: Tensor, pairs: TokenizedPairs) -> Reference:
    """Looks log-probs up in `flat`, which holds those of all pairs."""
    starts = torch.from_numpy(pairs.response_starts).to(flat.device)
    return Reference(
        lambda batch: flat[flat_positions(batch, starts)],
        lambda indices: gather_pairs(flat, pairs, indices),
    )


def online_reference(model: MistralForCausalLM, score_pairs: Scorer) -> Reference:
    """Runs the frozen model each time, without adapters; score_pairs is its scorer."""

    @torch.no_grad()
    def of_batch(batch: Microbatch) -> Tensor:
        with adapters_off(model):
            return token_log_probs(model, batch)

    return Reference(of_batch, score_pairs)


def without_adapters(model: nn.Module, score_pairs: Scorer) -> Scorer:
    """The same scorer of `model` as if it had no adapters: a policy with LoRA is its reference."""

    def score_base(indices: Sequence[int] | np.ndarray) -> Tensor:
        with adapters_off(model):
            return score_pairs(indices)

    return score_base


@torch.no_grad()
def follow(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """Move the reference towards the policy: ref <- share x policy + (1 - share) x ref.

    TR-DPO, arXiv 2404.09656, equation 6. Both have the same, equally sharded float32 parameters.
    """
    for own, other in zip(reference.parameters(), policy.parameters(), strict=True):
        own.lerp_(other, share)


def no_reference(pairs: TokenizedPairs, device: torch.device) -> Reference:
    """Zeros, for losses that use no reference; rewards are then beta x the policy's log-probs."""
    return cached_reference(torch.zeros(int(pairs.response_starts[-1]), device=device), pairs)


def cache_identity(
    pairs: TokenizedPairs,
    reference: Mapping[str, str],
    shape: ModelShape,
    compute_dtype: torch.dtype,
) -> dict[str, Any]:
    """What cached log-probs were computed from: with equal ones they are equal up to rounding."""
    return {
        "reference_sha256": reference["sha256"],
        "reference_shape": asdict(shape),
        "tokens_sha256": pairs.fingerprint(),
        "compute_dtype": str(compute_dtype).removeprefix("torch."),
    }


def cached_log_probs(
    folder: Path,
    pairs: TokenizedPairs,
    identity: Mapping[str, Any],
    score_pairs: Scorer,
    device: torch.device,
    show: Callable[[int, int], Progress] | None = None,
) -> Tensor:
    """The reference's log-prob of every response token: float32, flat, on every rank.

    Read from `folder` if it holds them under this identity, after recomputing a sample; computed
    with `score_pairs` and written otherwise, in parts, of which a pass that was broken off repeats
    the last one only. Rank 0 alone touches the files. Collective. show: makes what displays a long
    pass, from the number of pairs and that of those done.

    Raises UserError, on all ranks, when the sample differs by more than TOLERANCE from what the
    file says, and when the file system refuses to read or write.
    """
    path = folder / f"{_key(identity)}.safetensors"
    stored = _on_first_rank(path, lambda: _read(path, identity))
    found = torch.tensor([stored is not None], device=device)
    dist.broadcast(found, 0)
    if not found:
        flat = _score_in_parts(path, pairs, identity, score_pairs, device, show)
        _on_first_rank(path, lambda: _write(path, flat, pairs, identity))
        return flat
    flat = torch.zeros(int(pairs.response_starts[-1]), device=device)
    if stored is not None:
        flat.copy_(stored)
    dist.broadcast(flat, 0)
    _audit(path, flat, pairs, len(pairs), identity, score_pairs)
    return flat


def _score_in_parts(
    path: Path,
    pairs: TokenizedPairs,
    identity: Mapping[str, Any],
    score_pairs: Scorer,
    device: torch.device,
    show: Callable[[int, int], Progress] | None,
) -> Tensor:
    """All pairs' flat log-probs. A file beside `path` collects them and says where to go on."""
    file, starts, bar = path.with_suffix(".parts"), pairs.response_starts, None
    kept = _on_first_rank(file, lambda: _read_parts(file, starts))
    done = torch.tensor(0 if kept is None else kept[0], device=device)
    flat = torch.zeros(int(starts[-1]), device=device)
    if kept is not None:
        flat[: len(kept[1])] = torch.from_numpy(kept[1]).to(device)
    dist.broadcast(done, 0)
    done = int(done)
    if done:
        dist.broadcast(flat, 0)
        _audit(file, flat, pairs, done, identity, score_pairs)
    if show is not None and len(pairs) > PART:
        bar = show(len(pairs), done)
    for begin in range(done, len(pairs), PART):
        part = range(begin, min(begin + PART, len(pairs)))
        flat[starts[begin] : starts[part.stop]] = scored = score_pairs(part)
        _on_first_rank(file, partial(_append, file, scored))
        if bar is not None:
            bar.update(len(part))
    if bar is not None:
        bar.close()
    return flat


def _read_parts(file: Path, starts: np.ndarray) -> tuple[int, np.ndarray]:
    """How many pairs the file holds, plain float32, and their log-probs; it is made or cut to them.

    Whole parts alone: on as many ranks, the same pairs then share rows as in a pass that nothing
    interrupts.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    stored = np.fromfile(file, np.float32)[: starts[-1]]
    done = int((np.searchsorted(starts, len(stored), "right") - 1) // PART * PART)
    os.truncate(file, 4 * starts[done])
    return done, stored[: starts[done]]


def _append(file: Path, log_probs: Tensor) -> None:
    with open(file, "ab") as handle:
        handle.write(log_probs.cpu().numpy().tobytes())


def _on_first_rank(path: Path, action: Callable[[], Result]) -> Result | None:
    """What `action` gives, on rank 0; None on the others, where it is not called. Collective.

    Raises UserError on all ranks when the file system refuses `path`.
    """

    def attempt() -> Result | None:
        if dist.get_rank() != 0:
            return None
        try:
            return action()
        except OSError as error:
            raise UserError(f"{path}: cannot be read or written ({error.strerror})") from None

    return agree(attempt)


def _audit(
    path: Path,
    flat: Tensor,
    pairs: TokenizedPairs,
    known: int,
    identity: Mapping[str, Any],
    score_pairs: Scorer,
) -> None:
    """Recompute a sample of the first `known` pairs, whose log-probs were read from `path`."""
    sample = audit_sample(known)
    worst = worst_difference(
        score_pairs(sample),
        gather_pairs(flat, pairs, sample),
        torch.from_numpy(pairs.lengths[sample, 1:]).to(flat.device),
    )
    if not worst <= TOLERANCE[getattr(torch, identity["compute_dtype"])]:
        raise UserError(
            f"{path}: the cached reference log-probs differ from freshly computed ones by up to "
            f"{worst:.3g} nats per token, over a sample of {len(sample)} pairs; expected rounding "
            "only. Remove the file to have them computed again"
        )


def audit_sample(pairs: int) -> np.ndarray:
    """Indices of the pairs recomputed when a cache is read: 1 %, at least one."""
    size = max(1, round(AUDITED_SHARE * pairs))
    return np.sort(np.random.default_rng(0).choice(pairs, size, replace=False))


def worst_difference(one_S: Tensor, other_S: Tensor, lengths_B2: Tensor) -> float:
    """The largest mean difference over a response's tokens, in nats per token; NaN if any is."""
    return float((response_sums(one_S - other_S, lengths_B2) / lengths_B2).abs().max())


def check_start(loss: Loss, pairs: PairLogProbs, compute_dtype: torch.dtype) -> None:
    """Refuse to start when policy and reference, which are the same weights, do not agree.

    Each response's log-ratio must be 0 up to rounding. The loss, a function of nothing else, then
    has its known value (ln 2 for sigmoid), which must be finite. Raises UserError with the likely
    cause.
    """
    tolerance = TOLERANCE[compute_dtype]
    ratio = torch.stack(
        (
            (pairs.policy_chosen - pairs.reference_chosen) / pairs.chosen_length,
            (pairs.policy_rejected - pairs.reference_rejected) / pairs.rejected_length,
        )
    )
    worst = float(ratio.abs().max()) if ratio.numel() else 0.0
    if not worst <= tolerance:
        raise UserError(
            f"before the first step, a response's log-prob under the policy differs from the "
            f"reference's by {worst:.3g} nats per token, expected at most {tolerance}: both are "
            "the same weights. Likely causes: a cache made by other weights, weights changed on "
            "disk since, or (if not a number) a checkpoint with non-finite values"
        )
    known = loss(
        pairs._replace(
            policy_chosen=pairs.reference_chosen,
            policy_rejected=pairs.reference_rejected,
            policy_chosen_shared=pairs.reference_chosen_shared,
            policy_rejected_shared=pairs.reference_rejected_shared,
        )
    )
    if not torch.isfinite(known).all():
        raise UserError(f"loss: {loss.name} is not finite where policy and reference agree")


def _key(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, identity: Mapping[str, Any]) -> Tensor | None:
    try:
        if json.loads(path.with_suffix(".json").read_bytes())["identity"] != identity:
            return None
        return load_file(path)["log_probs"]
    except (FileNotFoundError, ValueError, SafetensorError, KeyError, TypeError):
        return None  # absent, half-written or damaged: computed anew


def _write(path: Path, flat: Tensor, pairs: TokenizedPairs, identity: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".partial")
    tensors = {"log_probs": flat.cpu(), "starts": torch.from_numpy(pairs.response_starts)}
    try:
        save_file(tensors, partial_file)
    except SafetensorError as error:  # what safetensors makes of an OSError
        raise OSError(0, str(error)) from None
    os.replace(partial_file, path)
    about = {"identity": identity, "pairs": len(pairs), "response_tokens": len(flat)}
    path.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n")
    path.with_suffix(".parts").unlink()
