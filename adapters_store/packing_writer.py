"""One layer's bytes, as they are laid out."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.packed_tensors import (
    ALIGNMENT,
    BYTES_ALIGNMENT,
    LowRankMatrix,
    PackedMatrix,
    PackedQuantizedMatrix,
    PackedVector,
    matrix_view,
    vector_view,
)
from polydelta.adapters_store.row_codes import quantize_rows


class LayerWriter:
    """Gives tensors their places in a layer, then writes them all at once."""

    def __init__(self, dtype: torch.dtype, bits: int | None = None) -> None:
        """dtype: of matrices; bits: of low-rank ones in its place, 8 or 4."""
        self.dtype = dtype
        self.bits = bits
        self._nbytes = 0
        self._matrices: list[tuple[PackedMatrix, Tensor, torch.dtype]] = []
        self._vectors: list[tuple[PackedVector, Tensor]] = []

    def matrix(self, tensor: Tensor) -> PackedMatrix:
        return self._matrix(tensor, self.dtype, ALIGNMENT)

    def low_rank_matrix(self, tensor: Tensor) -> LowRankMatrix:
        """Raises InvalidAdapterError for numbers that the bits cannot hold."""
        if self.bits is None:
            return self.matrix(tensor)
        codes, scales = quantize_rows(tensor, self.bits)
        return PackedQuantizedMatrix(
            self.bits,
            tensor.shape[1],
            self._matrix(codes, codes.dtype, ALIGNMENT),
            self._matrix(scales, scales.dtype, ALIGNMENT),
        )

    def byte_matrix(self, tensor: Tensor) -> PackedMatrix:
        """tensor: uint8."""
        return self._matrix(tensor, torch.uint8, BYTES_ALIGNMENT)

    def vector(self, tensor: Tensor, dtype: torch.dtype) -> PackedVector:
        packed = PackedVector(self._nbytes, len(tensor), dtype)
        self._vectors.append((packed, tensor))
        self._nbytes += _aligned(len(tensor) * dtype.itemsize, ALIGNMENT)
        return packed

    def data(self) -> Tensor:
        """`[nbytes]` uint8."""
        data = torch.zeros(self._nbytes, dtype=torch.uint8)
        for matrix, tensor, dtype in self._matrices:
            matrix_view(data, matrix, dtype).copy_(tensor)
        for vector, tensor in self._vectors:
            vector_view(data, vector).copy_(tensor)
        return data

    def _matrix(self, tensor: Tensor, dtype: torch.dtype, alignment: int) -> PackedMatrix:
        rows, columns = tensor.shape
        row_bytes = _aligned(columns * dtype.itemsize, alignment)
        packed = PackedMatrix(self._nbytes, (rows, columns), row_bytes // dtype.itemsize)
        self._matrices.append((packed, tensor, dtype))
        self._nbytes += _aligned(rows * row_bytes, ALIGNMENT)
        return packed


def _aligned(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
