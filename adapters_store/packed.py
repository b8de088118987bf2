"""The form in which an adapter lies in the pool: one run of bytes for each decoder layer.

For a fused linear with parts q, k and v the bytes of its low-rank and sparse deltas are, each row
padded to ALIGNMENT:

    A of q | A of k | A of v      one matrix [sum of ranks, in], so one shrink serves all parts
    B of q, transposed            [rank of q, out of q]
    B of k, transposed            ...
    row pointers, columns, values of the entries of all parts, as one CSR over the fused rows

B is transposed so that its rows are as long as a kernel's inner block likes them. Other kinds lie
as their classes here say. What changes the embedding or the head is cut over the layers, because a
page exists in every one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.traits import AdapterTraits

# Bytes. Every tensor and every row starts on it, so that a kernel's inner block lies in one page.
ALIGNMENT = 64

# In the place of an index into `BaseLayout.linears`.
HEAD_LINEAR = -1
EMBEDDING_LINEAR = -2
# In the place of an index into `BaseLayout.norms`.
FINAL_NORM_INDEX = -1


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix whose rows are padded up to ALIGNMENT; of the adapter's dtype, or of bytes."""

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

    # Index into BaseLayout.linears; so it is in all classes below.
    linear: int
    # [sum of ranks, in]
    a: PackedMatrix
    blocks: tuple[LowRankBlock, ...]


@dataclass(frozen=True, eq=False)
class PackedSparse:
    """The sparse deltas of one fused linear, as one CSR over its stacked output rows."""

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
class PackedColumns:
    """`y[out_start:] += x[indices] @ block_t`."""

    linear: int
    out_start: int
    # [k], int32
    indices: PackedVector
    # [k, out of the part]
    block_t: PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedRows:
    """The changed rows of all parts of a fused linear: `y[indices] += block @ x`."""

    linear: int
    # [k], int32, rows counted in the fused linear
    indices: PackedVector
    # [k, in]
    block: PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedOneBit:
    """`linear_deltas.OneBit` of one part."""

    linear: int
    out_start: int
    in_features: int
    # [out of the part, in / 8 rounded up], uint8
    bits: PackedMatrix
    # [1], float32
    scale: PackedVector


@dataclass(frozen=True, eq=False)
class PackedKronecker:
    """`linear_deltas.Kronecker` of one part."""

    linear: int
    out_start: int
    # [a, b]
    left: PackedMatrix
    # [c, d]
    right: PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedCirculant:
    """`linear_deltas.Circulant` of one part."""

    linear: int
    out_start: int
    # Blocks side by side: in / size.
    columns: int
    # [out / size * columns, size]
    kernel: PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedTopK:
    """`linear_deltas.TopK` of one part."""

    linear: int
    out_start: int
    keep: int
    # [rank, in]
    a: PackedMatrix
    # [rank], float32
    bias: PackedVector
    # [rank, out of the part]
    b_t: PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedScale:
    """`y[out_start:] *= vector`, the base's output."""

    linear: int
    out_start: int
    # [out of the part], float32
    vector: PackedVector


@dataclass(frozen=True, eq=False)
class PackedInputScale:
    """What part `out_start : out_start + out_features` multiplies is not x but `x * vector`."""

    linear: int
    out_start: int
    out_features: int
    # Whether that is all of the fused linear.
    whole: bool
    # [in], float32
    vector: PackedVector


@dataclass(frozen=True, eq=False)
class PackedRotate:
    """`linear_deltas.Rotate` of one part."""

    linear: int
    out_start: int
    # [out of the part], float32
    cos: PackedVector
    # [out of the part], float32
    sin: PackedVector
    # [out of the part], int32
    partner: PackedVector


@dataclass(frozen=True, eq=False)
class PackedBias:
    """`y[out_start:] += vector`."""

    linear: int
    out_start: int
    # [out of the part], float32
    vector: PackedVector


@dataclass(frozen=True, eq=False)
class PackedNorm:
    """A norm's weight, replaced."""

    # Index into BaseLayout.norms, or FINAL_NORM_INDEX.
    norm: int
    # [size], the adapter's dtype
    weight: PackedVector


@dataclass(frozen=True, eq=False)
class PackedTokenRows:
    """Some of the replaced rows of the embedding or of the head."""

    # EMBEDDING_LINEAR or HEAD_LINEAR
    linear: int
    # [n], int64; those in later layers are greater
    ids: PackedVector
    # [n, hidden]
    rows: PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedHeadShrink:
    """A of the head's low-rank delta, `[rank, hidden]`; in the first layer."""

    a: PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedHeadExpand:
    """B of the head's low-rank delta for some tokens."""

    block: LowRankBlock


@dataclass(frozen=True, eq=False)
class PackedTokenShrink:
    """A of the embedding's low-rank delta for some tokens, by token: `[tokens, rank]`."""

    first_id: int
    a_t: PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedTokenExpand:
    """B of the embedding's low-rank delta, `[rank, hidden]`; in the first layer."""

    b_t: PackedMatrix


PackedDelta = (
    PackedLowRank
    | PackedSparse
    | PackedColumns
    | PackedRows
    | PackedOneBit
    | PackedKronecker
    | PackedCirculant
    | PackedTopK
    | PackedScale
    | PackedInputScale
    | PackedRotate
    | PackedBias
    | PackedNorm
    | PackedTokenRows
    | PackedHeadShrink
    | PackedHeadExpand
    | PackedTokenShrink
    | PackedTokenExpand
)


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """All deltas of one decoder layer; empty when it has none."""

    # [nbytes] uint8, contiguous, a multiple of ALIGNMENT
    data: Tensor
    deltas: tuple[PackedDelta, ...]


@dataclass(frozen=True, eq=False)
class PackedPrefix:
    """What virtual tokens before the sequence are made of. It goes into pages of the KV cache's
    form, not among the layers' bytes."""

    # Keys and values [layers, 2, n, kv_heads, head_dim], or embeddings [n, hidden], whose keys and
    # values are computed once the adapter is in the pool; the adapter's dtype
    values: Tensor

    @property
    def embedded(self) -> bool:
        """Whether these are embeddings."""
        return self.values.dim() == 2

    @property
    def num_tokens(self) -> int:
        return self.values.shape[0 if self.embedded else 2]


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter, ready to be copied into pages."""

    # sha256 of the content that it was made from.
    digest: str
    # Of matrices and of sparse values.
    dtype: torch.dtype
    # One for each decoder layer of the base.
    layers: tuple[PackedLayer, ...]
    prefix: PackedPrefix | None = None
    # Tokens from which on it acts; empty: from the first one.
    invocation: tuple[int, ...] = ()

    @property
    def traits(self) -> AdapterTraits:
        prefix = self.prefix
        return AdapterTraits(0 if prefix is None else prefix.num_tokens, self.invocation)

    @property
    def bytes_per_layer(self) -> int:
        """Of the largest layer: a page exists in every layer, so it sets the number of pages."""
        return max((layer.data.numel() for layer in self.layers), default=0)

    @property
    def nbytes(self) -> int:
        prefix = 0 if self.prefix is None else self.prefix.values.nbytes
        return sum(layer.data.numel() for layer in self.layers) + prefix

    @property
    def fusable(self) -> bool:
        """Whether it is nothing but changes of the linear layers' weights that can go into them."""
        deltas = (delta for layer in self.layers for delta in layer.deltas)
        plain = all(isinstance(delta, PackedLowRank | PackedSparse) for delta in deltas)
        return plain and self.traits == AdapterTraits()


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
