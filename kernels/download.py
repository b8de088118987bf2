"""Results on their way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Download:
    """Tensors that are copied without waiting for the device, which goes on meanwhile."""

    def __init__(self, *tensors: Tensor) -> None:
        """All on one device; copied behind what its current stream has to do."""
        # Into pinned memory, where they come from CUDA; nothing is copied on the host.
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._done: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> list[Tensor]:
        """Copies on the host, in the order of the tensors."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensors
