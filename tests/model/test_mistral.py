"""The decoder against transformers' classes on the same random weights."""

import math

import pytest
import torch
import transformers
from torch.nn import functional as F
from towers import YARN

from notus.data.packing import Layout
from notus.model.attention import build_mask
from notus.model.hf_config import read_shape
from notus.model.mistral import MistralForCausalLM
from notus.model.rope import rope_frequencies, rope_tables

BASE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    initializer_range=0.15,
    sliding_window=None,
)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


PLAIN_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "truncate": False}
PLAIN_YARN |= {"original_max_position_embeddings": 32}


def mistral(**changes):
    return transformers.MistralConfig(**(BASE | changes))


def llama(**changes):
    kept = {k: v for k, v in BASE.items() if k != "sliding_window"}
    return transformers.LlamaConfig(**(kept | changes))


def ministral3(**changes):
    return transformers.Ministral3Config(
        **(BASE | {"head_dim": 16, "rope_parameters": YARN} | changes)
    )


def ministral(**changes):
    return transformers.MinistralConfig(**(BASE | {"head_dim": 16} | changes))


def qwen2(**changes):
    return transformers.Qwen2Config(**(BASE | changes))


def qwen3(**changes):
    return transformers.Qwen3Config(**(BASE | {"head_dim": 32} | changes))


ALL_SLIDING = dict(use_sliding_window=True, sliding_window=5, max_window_layers=0)


CONFIGS = {
    "grouped-query": mistral(),
    "multi-head": mistral(num_key_value_heads=4),
    "multi-query": mistral(num_key_value_heads=1),
    "window": mistral(sliding_window=5),
    "window of one": mistral(sliding_window=1),
    "window longer than the text": mistral(sliding_window=500),
    "tied": mistral(tie_word_embeddings=True),
    "wide heads": mistral(head_dim=32),
    "narrow heads": mistral(head_dim=8, num_attention_heads=6, num_key_value_heads=3),
    "rope base": mistral(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "llama": llama(),
    "llama with biases": llama(attention_bias=True, mlp_bias=True),
    "llama 3 rope": llama(rope_parameters=LLAMA3, max_position_embeddings=128),
    "ministral, sliding layers": ministral(sliding_window=5),
    "ministral, full layers": ministral(layer_types=["full_attention"] * 3, sliding_window=5),
    "ministral 3": ministral3(),
    "ministral 3, tied": ministral3(tie_word_embeddings=True),
    "qwen 2": qwen2(),
    "qwen 2, tied, sliding layers": qwen2(tie_word_embeddings=True, **ALL_SLIDING),
    "qwen 3": qwen3(),
    "qwen 3, tied, biases": qwen3(tie_word_embeddings=True, attention_bias=True),
    "qwen 3, yarn": qwen3(rope_parameters=PLAIN_YARN),
}


def save_config(config, folder):
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)


def causal_layout(length: int) -> Layout:
    zeros = torch.zeros(length, dtype=torch.int32)
    return Layout(zeros, zeros, torch.arange(length, dtype=torch.int32), zeros.bool())


def both_models(config, folder):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, parameter in theirs.named_parameters():
        if "bias" in name or "norm" in name:  # initialised to constants, which would hide errors
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    save_config(config, folder)
    ours = MistralForCausalLM(read_shape(folder))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs.eval()


def our_logits(model, tokens):
    layout = causal_layout(len(tokens))
    mask = build_mask(layout, model.shape.sliding_window, "dense")
    hidden = model.model(tokens, layout.position, mask, torch.arange(len(tokens)))
    return F.linear(hidden, model.lm_head.weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_keys_equal_transformers(name, tmp_path):
    ours, theirs = both_models(CONFIGS[name], tmp_path)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for length in (1, 23, 200):
        tokens = torch.randint(0, 97, (length,))
        expected = theirs(tokens[None]).logits[0]
        error = (our_logits(ours, tokens) - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max()


def test_positions_beyond_the_original_context_of_ministral_3(tmp_path):
    """Its real settings, at the edges of one and of several original contexts."""
    rope = transformers.Ministral3Config().rope_parameters | {"rope_type": "yarn"}
    assert rope["original_max_position_embeddings"] == 16384 and rope["factor"] == 16
    ours, theirs = both_models(ministral3(rope_parameters=rope, head_dim=128), tmp_path)
    assert torch.equal(
        rope_frequencies(ours.shape, torch.device("cpu")), theirs.model.rotary_emb.inv_freq
    )
    scales = rope_tables(ours.shape, torch.tensor([0, 16383, 16384, 32768])).query_scale.flatten()
    expected = [1.0, 1.0, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(3)]
    torch.testing.assert_close(scales, torch.tensor(expected), rtol=1e-6, atol=0)
    tokens = torch.randint(0, 97, (24,))
    for start in (0, 16384 - 12, 5 * 16384 - 12, 200_000):
        layout = causal_layout(24)
        position = layout.position + start
        mask = build_mask(layout, None, "dense")
        hidden = ours.model(tokens, position, mask, torch.arange(24))
        logits = theirs(tokens[None], position_ids=position[None]).logits[0]
        error = (F.linear(hidden, ours.lm_head.weight) - logits).abs().max()
        assert error <= 1e-5 * logits.abs().max(), start


def test_the_window_of_the_parity_test_binds(tmp_path):
    ours, _ = both_models(CONFIGS["window"], tmp_path)
    tokens = torch.randint(0, 97, (23,))
    layout = causal_layout(23)
    full = ours.model(tokens, layout.position, build_mask(layout, None, "dense"), torch.arange(23))
    cut = ours.model(tokens, layout.position, build_mask(layout, 5, "dense"), torch.arange(23))
    assert torch.equal(full[:5], cut[:5])
    assert (full[5:] - cut[5:]).abs().amax(-1).min() > 1e-3


def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(tmp_path):
    ours, theirs = both_models(CONFIGS["grouped-query"], tmp_path)
    tokens = torch.randint(0, 97, (40,))
    truth = theirs(tokens[None]).logits[0]
    ours_error = (our_logits(ours.bfloat16(), tokens).float() - truth).abs().mean()
    their_error = (theirs.bfloat16()(tokens[None]).logits[0].float() - truth).abs().mean()
    assert ours_error <= 1.1 * their_error


def test_log_probs_are_those_of_the_logits(tmp_path):
    ours, theirs = both_models(CONFIGS["tied"], tmp_path)
    tokens = torch.randint(0, 97, (12,))
    rows, targets = torch.tensor([3, 3, 10]), torch.tensor([1, 96, 0])
    layout = causal_layout(12)
    mask = build_mask(layout, None, "dense")
    log_probs, _ = ours(tokens, layout.position, mask, rows, targets)
    expected = theirs(tokens[None]).logits[0].double().log_softmax(-1)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.double(), expected[rows, targets], rtol=1e-5, atol=1e-5)
    both, _ = ours(tokens, layout.position, mask, rows, targets, sum_squares=True)
    assert torch.equal(both[0], log_probs)
    squares = (2 * expected[rows]).exp().sum(-1).log()
    torch.testing.assert_close(both[1].double(), squares, rtol=1e-5, atol=1e-5)
