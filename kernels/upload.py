"""Integers on their way to the device, one copy for a step's worth of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """`[n]`, copied without waiting for the device."""
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    # The allocator keeps pinned memory until the copy is done.
    return host.pin_memory().to(device, non_blocking=True)
