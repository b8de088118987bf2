"""One byte a channel, and a scale for each token and head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from polydelta.kernels.kv_formats.codes import finite, half, steps
from polydelta.kernels.kv_formats.format import KVShape, Parts
from polydelta.kernels.kv_formats.per_token import PerToken
from polydelta.kernels.kv_layout import Section


class _Scaled(PerToken):
    """The largest magnitude of a row is the largest code."""

    # As codes lie in the page.
    stored: torch.dtype
    largest: float

    def _sections(self, tokens: int, shape: KVShape) -> Sequence[Section]:
        heads = shape.num_kv_heads
        return [
            Section("s", self.stored, (tokens, heads, shape.head_dim)),
            Section("_scales", torch.float16, (tokens, heads)),
        ]

    def _encode(self, rows: Tensor) -> Parts:
        rows = finite(rows.float())
        scales = half(rows.abs().amax(-1) / self.largest)
        codes = rows / steps(scales)[..., None]
        # A scale that was rounded down leaves the largest above.
        return {"s": self._coded(codes.clamp_(-self.largest, self.largest)), "_scales": scales}

    def _decode(self, parts: Parts) -> Tensor:
        return self._numbers(parts["s"]) * parts["_scales"].float()[..., None]

    @abstractmethod
    def _coded(self, rows: Tensor) -> Tensor:
        """The nearest codes of numbers between -largest and largest."""

    @abstractmethod
    def _numbers(self, codes: Tensor) -> Tensor:
        """float32."""


class Int8(_Scaled):
    """Whole numbers from -127 to 127."""

    name = "int8"
    stored = torch.int8
    largest = 127.0

    def _coded(self, rows: Tensor) -> Tensor:
        return rows.round_().to(torch.int8)

    def _numbers(self, codes: Tensor) -> Tensor:
        return codes.float()


class Fp8(_Scaled):
    """Floats of 4 bits of exponent and 3 of fraction, e4m3fn (arXiv:2209.05433); as bytes, since
    not every device and operation knows them."""

    name = "fp8"
    # The default model's perplexity rises by 0.3 %, and by 0.7 % where each token is encoded at
    # once.
    by_page = True
    # A code is off in proportion to its number, so errors of keys would lie in the few channels
    # that are large in all of them: the perplexity would rise by 0.7 % too.
    rotates_keys = True
    stored = torch.uint8
    largest = 448.0

    def _coded(self, rows: Tensor) -> Tensor:
        return rows.to(torch.float8_e4m3fn).view(torch.uint8)

    def _numbers(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()
