"""Where a decoder's tensors come from, by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from polydelta.engine.models.errors import ModelError
from polydelta.kernels.quantized_weight import QuantizedWeight, quantize

CPU = torch.device("cpu")


class TensorSource(Protocol):
    """A checkpoint's tensors, read one at a time."""

    def names(self) -> Collection[str]:
        """Hugging Face names, e.g. `model.layers.0.self_attn.q_proj.weight`."""

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised, in whatever float dtype the file has. Raises ModelError."""


@runtime_checkable
class QuantizedSource(TensorSource, Protocol):
    """One whose tensors may have 4 or 8 bits."""

    def read_quantized(self, name: str) -> QuantizedWeight | None:
        """The tensor as the file has it; None where it is in no format of ours."""


class Weights:
    """Hands out tensors, checked and converted, and knows what nobody asked for."""

    def __init__(
        self,
        source: TensorSource,
        dtype: torch.dtype,
        report: Callable[[int, int], None],
        bits: int | None = None,
        device: torch.device = CPU,
    ) -> None:
        """bits: those of a weight of a linear layer, 4 or 8; None for the dtype's. device: where
        tensors are handed out; quantised ones always in host memory."""
        self.bits = bits
        self._device = device
        self._source = source
        self._dtype = dtype
        self._report = report
        self._names = frozenset(source.names())
        self._unused = set(self._names)
        self._total = len(self._unused)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in the engine's dtype; ModelError if it is missing or has another shape."""
        self._require(name)
        tensor = self._source.read(name)
        self._give(name, tuple(tensor.shape), shape)
        return tensor.to(self._device, self._dtype)

    def take_quantized(self, name: str, shape: tuple[int, int], bits: int) -> QuantizedWeight:
        """The matrix with at most so many bits: its file's own codes, or the nearest there are.
        ModelError as in `take`, and for numbers that cannot be quantised."""
        self._require(name)
        weight = None
        if isinstance(self._source, QuantizedSource):
            weight = self._source.read_quantized(name)
        if weight is None or weight.bits > bits:
            try:
                weight = quantize(self._source.read(name), bits)
            except ValueError as error:
                raise ModelError(f"Tensor {name!r} cannot be quantised: {error}.") from None
        self._give(name, weight.shape, shape)
        return weight

    def leave(self, name: str) -> None:
        """The tensor may be there, and is not needed."""
        self._unused.discard(name)

    def _require(self, name: str) -> None:
        if name not in self._names:
            raise ModelError(f"The checkpoint has no tensor {name!r}.")

    def _give(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise ModelError(f"Tensor {name!r} has shape {shape}, but the config says {expected}.")
        self._unused.discard(name)
        self._report(self._total - len(self._unused), self._total)

    def finish(self) -> None:
        """Raises ModelError if the checkpoint holds weights that the decoder did not use."""
        left = sorted(name for name in self._unused if not name.endswith("rotary_emb.inv_freq"))
        if left:
            raise ModelError(
                f"The checkpoint has {len(left)} tensors that this decoder does not use, "
                f"e.g. {left[0]!r}; serving it would give wrong answers."
            )
