"""The models that the configuration names: their folders, and how their blocks are computed."""

from pathlib import Path
from typing import NamedTuple

import torch

from notus.config import Config
from notus.errors import UserError
from notus.model.attention import default_backend
from notus.model.hf_config import ModelShape
from notus.model.hub import model_folder
from notus.model.intervals import BLOCK
from notus.model.peft import check_fits, is_adapter, read_adapter, tokenizer_folder
from notus.model.weights import open_model


class Models(NamedTuple):
    """The models of a run as folders on disk; no weights are loaded.

    source: the initial policy, or its base where `adapter` must be merged into it first.
    """

    source: Path
    shape: ModelShape
    adapter: Path | None
    reference: Path
    tokenizer: Path

    @property
    def reference_is_policy(self) -> bool:
        """Whether the reference is the initial policy, weight for weight."""
        return self.reference.resolve() == self.source.resolve()


def find_models(config: Config, *, weights: bool) -> Models:
    """The folders of policy and reference, downloaded if they are hub ids.

    weights: whether the weights must be there too. Raises UserError for a model that cannot be
    used, or a reference with another vocabulary than the policy's.
    """
    policy, path = config.model.policy, config.model.reference
    folder = model_folder(policy, weights)
    if is_adapter(folder):
        adapter = read_adapter(folder)
        if adapter.base_name is None:
            raise UserError(
                f"{policy}: its adapter_config.json names no base; expected a path or hub id"
            )
        source, shape = open_model(adapter.base_name, weights)
        check_fits(adapter, shape)
        models = Models(source, shape, folder, source, tokenizer_folder(source, folder))
    else:
        source, shape = open_model(policy, weights)
        models = Models(source, shape, None, source, source)
    if path is None:
        return models
    reference, other = open_model(path, weights)
    if other.vocab_size != shape.vocab_size:
        raise UserError(
            f"model.reference: {path} has a vocabulary of {other.vocab_size} tokens, "
            f"the policy one of {shape.vocab_size}; expected the same"
        )
    return models._replace(reference=reference)


def compiles(config: Config, device: torch.device) -> bool:
    """Whether transformer blocks are compiled."""
    wanted = config.parallel.compile
    return device.type == "cuda" if wanted == "auto" else wanted


def attention_backend(config: Config, shape: ModelShape, device: torch.device) -> str:
    """The attention backend. Raises UserError for one that cannot train on the device."""
    wanted, compiled = config.parallel.attention, compiles(config, device)
    if wanted == "auto":
        wanted = default_backend(device, shape.head_dim, compiled)
    reason = None
    if device.type == "cuda":
        if wanted == "varlen" and config.model.compute_dtype == "float32":
            reason = 'with model.compute_dtype "float32": FlashAttention computes in bfloat16'
        elif wanted == "flex" and shape.head_dim < 16:
            reason = f"for heads of {shape.head_dim}, which its kernels do not hold"
    elif wanted == "flex":
        reason = "on the CPU, where it has no backward pass"
    elif wanted == "varlen" and compiled:
        reason = "with parallel.compile on the CPU, where segments are not compiled"
    if reason:
        raise UserError(f'parallel.attention: found "{wanted}" {reason}; expected another')
    if wanted == "flex" and (budget := config.data.tokens_per_microbatch) % BLOCK:
        raise UserError(
            f"data.tokens_per_microbatch: found {budget}, expected a multiple of {BLOCK}, "
            'as parallel.attention is "flex"'
        )
    return wanted
