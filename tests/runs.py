"""A short configuration, and a way to run train.py on several ranks."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lines import read_lines
from safetensors.torch import load_file

from notus.config import Config
from notus.data.formats import Pair
from notus.data.planning import Plan
from notus.data.preferences import load_preferences
from notus.data.tokenization import TokenizedPairs, tokenize_pairs
from notus.data.tokenizer import load_tokenizer
from ranks import call, train_each


def base_config(demo: Path) -> dict:
    """A short float32 run over the demo, without evaluation."""
    source = {"path": str(demo / "preferences.jsonl"), "curation": {"rule": "mean-rating"}}
    return {
        "model": {"policy": str(demo / "sft"), "compute_dtype": "float32"},
        "data": {
            "train": [source],
            "max_length": 96,
            "max_prompt_length": 48,
            "tokens_per_microbatch": 512,
        },
        "optimizer": {"learning_rate": 1e-3},
        "train": {"pairs_per_step": 24},
        "parallel": {"activation_checkpointing": "none"},
        "checkpoint": {"every": None},
        "output_dir": "to be given",
    }


def run(config: dict, overrides: list[list[str]], folder: Path, ranks: int = 1) -> str:
    """train.py once per list of overrides, one after another in the same `ranks` processes.

    Returns what all of them have written to the console.
    """
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    arguments = [[str(file), *values] for values in overrides]
    code, told = call(train_each, arguments, log=folder / f"runs-{ranks}.log", ranks=ranks)
    assert code == 0, told
    return told


def pairs_of(config: Config) -> tuple[TokenizedPairs, TokenizedPairs]:
    """The pairs that a run of this configuration trains on, and those it holds out."""
    holdout = config.data.eval.holdout if config.data.eval else 0
    found = load_preferences(
        config.data.train,
        seed=config.train.seed,
        holdout=holdout,
        responses_only=config.train.objective == "sft",
    )
    assert (config.data.max_length, config.data.max_prompt_length) == (96, 48)
    train, held_out = (
        tokenized(rows, config.model.policy) for rows in (found.train, found.holdout)
    )
    return train, held_out


def tokenized(rows: Sequence[Pair], policy: Path | str) -> TokenizedPairs:
    """The pairs as runs of `base_config` tokenize them."""
    return tokenize_pairs(
        rows,
        load_tokenizer(Path(policy)),
        style="clean",
        truncation="pair",
        max_length=96,
        max_prompt_length=48,
        system_prompt=None,
    ).pairs


def pairs_of_step(
    step: int, *, pairs: int, pairs_per_step: int, seed: int, shuffle: bool
) -> np.ndarray:
    """Indices of the pairs that a step trains on."""
    order = {"epochs": 1, "max_steps": None, "seed": seed, "shuffle": shuffle}
    return Plan(np.zeros(pairs), pairs_per_step, **order, ranks=1, budget=1).pairs_of(step)


def metrics(output: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return read_lines(output / "metrics.jsonl")


def steps_logged(output: Path) -> int:
    """How many lines the run's metrics.jsonl has so far."""
    file = output / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def checkpoints(output: Path) -> list[str]:
    """The names of a run's checkpoints, oldest first."""
    return sorted(path.name for path in (output / "checkpoints").glob("step-*"))


def stored(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint's files that begin with `prefix`."""
    tensors = {}
    for file in sorted(folder.glob(f"{prefix}-*.safetensors")):
        tensors |= load_file(file)
    return tensors
