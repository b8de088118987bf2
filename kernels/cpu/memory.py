"""Memory that the system gives when it is first written to."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch
from torch import Tensor


def lazy_zeros(shape: tuple[int, ...]) -> Tensor:
    """uint8. Writing zeros to 2 GiB takes a second or two; of large pages, which the system is
    asked for, it fills only those that are used, and quickly."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(1, math.prod(shape)), flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel may be built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, count=math.prod(shape)).view(shape)
