"""Formats whose tokens are encoded each by itself, keys as values are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from polydelta.kernels.kv_formats.format import NATIVE_TOKENS, KVShape, Parts
from polydelta.kernels.kv_layout import Section


class PerToken(ABC):
    """See `format.KVFormat`. Sections of one side are named by what follows "key" or "value"."""

    name: str
    by_page = False
    native_tokens = NATIVE_TOKENS
    rotates_keys = False

    def sections(self, tokens: int, shape: KVShape) -> Sequence[Section]:
        one = self._sections(tokens, shape)
        return [
            replace(section, name=side + section.name)
            for side in ("key", "value")
            for section in one
        ]

    def encode(self, keys: Tensor, values: Tensor) -> Parts:
        sides = {"key": self._encode(keys), "value": self._encode(values)}
        return {side + name: part for side, parts in sides.items() for name, part in parts.items()}

    def decode(self, parts: Parts) -> tuple[Tensor, Tensor]:
        return self._decode(_side(parts, "key")), self._decode(_side(parts, "value"))

    @abstractmethod
    def _sections(self, tokens: int, shape: KVShape) -> Sequence[Section]:
        """Of one side."""

    @abstractmethod
    def _encode(self, rows: Tensor) -> Parts:
        """rows: `[pages, tokens, kv_heads, head_dim]` of the model's dtype."""

    @abstractmethod
    def _decode(self, parts: Parts) -> Tensor:
        """`[pages, tokens, kv_heads, head_dim]` float32."""


def _side(parts: Parts, side: str) -> Parts:
    return {name.removeprefix(side): part for name, part in parts.items() if name.startswith(side)}
