"""Deltas as they lie in the pool: where their tensors are in a layer's bytes, and what they act on.

B matrices are transposed, so that their rows are as long as a kernel's inner block likes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from polydelta.adapters_store.packed_tensors import LowRankMatrix, PackedMatrix, PackedVector

# In the place of an index into `BaseLayout.linears`.
HEAD_LINEAR = -1
EMBEDDING_LINEAR = -2
# In the place of an index into `BaseLayout.norms`.
FINAL_NORM_INDEX = -1


@dataclass(frozen=True)
class LowRankBlock:
    """What one part of a fused linear takes of the shrunk input, and the outputs that it adds to:
    `y[out_start : out_start + out_features] += (A x)[rank_start : rank_start + rank] @ b_t`."""

    out_start: int
    out_features: int
    rank_start: int
    rank: int
    # [rank, out_features]
    b_t: LowRankMatrix


@dataclass(frozen=True)
class PackedLowRank:
    """The low-rank deltas of one fused linear."""

    # Index into BaseLayout.linears; so it is in all classes below.
    linear: int
    # [sum of ranks, in]
    a: LowRankMatrix
    blocks: tuple[LowRankBlock, ...]


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class PackedColumns:
    """`y[out_start:] += x[indices] @ block_t`."""

    linear: int
    out_start: int
    # [k], int32
    indices: PackedVector
    # [k, out of the part]
    block_t: PackedMatrix


@dataclass(frozen=True)
class PackedRows:
    """The changed rows of all parts of a fused linear: `y[indices] += block @ x`."""

    linear: int
    # [k], int32, rows counted in the fused linear
    indices: PackedVector
    # [k, in]
    block: PackedMatrix


@dataclass(frozen=True)
class PackedOneBit:
    """`linear_deltas.OneBit` of one part."""

    linear: int
    out_start: int
    in_features: int
    # [out of the part, in / 8 rounded up], uint8
    bits: PackedMatrix
    # [1], float32
    scale: PackedVector


@dataclass(frozen=True)
class PackedKronecker:
    """`linear_deltas.Kronecker` of one part."""

    linear: int
    out_start: int
    # [a, b]
    left: PackedMatrix
    # [c, d]
    right: PackedMatrix


@dataclass(frozen=True)
class PackedCirculant:
    """`linear_deltas.Circulant` of one part."""

    linear: int
    out_start: int
    # Blocks side by side: in / size.
    columns: int
    # [out / size * columns, size]
    kernel: PackedMatrix


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class PackedScale:
    """`y[out_start:] *= vector`, the base's output."""

    linear: int
    out_start: int
    # [out of the part], float32
    vector: PackedVector


@dataclass(frozen=True)
class PackedInputScale:
    """What part `out_start : out_start + out_features` multiplies is not x but `x * vector`."""

    linear: int
    out_start: int
    out_features: int
    # Whether that is all of the fused linear.
    whole: bool
    # [in], float32
    vector: PackedVector


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class PackedBias:
    """`y[out_start:] += vector`."""

    linear: int
    out_start: int
    # [out of the part], float32
    vector: PackedVector


@dataclass(frozen=True)
class PackedNorm:
    """A norm's weight, replaced."""

    # Index into BaseLayout.norms, or FINAL_NORM_INDEX.
    norm: int
    # [size], the adapter's dtype
    weight: PackedVector


@dataclass(frozen=True)
class PackedTokenRows:
    """Some of the replaced rows of the embedding or of the head."""

    # EMBEDDING_LINEAR or HEAD_LINEAR
    linear: int
    # [n], int64; those in later layers are greater
    ids: PackedVector
    # [n, hidden]
    rows: PackedMatrix


@dataclass(frozen=True)
class PackedHeadShrink:
    """A of the head's low-rank delta, `[rank, hidden]`; in the first layer."""

    a: PackedMatrix


@dataclass(frozen=True)
class PackedHeadExpand:
    """B of the head's low-rank delta for some tokens."""

    block: LowRankBlock


@dataclass(frozen=True)
class PackedTokenShrink:
    """A of the embedding's low-rank delta for some tokens, by token: `[tokens, rank]`."""

    first_id: int
    a_t: PackedMatrix


@dataclass(frozen=True)
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
