"""FLOPs by hand and by torch's counter, and the peak of a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import MISTRAL_7B
from conftest import random_pairs
from notus.data.packing import pack, slots_of
from notus.engine.flops import Work, forward_flops, hardware_flops, model_flops, peak_flops
from notus.model.mistral import count_parameters
from notus.objective.logprobs import token_log_probs


def mean_pair_flops(prompt, chosen, rejected):
    return model_flops(MISTRAL_7B, np.array([[prompt, chosen, rejected]]))


def test_model_flops_of_mistral_7b():
    """Roofline by hand for 168 + 314 + 277 tokens: 32.6 TFLOP, each factor written out."""
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    assert 32 * block == 6_979_321_856
    linear = 2 * 6_979_321_856 * 759
    # Own part and everything before it, each token with itself.
    prompt, chosen, rejected = 168 * 169 // 2, 314 * 315 // 2, 277 * 278 // 2
    attended = prompt + chosen + rejected + 168 * (314 + 277)
    attention = 4 * 4096 * 32 * attended
    head = 2 * 4096 * 32_000 * 591
    found = mean_pair_flops(168, 314, 277)
    assert found == 3 * (linear + attention + head)
    assert found == pytest.approx(32.6e12, rel=2e-3)
    two = model_flops(MISTRAL_7B, np.array([[168, 314, 277], [10, 20, 30]]))
    assert two == found + mean_pair_flops(10, 20, 30)


def test_model_flops_against_torch(tiny_model):
    """torch counts the forward's matrix products, attention apart; training is three times that."""
    pairs = random_pairs(3, seed=1)
    batch = pack(pairs, [0, 1, 2], int(slots_of(pairs.lengths, True).sum()), prefix_sharing=True)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        token_log_probs(tiny_model, batch, False)
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    shape = tiny_model.shape
    tokens = [(p, side) for p, *sides in pairs.lengths.tolist() for side in sides]
    attended = sum(sum(range(1, p + 1)) for p in pairs.lengths[:, 0].tolist())
    attended += sum(p + i for p, side in tokens for i in range(1, side + 1))
    width = shape.num_attention_heads * shape.head_dim
    attention = (
        2 * 2 * width * attended * shape.num_hidden_layers
    )  # q k and p v, a product-sum each
    assert model_flops(shape, pairs.lengths) == 3 * (products + attention)
    assert model_flops(shape, pairs.lengths, frozen=True) == 2 * products + 3 * attention


def test_hardware_flops_by_hand():
    """One block of width 2 with one head of size 2, inner 3, vocabulary 5; P, C, R = 2, 1, 3."""
    shape = replace(
        MISTRAL_7B,
        hidden_size=2,
        intermediate_size=3,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        vocab_size=5,
    )
    lengths = np.array([[2, 1, 3]])
    products = 2 * (4 * 2 * 2 + 3 * 2 * 3) * 6
    attention = 4 * 2 * (3 + 2 * 4 + 1 + 6)
    head = 2 * 2 * 5 * 4
    assert forward_flops(shape, lengths) == (products, attention, head)
    everything = Work(frozen=False, recomputed=True, scorings=2)
    expected = 6 * products * 8 / 6 + 6.5 * attention + 6 * head
    assert hardware_flops(shape, lengths, 8, everything) == pytest.approx(expected)
    adapters = hardware_flops(shape, lengths, 6, Work(frozen=True))
    assert adapters == pytest.approx(2 * products + 3.5 * attention + 3 * head)


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H200", 989.4e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("GeForce GTX 1080", None)],
)
def test_peak_flops(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_parameters_of_the_shape():
    """The blocks of the FLOP count are those of the model: 7,241,732,096 parameters in all."""
    assert count_parameters(MISTRAL_7B) == 6_979_321_856 + 2 * 32_000 * 4096 + 65 * 4096
    assert count_parameters(replace(MISTRAL_7B, tie_word_embeddings=True)) == 7_110_660_096
