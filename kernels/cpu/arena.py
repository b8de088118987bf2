"""Memory for what is computed in a step: used again as soon as nobody reads it.

A recorded step writes to the same addresses every time; if each intermediate result had memory of
its own, little of it would still be in a cache when the step comes again. And the results of a
prompt are so large that an allocator gives their memory back to the system after every operation.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from bisect import bisect_left, insort
from typing import TypeVar

import torch
from torch import Tensor

_ALIGNMENT = 64

T = TypeVar("T")


class Arena:
    """Gives out tensors; the memory of one goes to the next when no tensor and no view is left."""

    def __init__(self) -> None:
        # By address; never given back, because recordings know the addresses.
        self._blocks: dict[int, Tensor] = {}
        # (bytes, address), ascending.
        self._free: list[tuple[int, int]] = []
        # The same, as they come back: a tensor may go at any moment, and on any thread.
        self._returned: list[tuple[int, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes, address = self._take(max(1, math.prod(shape) * dtype.itemsize))
        # A tensor's storage holds the buffer, and so do all of its views.
        buffer = (ctypes.c_char * nbytes).from_address(address)
        weakref.finalize(buffer, self._give_back, (nbytes, address))
        return _tensor(buffer, shape, dtype)

    def _give_back(self, block: tuple[int, int]) -> None:
        """A method, so that what is given out keeps the arena."""
        self._returned.append(block)

    def lasting(self, field: T) -> T | int:
        """The field, or its address where the memory is the arena's: a reference to the tensor
        would keep others from using it."""
        if not isinstance(field, Tensor) or field.untyped_storage().data_ptr() not in self._blocks:
            return field
        return field.data_ptr()

    def _take(self, nbytes: int) -> tuple[int, int]:
        """The smallest free block that is large enough, or a new one."""
        while self._returned:
            insort(self._free, self._returned.pop())
        place = bisect_left(self._free, (nbytes, 0))
        if place < len(self._free):
            return self._free.pop(place)
        # A power of two: else prompts that grow by a token each need a new block every time. What
        # is never written to takes no memory.
        nbytes = 1 << (nbytes - 1).bit_length()
        block = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8)
        address = -(-block.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        self._blocks[address] = block
        return nbytes, address


def tensor_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What lies there now; the memory may be used for something else."""
    buffer = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return _tensor(buffer, shape, dtype)


def _tensor(
    buffer: ctypes.Array[ctypes.c_char], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    count = math.prod(shape)
    if not count:  # torch has no buffers without numbers
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)
