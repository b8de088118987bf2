"""Rotary position embedding (RoFormer, arXiv:2104.09864) and its stretched forms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polydelta.engine.models.config import RopeConfig


def rope_tables(
    rope: RopeConfig, head_dim: int, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines by position, each `[length, head_dim]`.

    The sine's first half is negated: with the halves of x swapped, the rotation is then
    `x * cos + swapped * sin`.
    """
    frequencies, factor = _frequencies(rope, head_dim)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def _frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angle for each position and pair of dimensions, `[head_dim / 2]`, and a factor on both
    cosine and sine (other than 1 in YaRN only)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rope.theta**exponents
    match rope.type:
        case "linear":
            return plain / float(rope.scaling["factor"]), 1.0
        case "llama3":
            return _llama3(plain, rope.scaling), 1.0
        case "yarn":
            return _yarn(plain, rope, head_dim)
        case "divided":
            return plain / torch.tensor(rope.scaling["divisors"]), 1.0
        case _:
            return plain, 1.0


def _llama3(plain: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, those between blended."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return plain / factor * (1 - kept) + plain * kept


def _yarn(plain: Tensor, rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071): dimensions that turn often are kept, those that do not complete
    a turn within the original length are stretched, with a linear ramp between."""
    scaling = rope.scaling
    factor = float(scaling["factor"])
    original = float(scaling["original_max_position_embeddings"])

    def dimension_of(turns: float) -> float:
        """The pair of dimensions that makes so many turns over the original length."""
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_of(float(scaling.get("beta_fast") or 32))
    high = dimension_of(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0.0, 1.0)
    frequencies = plain / factor * stretched + plain * (1 - stretched)
    return frequencies, _yarn_factor(scaling, factor)


def _yarn_factor(scaling: Mapping[str, Any], factor: float) -> float:
    """How much longer YaRN makes queries and keys, to keep the softmax as sharp as before."""
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and mscale_all:
        return magnitude(float(mscale)) / magnitude(float(mscale_all))
    return magnitude(1.0)
