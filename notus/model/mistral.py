"""The Mistral decoder: a packed row of tokens in, log-probs of chosen targets out.

The names of modules and parameters are those of Hugging Face's MistralForCausalLM, so weights are
loaded and saved without a rename, and the rotary embedding is its rotate-half form. Llama
checkpoints that differ by configuration alone (biases, "llama3" rope scaling) load as well.
Sharding, precision, activation checkpointing and compilation are applied from outside
(engine/distributed.py); nothing here knows of them.

Shape suffixes: T slots of the packed row, D hidden size, N query heads, K key/value heads, H head
dimension, F feed-forward size, V vocabulary, S rows that predict a scored token.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from notus.errors import UserError
from notus.kernels.dispatch import linear_log_probs, linear_log_sum_squares
from notus.model.attention import AttentionMask, attend

ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM")


@dataclass(frozen=True)
class Llama3Rope:
    """Frequency-dependent stretching of the rotary embedding (Llama 3.1, "rope_type": "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """Everything of a checkpoint's config.json that the decoder depends on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    sliding_window: int | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool

    @property
    def num_parameters(self) -> int:
        """Trainable parameters; a tied head counts once."""
        with torch.device("meta"):
            return sum(p.numel() for p in MistralForCausalLM(self).parameters())


def read_shape(folder: Path) -> ModelShape:
    """The decoder's shape from `folder`/config.json.

    Raises UserError for a missing or unreadable file, an architecture other than ARCHITECTURES, a
    missing or mistyped entry, numbers that make no decoder, quantised weights, and settings this
    decoder does not compute (another activation or rope scaling).
    """
    path = folder / "config.json"
    config = read_object(path, "a Hugging Face model folder")
    architectures = config.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if found not in ARCHITECTURES:
        raise UserError(
            f"{path}: architecture is {found or 'none named'}, expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{path}: hidden_act is {config['hidden_act']!r}, expected 'silu'")
    if config.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config found, expected weights in float32, bfloat16 or float16"
        )
    rope = _rope(config)
    if not isinstance(rope, dict):
        raise UserError(f"{path}: the rope settings are {rope!r}, expected an object")
    # Since transformers 5 the base frequency is among the rope settings.
    theta = {"rope_theta": 10000.0} | config | rope
    heads = _size(config, "num_attention_heads", path)
    hidden_size = _size(config, "hidden_size", path)
    shape = ModelShape(
        vocab_size=_size(config, "vocab_size", path),
        hidden_size=hidden_size,
        intermediate_size=_size(config, "intermediate_size", path),
        num_hidden_layers=_size(config, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_key_value_heads=_size_or_none(config, "num_key_value_heads", path) or heads,
        head_dim=_size_or_none(config, "head_dim", path) or hidden_size // heads,
        rms_norm_eps=_number(config, "rms_norm_eps", path),
        rope_theta=_number(theta, "rope_theta", path),
        rope_scaling=_rope_scaling(rope, path),
        # Llama has no window; its config class would ignore the key, so this does too.
        sliding_window=(
            _size_or_none(config, "sliding_window", path) if found.startswith("Mistral") else None
        ),
        tie_word_embeddings=_flag(config, "tie_word_embeddings", path),
        attention_bias=_flag(config, "attention_bias", path),
        mlp_bias=_flag(config, "mlp_bias", path),
    )
    if heads % shape.num_key_value_heads:
        raise UserError(
            f"{path}: num_key_value_heads is {shape.num_key_value_heads}, expected a divisor of "
            f"num_attention_heads, {heads}"
        )
    if shape.head_dim % 2:
        raise UserError(
            f"{path}: head_dim (by default hidden_size / num_attention_heads) is {shape.head_dim}, "
            "expected an even number"
        )
    return shape


def read_object(path: Path, folder_is: str) -> dict[str, Any]:
    """The JSON object of a configuration file.

    Raises UserError for a missing file, as a folder that is not `folder_is`, and for other content.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent}: no {path.name}; expected {folder_is}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: found {type(config).__name__}, expected a JSON object")
    return config


def read_entry(config: dict[str, Any], key: str, path: Path) -> Any:
    """An entry that must be there. Raises UserError that names it."""
    if key not in config:
        raise UserError(f"{path}: the entry {key!r} is missing")
    return config[key]


def _size(config: dict[str, Any], key: str, path: Path) -> int:
    value = read_entry(config, key, path)
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: {key} is {json.dumps(value)}, expected an integer of at least 1")
    return value


def _size_or_none(config: dict[str, Any], key: str, path: Path) -> int | None:
    return None if config.get(key) is None else _size(config, key, path)


def _number(config: dict[str, Any], key: str, path: Path) -> float:
    value = read_entry(config, key, path)
    if type(value) not in (int, float) or not value > 0:
        raise UserError(f"{path}: {key} is {json.dumps(value)}, expected a number above 0")
    return value


def _flag(config: dict[str, Any], key: str, path: Path) -> bool:
    value = config.get(key, False)
    if type(value) is not bool:
        raise UserError(f"{path}: {key} is {json.dumps(value)}, expected true or false")
    return value


def _rope(config: dict[str, Any]) -> Any:
    """The rope settings: `rope_parameters` since transformers 5, `rope_scaling` before."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_scaling(rope: dict[str, Any], path: Path) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{path}: rope scaling {kind!r} found, expected none or 'llama3'")
    return Llama3Rope(
        factor=_number(rope, "factor", path),
        low_freq_factor=_number(rope, "low_freq_factor", path),
        high_freq_factor=_number(rope, "high_freq_factor", path),
        original_max_position_embeddings=_size(rope, "original_max_position_embeddings", path),
    )


