"""Keys by channel and values by token, in a few bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.kernels.kv_formats.bit_packing import pack, unpack
from polydelta.kernels.kv_formats.codes import GROUP, finite, ranged
from polydelta.kernels.kv_formats.format import NATIVE_TOKENS, KVShape, Parts
from polydelta.kernels.kv_layout import Section

# Where tokens and channels lie in `[pages, tokens, kv_heads, head_dim]`.
TOKENS, CHANNELS = 1, 3


class Kivi:
    """KIVI (arXiv:2402.02750) by page. Of keys, a channel of GROUP tokens shares a range; of
    values, GROUP channels of a token do; the last group of either may be smaller. The newest
    tokens, which the authors keep whole (32 to 128 of them), are the page that is not full yet."""

    by_page = True
    native_tokens = NATIVE_TOKENS
    rotates_keys = False

    def __init__(self, bits: int) -> None:
        """bits: 2 or 4, of each number."""
        self.name = f"kivi-{bits}"
        self.bits = bits

    def sections(self, tokens: int, shape: KVShape) -> Sequence[Section]:
        heads, head_dim = shape.num_kv_heads, shape.head_dim
        inside = 8 // self.bits
        if head_dim % inside:
            raise ValueError(
                f"KV format {self.name} stores {inside} channels in a byte: head_dim {head_dim} is "
                f"not divisible by {inside}."
            )
        codes = (tokens, heads, head_dim // inside)
        # The last axis: scale and zero.
        by_channel = (-(-tokens // GROUP), heads, head_dim, 2)
        by_token = (tokens, heads, -(-head_dim // GROUP), 2)
        return [
            Section("keys", torch.uint8, codes),
            Section("key_scales", torch.float16, by_channel),
            Section("values", torch.uint8, codes),
            Section("value_scales", torch.float16, by_token),
        ]

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        key_codes, key_scales = quantize(finite(keys.float()), TOKENS, self.bits)
        value_codes, value_scales = quantize(finite(values.float()), CHANNELS, self.bits)
        return {
            "keys": pack(key_codes, self.bits),
            "key_scales": key_scales,
            "values": pack(value_codes, self.bits),
            "value_scales": value_scales,
        }

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        keys, values = unpack(parts["keys"], self.bits), unpack(parts["values"], self.bits)
        return (
            dequantize(keys, parts["key_scales"], TOKENS),
            dequantize(values, parts["value_scales"], CHANNELS),
        )


def quantize(
    rows: Tensor, axis: int, bits: int, outside: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes for the range of each group of the axis.

    rows: `[pages, tokens, kv_heads, head_dim]` float32; outside: bool like them, numbers that no
    range needs to hold -> codes like the rows, float32; scale and zero `[..., groups, ..., 2]`
    float16, groups in the axis's place.
    """
    least, most = (
        _groups(rows if outside is None else rows.masked_fill(outside, away), axis)
        for away in (torch.inf, -torch.inf)
    )
    least, most = least.amin(axis + 1, keepdim=True), most.amax(axis + 1, keepdim=True)
    if outside is not None:
        # Of a group that is outside as a whole.
        least, most = finite(least), finite(most)
    codes, scales = ranged(_groups(rows, axis), least, most, bits)
    codes = codes.flatten(axis, axis + 1).narrow(axis, 0, rows.shape[axis])
    return codes, scales.squeeze(axis + 2).movedim(0, -1)


def dequantize(codes: Tensor, scales: Tensor, axis: int) -> Tensor:
    """The reverse of `quantize`, float32."""
    of_each = torch.arange(codes.shape[axis], device=codes.device) // GROUP
    scale, zero = scales.float().index_select(axis, of_each).unbind(-1)
    return codes * scale + zero


def _groups(rows: Tensor, axis: int) -> Tensor:
    """The axis as `[groups, GROUP]`; the last of it is repeated, which widens no range."""
    missing = -rows.shape[axis] % GROUP
    if missing:
        again = rows.narrow(axis, -1, 1).repeat_interleave(missing, axis)
        rows = torch.cat((rows, again), axis)
    grouped: Tensor = rows.unflatten(axis, (-1, GROUP))
    return grouped
