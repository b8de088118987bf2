"""The form in which an adapter lies in the pool: one run of bytes for each decoder layer.

For a fused linear with parts q, k and v the bytes are, each row padded to ALIGNMENT:

    A of q | A of k | A of v      one matrix [sum of ranks, in], so one shrink serves all parts
    B of q, transposed            [rank of q, out of q]
    B of k, transposed            ...
    row pointers, columns, values of the entries of all parts, as one CSR over the fused rows

B is transposed so that its rows are as long as a kernel's inner block likes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear
from polydelta.adapters_store.delta import Adapter, Delta, LowRank, Sparse
from polydelta.adapters_store.errors import InvalidAdapterError

# Bytes. Every tensor and every row starts on it, so that a kernel's inner block lies in one page.
ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix of the adapter's dtype whose rows are padded up to ALIGNMENT."""

    # Bytes from the start of the layer's data.
    offset: int
    # (rows, columns)
    shape: tuple[int, int]
    # In elements.
    row_stride: int


@dataclass(frozen=True, eq=False)
class PackedVector:
    """Elements one after the other."""

    # Bytes from the start of the layer's data.
    offset: int
    length: int
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class LowRankBlock:
    """What one part of a fused linear takes of the shrunk input, and the outputs that it adds to:
    `y[out_start : out_start + out_features] += (A x)[rank_start : rank_start + rank] @ b_t`."""

    out_start: int
    out_features: int
    rank_start: int
    rank: int
    # [rank, out_features]
    b_t: PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedLowRank:
    """The low-rank deltas of one fused linear."""

    # Index into BaseLayout.linears.
    linear: int
    # [sum of ranks, in]
    a: PackedMatrix
    blocks: tuple[LowRankBlock, ...]


