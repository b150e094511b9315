"""The Mistral decoder: a packed row of tokens in, log-probs of chosen targets out.

Modules and parameters are named as in Hugging Face's MistralForCausalLM, so weights are loaded and
saved without renaming, and the rotary embedding is its rotate-half form. Llama, Qwen and Ministral
checkpoints differ from it in what ModelShape says: biases, a norm on queries and keys, the rotary
embedding's frequencies, a scale on queries. Sharding, precision, activation checkpointing and
compilation are applied from outside (engine/distributed.py); nothing here depends on them.

Shape suffixes: T slots of the packed row, D hidden size, N query heads, K key/value heads, H head
dimension, F feed-forward size, V vocabulary, S rows that predict a scored token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from notus.kernels.dispatch import linear_log_probs, linear_log_sum_squares
from notus.model.attention import AttentionMask, attend
from notus.model.hf_config import ModelShape
from notus.model.rope import Rope, rope_tables, rotate


class RMSNorm(nn.Module):
    """Root mean square norm, arXiv 1910.07467, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        x = x_TD.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(x_TD.dtype)


class Attention(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        bias = shape.attention_bias or shape.qkv_bias
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=bias)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=bias)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=bias)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=shape.attention_bias)
        norm = RMSNorm if shape.qk_norm else nn.Identity  # which ignores its arguments
        self.q_norm = norm(shape.head_dim, shape.rms_norm_eps)
        self.k_norm = norm(shape.head_dim, shape.rms_norm_eps)

    def forward(self, x_TD: Tensor, rope: Rope, mask: AttentionMask) -> Tensor:
        q_TNH = self.q_norm(self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        k_TKH = self.k_norm(self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim)))
        v_TKH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        q_TNH, k_TKH = rotate(q_TNH, rope), rotate(k_TKH, rope)
        if rope.query_scale is not None:
            q_TNH = q_TNH * rope.query_scale.to(q_TNH.dtype)
        return self.o_proj(attend(q_TNH, k_TKH, v_TKH, mask).flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward, arXiv 2002.05202."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        hidden, inner, bias = shape.hidden_size, shape.intermediate_size, shape.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x_TD: Tensor, rope: Rope, mask: AttentionMask) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), rope, mask)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Decoder(nn.Module):
    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)

    def forward(
        self, tokens_T: Tensor, position_T: Tensor, mask: AttentionMask, rows_S: Tensor
    ) -> Tensor:
        """Final hidden states of the slots `rows_S`: [S, D]."""
        x_TD = self.embed_tokens(tokens_T)
        rope = rope_tables(self.shape, position_T)
        for layer in self.layers:
            x_TD = layer(x_TD, rope, mask)
        return self.norm(x_TD[rows_S])


class LogProbHead(nn.Module):
    """Output projection and log-softmax in one, so that logits never have to be stored."""

    def __init__(self, shape: ModelShape, kernels: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))
        self.kernels = kernels

    def forward(
        self, hidden_SD: Tensor, targets_S: Tensor | None, sum_squares: bool = False
    ) -> Tensor:
        """Log-prob of each row's target token, natural logarithm: float32 [S].

        With `sum_squares`, [2, S]: the second row is log sum_v p(v)^2, without gradient. Without
        targets the rows' logits, float32 [S, V], for the few rows where a token is sampled; they
        are computed in the weight's dtype, as in transformers.
        """
        if targets_S is None:
            return F.linear(hidden_SD.to(self.weight.dtype), self.weight).float()
        log_probs_S = linear_log_probs(hidden_SD, self.weight, targets_S, self.kernels)
        if not sum_squares:
            return log_probs_S
        squares_S = linear_log_sum_squares(hidden_SD, self.weight, self.kernels)
        return torch.stack((log_probs_S, squares_S))


class MistralForCausalLM(nn.Module):
    """The decoder and its head. Keys of the state dict equal those of transformers' class.

    kernels: the head's implementation, see notus/kernels/dispatch.py. attention: the backend for
    packed rows, see notus/model/attention.py; None: the device's.
    """

    def __init__(
        self, shape: ModelShape, kernels: str = "auto", attention: str | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        self.attention = attention
        self.model = Decoder(shape)
        self.lm_head = LogProbHead(shape, kernels)
        if shape.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        tokens_T: Tensor,
        position_T: Tensor,
        mask: AttentionMask,
        rows_S: Tensor,
        targets_S: Tensor | None,
        sum_squares: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The head's output at the slots `rows_S`, and the final hidden states there: [S, D].

        tokens_T, position_T: integers, the packed row; mask: of `attention.build_mask`; rows_S,
        targets_S: int64, a slot may predict more than one target (the prompt's last slot predicts
        the first token of both responses); targets_S, sum_squares: see LogProbHead.
        """
        hidden_SD = self.model(tokens_T, position_T, mask, rows_S)
        return self.lm_head(hidden_SD, targets_S, sum_squares), hidden_SD


def count_parameters(shape: ModelShape) -> int:
    """Parameters of a model of this shape; a tied head counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MistralForCausalLM(shape).parameters())