def rope_frequencies(shape: ModelShape, device: torch.device) -> Tensor:
    """Angular frequency of each rotary pair, radians per position: float32 [H / 2].

    RoFormer, arXiv 2104.09864, section 3.2.2. With "llama3" scaling, wavelengths longer than the
    original context are stretched by `factor`, short ones kept, those between blended linearly.
    """
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device=device).float()
    frequency = 1.0 / shape.rope_theta ** (exponent / shape.head_dim)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def rope_tables(shape: ModelShape, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: two float32 tensors [T, 1, H]."""
    angle = position_T.float()[:, None] * rope_frequencies(shape, position_T.device)[None, :]
    angle_T1H = torch.cat((angle, angle), dim=-1)[:, None, :]
    return angle_T1H.cos(), angle_T1H.sin()


def rotate(x_TNH: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each head by its position (Hugging Face's rotate-half layout), in x's dtype.

    The tables are rounded to x's dtype first, as transformers does, so that a model trained here
    and served there computes the same thing.
    """
    cos, sin = (table.to(x_TNH.dtype) for table in rope)
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat((-second, first), dim=-1) * sin


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
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=shape.attention_bias)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=shape.attention_bias)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=shape.attention_bias)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=shape.attention_bias)

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask) -> Tensor:
        q_TNH = self.q_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        k_TKH = self.k_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        v_TKH = self.v_proj(x_TD).unflatten(-1, (-1, self.head_dim))
        out_TNH = attend(rotate(q_TNH, rope), rotate(k_TKH, rope), v_TKH, mask)
        return self.o_proj(out_TNH.flatten(-2))


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

    def forward(self, x_TD: Tensor, rope: tuple[Tensor, Tensor], mask: AttentionMask) -> Tensor:
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
    """The output projection and the log-softmax in one, so that logits need never be stored."""

    def __init__(self, shape: ModelShape, kernels: str = "auto") -> None:
        """kernels: "auto", "triton" or "plain", as in notus/kernels/dispatch.py."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))
        self.kernels = kernels

    def forward(
        self, hidden_SD: Tensor, targets_S: Tensor | None, sum_squares: bool = False
    ) -> Tensor:
        """Log-prob of each row's target token, natural logarithm: float32 [S].

        With `sum_squares`, [2, S]: the second row is log sum_v p(v)^2, without gradient. Without
        targets the rows' logits, float32 [S, V], for the few rows of which a token is sampled; they
        are computed in the weight's dtype, as transformers serves them.
        """
        if targets_S is None:
            return F.linear(hidden_SD.to(self.weight.dtype), self.weight).float()
        log_probs_S = linear_log_probs(hidden_SD, self.weight, targets_S, self.kernels)
        if not sum_squares:
            return log_probs_S
        squares_S = linear_log_sum_squares(hidden_SD, self.weight, self.kernels)
        return torch.stack((log_probs_S, squares_S))


class MistralForCausalLM(nn.Module):
    """The decoder and its head. Keys of the state dict equal those of transformers' class."""

    def __init__(
        self, shape: ModelShape, kernels: str = "auto", attention: str | None = None
    ) -> None:
        """kernels: "auto", "triton" or "plain", what computes the head.

        attention: backend for packed rows, see notus/model/attention.py; None: the device's.
        """
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
        """Log-probs of `targets_S` as predicted at the slots `rows_S`, float32 [S], and the final
        hidden states there, [S, D] in the compute dtype.

        tokens_T, position_T: integers, the packed row; mask: of `attention.build_mask`; rows_S,
        targets_S: int64, a slot may predict more than one target (the prompt's last slot predicts
        the first token of both responses), None: the logits instead; sum_squares: see LogProbHead.
        """
        hidden_SD = self.model(tokens_T, position_T, mask, rows_S)
        return self.lm_head(hidden_SD, targets_S, sum_squares), hidden_SD
