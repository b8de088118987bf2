"""Numbers on their way to the device, one copy for a step's worth of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

_TYPE_CODES = {torch.int32: "i", torch.int64: "q", torch.float32: "f", torch.float64: "d"}


def upload(
    values: Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """`[n]`, copied without waiting for the device."""
    if isinstance(values, Tensor):
        host = values.to(dtype)
    elif values:
        # Half the time that torch takes with a list (33,000 numbers: 0.7 ms).
        host = torch.frombuffer(array(_TYPE_CODES[dtype], values), dtype=dtype)
    else:
        host = torch.empty(0, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    # The allocator keeps pinned memory until the copy is done.
    return host.pin_memory().to(device, non_blocking=True)
