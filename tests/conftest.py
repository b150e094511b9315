"""Helpers that several tests share: tiny models, random pairs, a slow way to score them."""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec

# The suite is for the CPU, also where there is a GPU; before torch looks for one. The tests that
# need a GPU: NOTUS_TEST_GPU=1 pytest -m gpu
if os.environ.get("NOTUS_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file

from notus.data.token_arrays import TokenizedPairs
from notus.demo import write_demo
from notus.model.hf_config import read_shape
from notus.model.mistral import MistralForCausalLM

VOCABULARY = 61
TINY = {  # transformers' names for the sizes of a tiny decoder
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def interpreter_works() -> bool:
    """Whether Triton is here and can interpret: triton 3.6 breaks with numpy 2.4 (loop bounds)."""

    def release(package: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version(package).split(".")[:2])

    if find_spec("triton") is None:
        return False
    return release("triton") >= (3, 7) or release("numpy") < (2, 4)


needs_interpreter = pytest.mark.skipif(
    not interpreter_works(), reason="Triton's interpreter needs triton 3.7, or numpy below 2.4"
)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture
def narrow(monkeypatch):
    """Call it to make standard output and error a terminal of so many columns."""

    def change(columns: int) -> None:
        for name, value in (("COLUMNS", columns), ("LINES", 24)):
            monkeypatch.setenv(name, str(value))
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True)

    return change


@pytest.fixture
def group():
    """A process group of this process only."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def no_curves():
    """Model cards without figures, as without matplotlib: drawing takes longer than a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("notus.card.card.find_spec", lambda name: None)
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random Mistral of two layers as a Hugging Face folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.MistralConfig(**TINY, initializer_range=0.2, sliding_window=16)
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(tiny_folder):
    """Our model with the weights of `tiny_folder`, float32."""
    model = MistralForCausalLM(read_shape(tiny_folder))
    theirs = transformers.MistralForCausalLM.from_pretrained(tiny_folder)
    model.load_state_dict(theirs.state_dict())
    return model


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A small demo folder: preferences, held-out pairs, prompts and an untrained policy."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, rows=70, sft_passes=0, hidden_size=32, vocabulary=450)
    return folder


@pytest.fixture(scope="session")
def other(demo, tmp_path_factory):
    """The policy with noise on its weights: a reference that differs from it."""
    folder = tmp_path_factory.mktemp("other")
    for file in (demo / "sft").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    noisy = {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_pairs(count, seed=0, prompt=(1, 14), response=(1, 12), hide=0.0) -> TokenizedPairs:
    """Pairs of random tokens, lengths uniform in the given ranges (both ends included)."""
    rng = np.random.default_rng(seed)
    lengths = np.stack(
        [
            rng.integers(prompt[0], prompt[1] + 1, count),
            rng.integers(response[0], response[1] + 1, count),
            rng.integers(response[0], response[1] + 1, count),
        ],
        axis=1,
    )
    tokens = rng.integers(3, VOCABULARY, int(lengths.sum())).astype(np.int32)
    return TokenizedPairs(tokens, rng.random(len(tokens)) < hide, lengths)


def sequence_log_probs(logits_of, prompt, response) -> torch.Tensor:
    """Log-prob of each response token, the sequence scored on its own: float64 [response]."""
    ids = torch.tensor([*prompt, *response])
    log_probs = logits_of(ids).double().log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, len(ids) - 1)
    return log_probs[rows, ids[len(prompt) :]]


def flat_log_probs(logits_of, pairs: TokenizedPairs) -> torch.Tensor:
    """All response tokens of all pairs, one sequence at a time, in the flat order."""
    parts = []
    for i in range(len(pairs)):
        prompt, chosen, rejected = (pairs.tokens[part].tolist() for part in pairs.parts(i))
        parts += [sequence_log_probs(logits_of, prompt, r) for r in (chosen, rejected)]
    return torch.cat(parts)
