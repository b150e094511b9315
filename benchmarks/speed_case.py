"""The training of both sides of the speed benchmark: a random model, and pairs of tokens."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, PreTrainedTokenizerFast

from benchmarks.memory import model_shape
from benchmarks.roofline import MAX_LENGTH, MODELS, PROFILES, SEED
from notus.config import Source
from notus.data.preferences import load_preferences
from notus.data.tokenization import TokenizedPairs, tokenize_pairs
from notus.data.tokenizer import load_tokenizer, sentencepiece_backend
from notus.demo import CHAT_TEMPLATE
from notus.errors import UserError
from notus.model.hf_config import ModelShape
from notus.model.mistral import MistralForCausalLM

PARITY_STEPS = 2
TINY = model_shape(layers=2, hidden=64, inner=192, heads=4, vocabulary=512)
SHAPES = MODELS | {"tiny": TINY}
FIRST_TOKEN = 3  # random tokens begin here: after padding and the ends of sequences


@dataclass(frozen=True)
class Case:
    """The training of both sides. steps: warm and timed ones together."""

    model: str
    steps: int
    warm: int
    pairs_per_step: int
    dtype: str
    optimizer: str
    learning_rate: float


def hf_config(shape: ModelShape) -> MistralConfig:
    """The shape as transformers' configuration."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    names += ("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "sliding_window")
    same = {name: getattr(shape, name) for name in names}
    return MistralConfig(pad_token_id=None, architectures=["MistralForCausalLM"], **same)


def write_policy(folder: Path, shape: ModelShape, dtype: torch.dtype) -> None:
    """A random model as a Hugging Face folder, with a tokenizer of few words.

    Weights are normal with deviation 0.02, as transformers initialises them; norms are 1.
    """
    folder.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.device("meta"):
        tensors = MistralForCausalLM(shape).state_dict()
    for name, weight in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(weight.shape, dtype=dtype)
        else:
            drawn = torch.empty(weight.shape, dtype=dtype, device=device)
            tensors[name] = drawn.normal_(0.0, 0.02, generator=generator).cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    hf_config(shape).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def random_pairs(profile: str, count: int, vocabulary: int) -> TokenizedPairs:
    """Pairs of uniform random tokens in the lengths of a profile, from SEED."""
    rng = np.random.default_rng(SEED)
    lengths = PROFILES[profile](count, rng)
    tokens = rng.integers(FIRST_TOKEN, vocabulary, int(lengths.sum())).astype(np.int32)
    return TokenizedPairs(tokens, np.zeros(len(tokens), bool), lengths)


def open_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, or of a sentencepiece model; with a chat template in any case.

    Raises UserError where there is neither.
    """
    if path.is_dir():
        tokenizer = load_tokenizer(path)
    elif path.is_file():
        backend = sentencepiece_backend(path)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    else:
        raise UserError(f"--tokenizer {path}: no such folder or file")
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer


def real_pairs(
    path: str, form: str | None, tokenizer: str, count: int, seed: int
) -> TokenizedPairs:
    """`count` pairs drawn from a preference file, as train.py tokenizes them.

    form: a name from notus/data/formats.py. tokenizer: see `open_tokenizer`. Raises UserError where
    there are too few.
    """
    rows = load_preferences([Source(path=path, format=form)], seed=seed).train
    pairs = tokenize_pairs(
        rows,
        open_tokenizer(Path(tokenizer)),
        style="clean",
        truncation="pair",
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_LENGTH // 2,
        system_prompt=None,
    ).pairs
    if len(pairs) < count:
        raise UserError(f"--pairs {path}: {len(pairs)} usable pairs, expected at least {count}")
    return pairs.select(np.random.default_rng(seed).permutation(len(pairs))[:count])


def write_pairs(path: Path, pairs: TokenizedPairs) -> None:
    """Tokens and lengths for the processes that train."""
    arrays = {"tokens": pairs.tokens, "lengths": pairs.lengths}
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, path)


def read_pairs(path: Path) -> TokenizedPairs:
    """The pairs that `write_pairs` wrote."""
    arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}
    return TokenizedPairs(
        arrays["tokens"], np.zeros(len(arrays["tokens"]), bool), arrays["lengths"]
    )


def grouped_order(lengths: np.ndarray, case: Case) -> np.ndarray:
    """An order in which each step's pairs have similar lengths: int64 [pairs].

    Within the warm steps, and within the timed ones, pairs are sorted by their longer sequence and
    cut into steps, which come in random order. transformers' group_by_length sorts 50 steps at once
    and begins with the longest; in few steps that would measure long pairs alone.
    """
    longer = lengths[:, 0] + lengths[:, 1:].max(1)
    rng = np.random.default_rng(SEED)
    border = case.warm * case.pairs_per_step
    order: list[np.ndarray] = []
    for part in (np.arange(border), np.arange(border, len(lengths))):
        ranked = part[np.argsort(-longer[part], kind="stable")]
        steps = ranked.reshape(-1, case.pairs_per_step)
        order.extend(steps[rng.permutation(len(steps))])
    return np.concatenate(order)
