"""How keys and values are stored in a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polydelta.kernels.kv_layout import Section

# Of a page, where a format asks for no other number.
NATIVE_TOKENS = 16

# By the names of sections, `[pages, *section.shape]` each.
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class KVShape:
    """Of one token's keys, or values, as the model computes them."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


class KVFormat(Protocol):
    """A pure function of a page's own tokens: whoever computes them, the page is the same."""

    # As `--kv-format` has it.
    name: str
    # Whether the page is encoded when its last token is known. Until then its tokens are native, in
    # a buffer outside of the pool. Otherwise each token is encoded at once, by itself: then the
    # first axis of each section is the page's tokens.
    by_page: bool
    # Of native KV in a page, where an operator sets none.
    native_tokens: int
    # Whether keys, and queries with them, are rotated before anything is done with them
    # (`kv_rotation.py`).
    rotates_keys: bool

    def sections(self, tokens: int, shape: KVShape) -> Sequence[Section]:
        """Of a page with so many tokens. Raises ValueError for a shape that it cannot store."""

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        """keys, values: `[pages, tokens, kv_heads, head_dim]` of the model's dtype, `tokens` being
        1 or more where the format is not by page -> what goes into the sections."""

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Keys and values `[pages, tokens, kv_heads, head_dim]`, float32."""
