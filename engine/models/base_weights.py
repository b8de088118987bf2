"""The base model's weights for adapters that need them to be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.weights import TensorSource


class CheckpointWeights:
    """Reads from the checkpoint's files whenever it is asked, and keeps nothing: what an adapter
    needs it needs once, and the decoder's own weights are stacked."""

    def __init__(self, tensors: TensorSource, dtype: torch.dtype) -> None:
        """dtype: the one that the model is served in."""
        self._tensors = tensors
        self._dtype = dtype
        # Sources open files when they are first read from, and loaders run on threads.
        self._lock = Lock()

    def read(self, name: str) -> Tensor:
        """A tensor by its Hugging Face name, rounded to the served dtype, in float32.

        It may be a view of a file that others read too: not to be changed in place. Raises
        ModelError.
        """
        if name not in self._tensors.names():
            raise ModelError(f"The checkpoint has no tensor {name!r}.")
        with self._lock:
            tensor = self._tensors.read(name)
        return tensor.to(self._dtype).to(torch.float32)


def checkpoint_layout(checkpoint: Checkpoint, dtype: torch.dtype) -> BaseLayout:
    """What adapters are read against: the layout, with the weights as they are in `dtype`."""
    weights = CheckpointWeights(checkpoint.tensors, dtype)
    layout = base_layout(checkpoint.config, checkpoint.id, weights)
    return replace(layout, weights_id=_weights_id(checkpoint.files))


def _weights_id(files: Iterable[Path]) -> str:
    """Changes when one of the files is rewritten, and differs between folders of one name."""
    told = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()
