"""The folder of a model: one on this machine, or a snapshot from the Hugging Face hub."""

import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from notus.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

# Why a hub id cannot be used: the first class that fits. The library's words are for programmers.
HUB_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (HFValidationError, "and cannot be a Hugging Face hub id"),
    (GatedRepoError, "and on the hub it is gated: ask for access on its page and log in"),
    (RepositoryNotFoundError, "and the hub has no such model, or it is private: log in"),
    (LocalEntryNotFoundError, "not in the hub's local cache, and the hub is out of reach"),
)


def model_folder(path: str, weights: bool = True) -> Path:
    """The local folder of a model: `path` itself, or a hub id's snapshot (downloaded if needed).

    weights: False if only config.json and the tokenizer are needed.
    Raises UserError when `path` is neither a folder nor an accessible repository.
    """
    if os.path.isdir(path):  # unlike pathlib's, False for a name that no file can have
        return Path(path)
    if os.path.exists(path):
        raise UserError(f"{path}: found a file, expected the folder of a model")
    wanted = ["config.json", "adapter_config.json", *TOKENIZER_FILES]
    if weights:
        wanted += ["*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(path, allow_patterns=wanted))
    except (HFValidationError, OSError) as error:  # the hub's other errors are OSErrors
        first_line = str(error).strip().split("\n")[0]
        known = (reason for kind, reason in HUB_REASONS if isinstance(error, kind))
        reason = next(known, f"and the Hugging Face hub does not provide it ({first_line})")
        raise UserError(f"{path}: no such model folder here, {reason}") from None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files unchanged: writing them again could change their effect."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
