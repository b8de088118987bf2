"""How oneDNN lays a packed weight out in memory, so that single entries of it can be written.

torch shows a packed weight as an opaque tensor. What is behind it is a permutation: blocks of rows,
in each of which adjacent columns come in pairs (on a machine with AVX-512 64 rows, in bfloat16 two
columns and in float32 one), padded with zeros.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

# Rows that the packed layout is chosen for: a full decode batch.
PACKED_FOR_ROWS = 16
# Rows in a block, and columns in a pair; (1, 1) is a plain matrix.
_BLOCKS = tuple(product((64, 48, 32, 24, 16, 8, 1), (1, 2, 4)))


@dataclass(frozen=True)
class PackedLayout:
    """Memory of a weight `[out, in]`: `[out / rows, in / pair, rows, pair]`, both rounded up."""

    rows: int
    pair: int
    # Columns with their padding.
    in_features: int

    def places(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Where entries lie, in elements from the start; int64 like `rows` and `columns`."""
        block = rows // self.rows * (self.rows * self.in_features)
        pair = columns // self.pair * (self.rows * self.pair)
        return block + pair + rows % self.rows * self.pair + columns % self.pair

    def blocks(self, memory: Tensor) -> Tensor:
        """`[blocks, in / pair, rows, pair]`, a view of a packed weight's memory."""
        return memory.view(-1, self.in_features // self.pair, self.rows, self.pair)


class Packing(Protocol):
    """How the weights of a linear layer are packed."""

    @property
    def layout(self) -> PackedLayout | None:
        """None where it is not known."""

    def pack(self, weight: Tensor) -> Tensor:
        """weight: `[out, in]`."""

    def unpack(self, packed: Tensor) -> Tensor:
        """`[out, in]`."""

    def memory(self, packed: Tensor) -> Tensor:
        """All elements in the order in which they lie, `[*]`; valid while the packed weight
        lives."""


class OneDnnPacking:
    """As oneDNN likes it."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype

    @property
    def layout(self) -> PackedLayout | None:
        return layout_of(self._shape, self._dtype)

    def pack(self, weight: Tensor) -> Tensor:
        return pack(weight)

    def unpack(self, packed: Tensor) -> Tensor:
        return packed.to_dense()

    def memory(self, packed: Tensor) -> Tensor:
        return memory_of(packed)


def pack(weight: Tensor) -> Tensor:
    """weight: `[out, in]`. `to_dense()` gives it back."""
    with torch.no_grad():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(
            weight.contiguous(), PACKED_FOR_ROWS
        )
    return packed


def memory_of(packed: Tensor) -> Tensor:
    """All elements of a packed weight in the order in which they lie, `[*]`; valid while the packed
    weight lives."""
    nbytes = torch.ops.mkldnn._nbytes(packed)
    address = torch.ops.mkldnn.data_ptr(packed)
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=packed.dtype)


@cache
def layout_of(shape: torch.Size, dtype: torch.dtype) -> PackedLayout | None:
    """The layout of packed weights of a shape and dtype on this machine, found by packing random
    ones and looking where each entry went; None where it is none that we know."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = pack(weight)
    memory = memory_of(packed)
    for layout in _candidates(shape, len(memory)):
        rows = layout.blocks(memory).transpose(1, 2).flatten(0, 1).flatten(1)
        if torch.equal(rows[: shape[0], : shape[1]], weight):
            return layout
    return None


def _candidates(shape: torch.Size, num_elements: int) -> Iterator[PackedLayout]:
    """Layouts of the right size."""
    out_features, in_features = shape
    for rows, pair in _BLOCKS:
        padded, rest = divmod(num_elements, -(-out_features // rows) * rows)
        if not rest and padded >= in_features and padded % pair == 0:
            yield PackedLayout(rows, pair, padded)
