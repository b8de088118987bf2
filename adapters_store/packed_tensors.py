"""Tensors as they lie among a layer's bytes in the pool."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Bytes. Every tensor and every row starts on it, so that a kernel's inner block lies in one page.
ALIGNMENT = 64
# Of rows of bytes, which are short, as each byte has 8 signs.
BYTES_ALIGNMENT = 16


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix whose rows are padded: of signs up to BYTES_ALIGNMENT, others up to ALIGNMENT."""

    # Bytes from the start of the layer's data.
    offset: int
    # (rows, columns)
    shape: tuple[int, int]
    # In elements.
    row_stride: int


@dataclass(frozen=True)
class PackedQuantizedMatrix:
    """A matrix in 8 or 4 bits, as `row_codes.py` makes it."""

    bits: int
    columns: int
    # [rows, columns] int8, or [rows, columns / 2 rounded up] uint8 with two codes in a byte
    codes: PackedMatrix
    # [rows, groups] float16
    scales: PackedMatrix


# A matrix of a low-rank delta.
LowRankMatrix = PackedMatrix | PackedQuantizedMatrix


@dataclass(frozen=True)
class PackedVector:
    """Elements one after the other."""

    # Bytes from the start of the layer's data.
    offset: int
    length: int
    dtype: torch.dtype


def matrix_view(data: Tensor, matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """A view of shape `matrix.shape` into a layer's data; rows are `row_stride` elements apart.

    data: [at least the layer's nbytes] uint8, contiguous; its storage offset may be any multiple
    of ALIGNMENT. The same goes for `vector_view`.
    """
    rows, columns = matrix.shape
    end = matrix.offset + rows * matrix.row_stride * dtype.itemsize
    return data[matrix.offset : end].view(dtype).view(rows, matrix.row_stride)[:, :columns]


def vector_view(data: Tensor, vector: PackedVector) -> Tensor:
    """A view of shape `[vector.length]` into a layer's data."""
    end = vector.offset + vector.length * vector.dtype.itemsize
    return data[vector.offset : end].view(vector.dtype)
