"""Adapters' deltas bound to the compiled kernels of `low_rank.c`, `quantized_low_rank.c`,
`deltas.c` and `one_bit.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from polydelta.kernels.cpu.native import Field, NativeLibrary, Struct
from polydelta.kernels.delta_groups import OutputBias
from polydelta.kernels.delta_weights import (
    AddWeights,
    ChangeWeights,
    CirculantWeights,
    ColumnsWeights,
    KroneckerWeights,
    LowRankBlock,
    LowRankWeights,
    Matrix,
    OneBitWeights,
    QuantizedMatrix,
    RotateWeights,
    RowsWeights,
    ScaleWeights,
    SparseWeights,
    TopKWeights,
)


@dataclass(frozen=True)
class Scratch:
    """Floats that a kernel works with."""

    # For each number of x, for each row, for each column of x, and besides.
    per_number: int = 0
    per_row: int = 0
    per_column: int = 0
    once: int = 0

    def size(self, rows: int, columns: int) -> int:
        """x: [rows, columns]."""
        of_rows = rows * (columns * self.per_number + self.per_row)
        return of_rows + columns * self.per_column + self.once


class NativeDelta:
    """A compiled kernel, bound to one delta's weights (matrices in bfloat16). Keeps them alive."""

    def __init__(
        self, library: NativeLibrary, name: str, fields: Sequence[Field], scratch: Scratch
    ) -> None:
        """name: of the function in C, fields: of its struct, in their order."""
        self.is_low_rank = name == "add_low_rank"
        self._library = library
        self._function = library.deltas[name]
        self.scratch = scratch
        self.struct = Struct(fields)
        self.size = self.struct.num_elements
        self._address = self.struct.address

    @property
    def function(self) -> int:
        """Its address."""
        return ctypes.cast(self._function, ctypes.c_void_p).value or 0

    def add(self, y: Tensor, x: Tensor) -> None:
        """y `[rows, out]` += f(x), x `[rows, in]`; columns of both are adjacent."""
        rows, columns = x.shape
        self._function(
            y.data_ptr(),
            y.stride(0),
            x.data_ptr(),
            x.stride(0),
            rows,
            columns,
            self._address,
            self._library.scratch(self.scratch.size(rows, columns)),
        )

    def change(self, y: Tensor) -> None:
        """y `[rows, out]` = f(y); its columns are adjacent."""
        rows = y.shape[0]
        scratch = self._library.scratch(self.scratch.size(rows, 0))
        self._function(y.data_ptr(), y.stride(0), None, 0, rows, 0, self._address, scratch)


def bind_bias(library: NativeLibrary, bias: OutputBias) -> NativeDelta:
    return NativeDelta(library, "add_bias", (bias.start, bias.count, bias.vector), Scratch())


def bind(library: NativeLibrary, weights: AddWeights | ChangeWeights) -> NativeDelta:
    """The order of fields and the size of the scratch are those of the C files."""
    match weights:
        case LowRankWeights():
            return _bind_low_rank(library, weights)
        case SparseWeights(row_pointers, columns, values):
            sparse = (len(row_pointers) - 1, row_pointers, columns, values)
            return NativeDelta(library, "add_sparse", sparse, Scratch(per_column=16, once=512))
        case ColumnsWeights(out_start, indices, block_t):
            count, out = block_t.shape
            of_columns = (out_start, out, count, indices, block_t, block_t.stride(0))
            return NativeDelta(library, "add_columns", of_columns, Scratch(once=out))
        case RowsWeights(indices, block):
            of_rows = (len(indices), indices, block, block.stride(0))
            return NativeDelta(library, "add_rows", of_rows, Scratch(per_number=1))
        case OneBitWeights(out_start, bits, scale):
            one_bit = (out_start, len(bits), bits, bits.stride(0), scale)
            return NativeDelta(library, "add_one_bit", one_bit, Scratch(per_number=1, per_row=16))
        case KroneckerWeights(out_start, left, right):
            (a, b), (c, d) = left.shape, right.shape
            kronecker = (out_start, a, b, c, d, left, left.stride(0), right, right.stride(0))
            return NativeDelta(
                library, "add_kronecker", kronecker, Scratch(per_column=1, once=(b + 1) * c)
            )
        case CirculantWeights(out_start, kernel):
            down, across, size = kernel.shape
            # The stride of an axis of length 1 says nothing.
            stride = kernel.stride(1) if across > 1 else kernel.stride(0)
            circulant = (out_start, down, across, size, kernel, stride)
            return NativeDelta(
                library, "add_circulant", circulant, Scratch(per_column=2, once=size)
            )
        case TopKWeights(out_start, keep, a, bias, b_t):
            rank, out = b_t.shape
            top_k = (out_start, out, rank, keep, a, a.stride(0), bias, b_t, b_t.stride(0))
            return NativeDelta(
                library, "add_top_k", top_k, Scratch(per_column=1, once=2 * rank + out)
            )
        case ScaleWeights(out_start, vector):
            scaled = (out_start, len(vector), vector)
            return NativeDelta(library, "scale", scaled, Scratch())
        case RotateWeights(out_start, cos, sin, partner):
            rotated = (out_start, len(cos), cos, sin, partner)
            return NativeDelta(library, "rotate", rotated, Scratch(once=len(cos)))


def _bind_low_rank(library: NativeLibrary, weights: LowRankWeights) -> NativeDelta:
    a, blocks = weights.a, Struct([f for block in weights.blocks for f in _block_fields(block)])
    rank, widest = a.shape[0], max(block.b_t.shape[1] for block in weights.blocks)
    low_rank = (rank, *_matrix_fields(a), len(weights.blocks), blocks)
    if isinstance(a, QuantizedMatrix):
        scratch = Scratch(per_number=1, per_row=rank + widest, per_column=1, once=widest)
        return NativeDelta(library, "add_quantized_low_rank", (a.bits, *low_rank), scratch)
    scratch = Scratch(per_number=1, per_row=rank, once=widest)
    return NativeDelta(library, "add_low_rank", low_rank, scratch)


def _block_fields(block: LowRankBlock) -> tuple[Field, ...]:
    rank, out = block.b_t.shape
    return block.out_start, out, block.rank_start, rank, *_matrix_fields(block.b_t)


def _matrix_fields(matrix: Matrix) -> tuple[Field, ...]:
    """Each tensor with the elements between its rows."""
    if isinstance(matrix, QuantizedMatrix):
        codes, scales = matrix.codes, matrix.scales
        return codes, codes.stride(0), scales, scales.stride(0)
    return matrix, matrix.stride(0)
