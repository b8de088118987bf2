"""Where a decoder's tensors come from, by their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import torch
from torch import Tensor

from polydelta.engine.models.errors import ModelError


class TensorSource(Protocol):
    """A checkpoint's tensors, read one at a time."""

    def names(self) -> Collection[str]:
        """Hugging Face names, e.g. `model.layers.0.self_attn.q_proj.weight`."""

    def read(self, name: str) -> Tensor:
        """The tensor, dequantised, in whatever float dtype the file has. Raises ModelError."""


class Weights:
    """Hands out each tensor once, checked and converted, and knows what nobody asked for."""

    def __init__(
        self, source: TensorSource, dtype: torch.dtype, report: Callable[[int, int], None]
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._report = report
        self._unused = set(source.names())
        self._total = len(self._unused)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in the engine's dtype; ModelError if it is missing or has another shape."""
        if name not in self._unused:
            raise ModelError(f"The checkpoint has no tensor {name!r}.")
        tensor = self._source.read(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"Tensor {name!r} has shape {tuple(tensor.shape)}, but the config says {shape}."
            )
        self._unused.remove(name)
        self._report(self._total - len(self._unused), self._total)
        return tensor.to(self._dtype)

    def leave(self, name: str) -> None:
        """The tensor may be there, and is not needed."""
        self._unused.discard(name)

    def finish(self) -> None:
        """Raises ModelError if the checkpoint holds weights that the decoder did not use."""
        left = sorted(name for name in self._unused if not name.endswith("rotary_emb.inv_freq"))
        if left:
            raise ModelError(
                f"The checkpoint has {len(left)} tensors that this decoder does not use, "
                f"e.g. {left[0]!r}; serving it would give wrong answers."
            )