@dataclass(frozen=True, eq=False)
class PackedSparse:
    """The sparse deltas of one fused linear, as one CSR over its stacked output rows."""

    # Index into BaseLayout.linears.
    linear: int
    # (out of all parts, in)
    shape: tuple[int, int]
    # [out + 1], int32
    row_pointers: PackedVector
    # [nnz], int32; ascending within a row
    columns: PackedVector
    # [nnz], the adapter's dtype
    values: PackedVector


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """All deltas of one decoder layer; empty when it has none."""

    # [nbytes] uint8, contiguous, a multiple of ALIGNMENT
    data: Tensor
    deltas: tuple[PackedLowRank | PackedSparse, ...]


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter, ready to be copied into pages."""

    # sha256 of the content that it was made from.
    digest: str
    # Of matrices and of sparse values.
    dtype: torch.dtype
    # One for each decoder layer of the base.
    layers: tuple[PackedLayer, ...]

    @property
    def bytes_per_layer(self) -> int:
        """Of the largest layer: a page exists in every layer, so it sets the number of pages."""
        return max((layer.data.numel() for layer in self.layers), default=0)

    @property
    def nbytes(self) -> int:
        return sum(layer.data.numel() for layer in self.layers)


def pack(adapter: Adapter, layout: BaseLayout, dtype: torch.dtype) -> PackedAdapter:
    """Converts to dtype and lays out for the pool.

    Raises InvalidAdapterError when the adapter does not fit the layout, or its numbers the dtype.
    """
    for module, deltas in adapter.modules.items():
        for delta in deltas:
            if delta.shape != layout.module_shapes.get(module):
                raise InvalidAdapterError(
                    f"The adapter changes {module!r} by a matrix of shape {list(delta.shape)}, "
                    "which the base model does not have: load it over the base that it was "
                    "trained on."
                )
    layers = tuple(_pack_layer(adapter, layout, layer, dtype) for layer in range(layout.num_layers))
    return PackedAdapter(adapter.digest, dtype, layers)


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


class _Writer:
    """Gives tensors their places in a layer, then writes them all at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._nbytes = 0
        self._matrices: list[tuple[PackedMatrix, Tensor]] = []
        self._vectors: list[tuple[PackedVector, Tensor]] = []

    def matrix(self, tensor: Tensor) -> PackedMatrix:
        rows, columns = tensor.shape
        row_bytes = _aligned(columns * self._dtype.itemsize)
        packed = PackedMatrix(self._nbytes, (rows, columns), row_bytes // self._dtype.itemsize)
        self._matrices.append((packed, tensor))
        self._nbytes += rows * row_bytes
        return packed

    def vector(self, tensor: Tensor, dtype: torch.dtype) -> PackedVector:
        packed = PackedVector(self._nbytes, len(tensor), dtype)
        self._vectors.append((packed, tensor))
        self._nbytes += _aligned(len(tensor) * dtype.itemsize)
        return packed

    def data(self) -> Tensor:
        data = torch.zeros(self._nbytes, dtype=torch.uint8)
        for matrix, tensor in self._matrices:
            matrix_view(data, matrix, self._dtype).copy_(tensor)
        for vector, tensor in self._vectors:
            vector_view(data, vector).copy_(tensor)
        return data


def _pack_layer(
    adapter: Adapter, layout: BaseLayout, layer: int, dtype: torch.dtype
) -> PackedLayer:
    writer = _Writer(dtype)
    packed: list[PackedLowRank | PackedSparse] = []
    for index, linear in enumerate(layout.linears):
        low_rank: list[tuple[int, Sequence[LowRank]]] = []
        sparse: list[tuple[int, Sparse]] = []
        for part, out_start in linear.spans():
            name = layout.module_name(layer, part.name)
            lows, sparses = _by_kind(name, adapter.modules.get(name, ()), dtype)
            if lows:
                low_rank.append((out_start, lows))
            sparse += [(out_start, delta) for delta in sparses]
        if low_rank:
            packed.append(_pack_low_rank(writer, index, low_rank))
        if sparse:
            packed.append(_pack_sparse(writer, index, linear, sparse, dtype))
    return PackedLayer(writer.data(), tuple(packed))


def _by_kind(
    module: str, deltas: Iterable[Delta], dtype: torch.dtype
) -> tuple[list[LowRank], list[Sparse]]:
    low_rank: list[LowRank] = []
    sparse: list[Sparse] = []
    for delta in deltas:
        match delta:
            case LowRank():
                _check_range(module, (delta.a, delta.b), dtype)
                low_rank.append(delta)
            case Sparse():
                _check_range(module, (delta.values,), dtype)
                sparse.append(delta)
            case _:
                assert_never(delta)
    return low_rank, sparse


def _pack_low_rank(
    writer: _Writer, linear: int, parts: Sequence[tuple[int, Sequence[LowRank]]]
) -> PackedLowRank:
    """parts: where a part's outputs start, and its deltas, whose ranks are concatenated."""
    a = writer.matrix(torch.cat([delta.a for _, deltas in parts for delta in deltas]))
    blocks: list[LowRankBlock] = []
    rank_start = 0
    for out_start, deltas in parts:
        b_t = torch.cat([delta.b.T for delta in deltas])
        rank, out_features = b_t.shape
        blocks.append(LowRankBlock(out_start, out_features, rank_start, rank, writer.matrix(b_t)))
        rank_start += rank
    return PackedLowRank(linear, a, tuple(blocks))


def _pack_sparse(
    writer: _Writer,
    index: int,
    linear: FusedLinear,
    parts: Sequence[tuple[int, Sparse]],
    dtype: torch.dtype,
) -> PackedSparse:
    """parts: where a part's outputs start, and a delta of it; entries that meet are summed."""
    shape = (linear.out_features, linear.in_features)
    places = torch.cat([_places(delta, out_start) for out_start, delta in parts])
    entries, to_entry = torch.unique(places, return_inverse=True)
    values = torch.zeros(len(entries), dtype=torch.float32)
    values.index_add_(0, to_entry, torch.cat([delta.values.float() for _, delta in parts]))
    row_pointers = torch.zeros(shape[0] + 1, dtype=torch.int64)
    row_pointers[1:] = (entries // shape[1]).bincount(minlength=shape[0]).cumsum(0)
    return PackedSparse(
        index,
        shape,
        writer.vector(row_pointers, torch.int32),
        writer.vector(entries % shape[1], torch.int32),
        writer.vector(values, dtype),
    )


def _places(delta: Sparse, out_start: int) -> Tensor:
    """[nnz] int64: row * in + column of each entry, rows counted in the fused linear."""
    rows = torch.arange(delta.shape[0]).repeat_interleave(delta.row_pointers.diff().long())
    return (rows + out_start) * delta.shape[1] + delta.columns


def _check_range(module: str, tensors: Iterable[Tensor], dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    for tensor in tensors:
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        if not largest <= limit:
            raise InvalidAdapterError(
                f"The adapter changes {module!r} by {largest:g}, which does not fit {dtype} "
                f"(up to {limit:g}): serve in a wider dtype, or take an earlier checkpoint."
            )


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
