"""The rotary position embedding: frequencies, with the scalings that are read, and the rotation.

Shape suffixes: T slots of the packed row, N heads, H head dimension.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from notus.model.hf_config import ModelShape, Yarn


def rope_frequencies(shape: ModelShape, device: torch.device) -> Tensor:
    """Angular frequency of each rotary pair, radians per position: float32 [H / 2].

    RoFormer, arXiv 2104.09864, section 3.2.2. With "llama3" scaling, wavelengths longer than the
    original context are stretched by `factor`, short ones kept, those between blended linearly.
    With YaRN, arXiv 2309.00071 section 3.2, the blend is linear in the pair's number.
    """
    exponent = torch.arange(0, shape.head_dim, 2, dtype=torch.int64, device=device).float()
    wavelength = shape.rope_theta ** (exponent / shape.head_dim)
    frequency = 1.0 / wavelength
    if shape.yarn is not None:
        keep = _kept_share(shape.yarn, shape.head_dim, shape.rope_theta).to(device)
        return 1.0 / (shape.yarn.factor * wavelength) * (1 - keep) + frequency * keep
    scaling = shape.rope_scaling
    if scaling is None:
        return frequency
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def _kept_share(yarn: Yarn, head_dim: int, theta: float) -> Tensor:
    """How much of its own frequency each rotary pair keeps under YaRN, 0 to 1: float32 [H / 2].

    All of it, if it turns more than `beta_fast` times over the original context, and nothing below
    `beta_slow` turns.
    """

    def pair_that_turns(times: float) -> float:
        context = yarn.original_max_position_embeddings
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last += 0.001 * (first == last)
    pair = torch.arange(head_dim // 2, dtype=torch.float32)
    return 1 - ((pair - first) / (last - first)).clamp(0, 1)


def _attention_factor(yarn: Yarn) -> float:
    """The factor of YaRN's cosines and sines, section 3.3."""

    def grown(slope: float) -> float:
        return 0.1 * slope * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    if yarn.attention_factor is not None:
        return yarn.attention_factor
    if yarn.mscale and yarn.mscale_all_dim:
        return grown(yarn.mscale) / grown(yarn.mscale_all_dim)
    return grown(1.0)


class Rope(NamedTuple):
    """The tables that depend on the slots' positions: float32, the same in all layers."""

    cos: Tensor  # [T, 1, H]
    sin: Tensor  # [T, 1, H]
    query_scale: Tensor | None  # [T, 1, 1]; None: 1


def rope_tables(shape: ModelShape, position_T: Tensor) -> Rope:
    """Cosine and sine of every position's angles, and the scale of its queries.

    Ministral 3 scales a query by 1 + beta ln(1 + floor(position / original context)), after
    Llama 4: by 1 within that context.
    """
    angle = position_T.float()[:, None] * rope_frequencies(shape, position_T.device)[None, :]
    angle_T1H = torch.cat((angle, angle), dim=-1)[:, None, :]
    cos, sin, yarn = angle_T1H.cos(), angle_T1H.sin(), shape.yarn
    if yarn is None:
        return Rope(cos, sin, None)
    factor, scale = _attention_factor(yarn), None
    if yarn.llama_4_scaling_beta:
        contexts_T = position_T // yarn.original_max_position_embeddings
        scale_T = 1 + yarn.llama_4_scaling_beta * torch.log(1 + contexts_T.float())
        scale = scale_T[:, None, None]
    return Rope(cos * factor, sin * factor, scale)


def rotate(x_TNH: Tensor, rope: Rope) -> Tensor:
    """Rotate each head by its position (Hugging Face's rotate-half layout), in x's dtype.

    The tables are first rounded to x's dtype, as in transformers, so that a model trained here
    computes the same when it is served there.
    """
    cos, sin = rope.cos.to(x_TNH.dtype), rope.sin.to(x_TNH.dtype)
    first, second = x_TNH.chunk(2, dim=-1)
    return x_TNH * cos + torch.cat((-second, first), dim=-1) * sin
