"""Keys and values as the model computes them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from polydelta.kernels.kv_formats.format import NATIVE_TOKENS, KVShape, Parts
from polydelta.kernels.kv_layout import Section


class Native:
    """See `format.KVFormat`."""

    name = "native"
    by_page = False
    native_tokens = NATIVE_TOKENS
    rotates_keys = False

    def sections(self, tokens: int, shape: KVShape) -> Sequence[Section]:
        size = (tokens, shape.num_kv_heads, shape.head_dim)
        # Without a gap: a page is `[2, tokens, kv_heads, head_dim]`, as other kernels read it too.
        packed = shape.dtype.itemsize
        return [
            Section("keys", shape.dtype, size, packed),
            Section("values", shape.dtype, size, packed),
        ]

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        return {"keys": keys, "values": values}

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        return parts["keys"].float(), parts["values"].float()
