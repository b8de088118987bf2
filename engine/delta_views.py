"""Packed deltas as the kernels take them: views of the pool's bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.adapters_store.packed_deltas import (
    PackedCirculant,
    PackedColumns,
    PackedKronecker,
    PackedLowRank,
    PackedOneBit,
    PackedRotate,
    PackedRows,
    PackedScale,
    PackedSparse,
    PackedTopK,
)
from polydelta.adapters_store.packed_tensors import (
    LowRankMatrix,
    PackedMatrix,
    matrix_view,
    vector_view,
)
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

# Kinds of `y += f(x)`, and of `y = f(y)`.
PackedAdd = (
    PackedLowRank
    | PackedSparse
    | PackedColumns
    | PackedRows
    | PackedOneBit
    | PackedKronecker
    | PackedCirculant
    | PackedTopK
)
PackedChange = PackedScale | PackedRotate


def add_weights(delta: PackedAdd, data: Tensor, dtype: torch.dtype) -> AddWeights:
    """data: the layer's bytes; dtype: of the adapter's matrices."""
    match delta:
        case PackedLowRank():
            return low_rank_view(delta, data, dtype)
        case PackedSparse():
            return sparse_view(delta, data)
        case PackedColumns():
            indices = vector_view(data, delta.indices)
            return ColumnsWeights(delta.out_start, indices, matrix_view(data, delta.block_t, dtype))
        case PackedRows():
            indices = vector_view(data, delta.indices)
            return RowsWeights(indices, matrix_view(data, delta.block, dtype))
        case PackedOneBit():
            bits = matrix_view(data, delta.bits, torch.uint8)
            return OneBitWeights(delta.out_start, bits, vector_view(data, delta.scale))
        case PackedKronecker():
            left, right = (matrix_view(data, m, dtype) for m in (delta.left, delta.right))
            return KroneckerWeights(delta.out_start, left, right)
        case PackedCirculant():
            kernel = matrix_view(data, delta.kernel, dtype).unflatten(0, (-1, delta.columns))
            return CirculantWeights(delta.out_start, kernel)
        case PackedTopK():
            a, b_t = (matrix_view(data, m, dtype) for m in (delta.a, delta.b_t))
            bias = vector_view(data, delta.bias)
            return TopKWeights(delta.out_start, delta.keep, a, bias, b_t)


def change_weights(delta: PackedChange, data: Tensor) -> ChangeWeights:
    """data: the layer's bytes."""
    match delta:
        case PackedScale():
            return ScaleWeights(delta.out_start, vector_view(data, delta.vector))
        case PackedRotate():
            cos, sin, partner = (
                vector_view(data, vector) for vector in (delta.cos, delta.sin, delta.partner)
            )
            return RotateWeights(delta.out_start, cos, sin, partner)


def low_rank_view(delta: PackedLowRank, data: Tensor, dtype: torch.dtype) -> LowRankWeights:
    blocks = tuple(
        LowRankBlock(block.out_start, block.rank_start, low_rank_matrix(data, block.b_t, dtype))
        for block in delta.blocks
    )
    return LowRankWeights(low_rank_matrix(data, delta.a, dtype), blocks)


def low_rank_matrix(data: Tensor, matrix: LowRankMatrix, dtype: torch.dtype) -> Matrix:
    """dtype: where it is not quantised."""
    if isinstance(matrix, PackedMatrix):
        return matrix_view(data, matrix, dtype)
    codes = matrix_view(data, matrix.codes, torch.int8 if matrix.bits == 8 else torch.uint8)
    scales = matrix_view(data, matrix.scales, torch.float16)
    return QuantizedMatrix(codes, scales, matrix.columns)


def sparse_view(delta: PackedSparse, data: Tensor) -> SparseWeights:
    return SparseWeights(
        vector_view(data, delta.row_pointers),
        vector_view(data, delta.columns),
        vector_view(data, delta.values),
    )
