"""KIVI of 2 bits, and what makes up for most of its error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.kernels.kv_formats.bit_packing import pack, unpack
from polydelta.kernels.kv_formats.codes import finite
from polydelta.kernels.kv_formats.format import NATIVE_TOKENS, KVShape, Parts
from polydelta.kernels.kv_formats.kivi import CHANNELS, TOKENS, Kivi, dequantize, quantize
from polydelta.kernels.kv_formats.low_rank import low_rank, product
from polydelta.kernels.kv_layout import Section

# Channels of a row that have one outlier above and one below: 2 %.
_EACH = 100
_RANK = 2


class Gear:
    """GEAR (arXiv:2403.05527) by page, on `Kivi` of 2 bits: the largest and the least channels of
    each row as they are, left out of the ranges of the others, and for each page, head and side a
    matrix of rank 2 near to what codes are off."""

    name = "gear"
    by_page = True
    native_tokens = NATIVE_TOKENS
    rotates_keys = False
    bits = 2

    def sections(self, tokens: int, shape: KVShape) -> Sequence[Section]:
        heads, head_dim = shape.num_kv_heads, shape.head_dim
        if head_dim % 4:
            raise ValueError(
                f"KV format {self.name} stores 4 channels in a byte: head_dim {head_dim} is not "
                f"divisible by 4."
            )
        outliers = (tokens, heads, 2 * _outliers(head_dim))
        rows, columns = (tokens, heads, _RANK), (heads, _RANK, head_dim)
        return [
            *Kivi(self.bits).sections(tokens, shape),
            *(
                section
                for side in ("key", "value")
                for section in (
                    Section(f"{side}_outliers", shape.dtype, outliers),
                    Section(f"{side}_outlier_places", _places(head_dim), outliers),
                    Section(f"{side}_rows", torch.float16, rows),
                    Section(f"{side}_columns", torch.float16, columns),
                )
            ),
        ]

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        # [2 * pages, tokens, kv_heads, head_dim]: what is done to both sides alike, in one go.
        exact = finite(torch.cat((keys, values)))
        rows = exact.float()
        channels = _extremes(rows)
        outside = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, channels, True)
        parts: dict[str, Tensor] = {}
        decoded: list[Tensor] = []
        sides = ("key", TOKENS), ("value", CHANNELS)
        for (side, axis), own, out in zip(sides, rows.chunk(2), outside.chunk(2), strict=True):
            codes, scales = quantize(own, axis, self.bits, out)
            parts |= {f"{side}s": pack(codes, self.bits), f"{side}_scales": scales}
            decoded.append(dequantize(codes, scales, axis))
        off = (rows - torch.cat(decoded)).masked_fill_(outside, 0.0).transpose(1, 2)
        left, right = (
            # By page, side and head.
            factor.unflatten(0, off.shape[:2])
            for factor in low_rank(off.flatten(0, 1), _RANK)
        )
        shared = {
            "outliers": exact.gather(-1, channels),
            "outlier_places": channels.to(_places(rows.shape[-1])),
            "rows": left.transpose(1, 2),
            "columns": right,
        }
        for name, both in shared.items():
            parts[f"key_{name}"], parts[f"value_{name}"] = both.chunk(2)
        return parts

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        return self._decoded(parts, "key", TOKENS), self._decoded(parts, "value", CHANNELS)

    def _decoded(self, parts: Parts, side: str, axis: int) -> Tensor:
        rows = dequantize(unpack(parts[f"{side}s"], self.bits), parts[f"{side}_scales"], axis)
        left = parts[f"{side}_rows"].transpose(1, 2)
        rows = rows + product(left, parts[f"{side}_columns"]).transpose(1, 2)
        # A page that nothing was stored in may have any places.
        channels = parts[f"{side}_outlier_places"].long().clamp_(0, rows.shape[-1] - 1)
        return rows.scatter_(-1, channels, parts[f"{side}_outliers"].float())


def _outliers(head_dim: int) -> int:
    """Of a row, on either side."""
    return -(-head_dim // _EACH)


def _places(head_dim: int) -> torch.dtype:
    return torch.uint8 if head_dim <= 256 else torch.int16


def _extremes(rows: Tensor) -> Tensor:
    """The channels of the largest numbers of each row and then of the least ones, each from the
    outermost inwards, ties to the lower channel: `[..., 2 * outliers]` int64."""
    channels: list[Tensor] = []
    for sign in (1.0, -1.0):
        left = rows * sign
        for _ in range(_outliers(rows.shape[-1])):
            channels.append(left.argmax(-1, keepdim=True))
            left.scatter_(-1, channels[-1], -torch.inf)
    return torch.cat(channels, -1)
