"""What adapters change in a linear layer, as kernels take it: views of the pool, where it lies.

y is a step's output `[tokens, out]` of a (fused) linear layer, x its input `[tokens, in]`. The
kinds are those of `adapters_store/linear_deltas.py`, where their papers are named.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of a row of a quantised matrix that share a scale.
GROUP = 32


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """`[rows, columns]` of `scale * code`, in 8 or 4 bits.

    Each GROUP columns of a row have a scale of their own; the last group may be narrower.
    """

    # 8 bits: [rows, columns] int8, -127 to 127. 4 bits: [rows, columns / 2 rounded up] uint8, with
    # the code of column 2 i, plus 8, in the lower half of byte i, and that of 2 i + 1 in the upper
    codes: Tensor
    # [rows, groups] float16; may be negative
    scales: Tensor
    columns: int

    @property
    def bits(self) -> int:
        return 8 if self.codes.dtype == torch.int8 else 4

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.codes), self.columns

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """`[rows, columns]` of dtype; each number is rounded once."""
        codes = self.codes
        if self.bits == 4:
            halves = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
            codes = halves[:, : self.columns].int() - 8
        scales = self.scales.float().repeat_interleave(GROUP, 1)[:, : self.columns]
        return (codes * scales).to(dtype)


# A matrix that kernels read in place.
Matrix = Tensor | QuantizedMatrix


def dense(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """`[rows, columns]`: a plain matrix as it is, a quantised one in dtype."""
    return matrix.dequantized(dtype) if isinstance(matrix, QuantizedMatrix) else matrix


@dataclass(frozen=True, eq=False)
class LowRankBlock:
    """The expansion of one part of a fused linear layer."""

    # Columns of y that it adds to: out_start : out_start + out_features.
    out_start: int
    # Rows of `a` that it reads: rank_start : rank_start + rank.
    rank_start: int
    # [rank, out_features]; B transposed, the scale folded in.
    b_t: Matrix


@dataclass(frozen=True, eq=False)
class LowRankWeights:
    """`y += x @ A.T @ B.T`."""

    # [sum of ranks, in]
    a: Matrix
    blocks: tuple[LowRankBlock, ...]


@dataclass(frozen=True, eq=False)
class SparseWeights:
    """`y += x @ dW.T`, dW in CSR form."""

    # [out + 1] int32
    row_pointers: Tensor
    # [nnz] int32
    columns: Tensor
    # [nnz]
    values: Tensor


@dataclass(frozen=True, eq=False)
class ColumnsWeights:
    """`y[:, out_start:] += x[:, indices] @ block_t`."""

    out_start: int
    # [k] int32
    indices: Tensor
    # [k, out of the part]
    block_t: Tensor


@dataclass(frozen=True, eq=False)
class RowsWeights:
    """`y[:, indices] += x @ block.T`; an index may occur several times."""

    # [k] int32
    indices: Tensor
    # [k, in]
    block: Tensor


@dataclass(frozen=True, eq=False)
class OneBitWeights:
    """`y[:, out_start:] += scale * x @ signs.T`."""

    out_start: int
    # [out of the part, in / 8 rounded up] uint8: bit j of byte i is 1 where the sign of column
    # 8 i + j is 1, else it is -1
    bits: Tensor
    # [1] float32
    scale: Tensor


@dataclass(frozen=True, eq=False)
class KroneckerWeights:
    """`y[:, out_start:] += x @ kron(left, right).T`."""

    out_start: int
    # [a, b]
    left: Tensor
    # [c, d]; the part has a * c outputs, and in = b * d
    right: Tensor


@dataclass(frozen=True, eq=False)
class CirculantWeights:
    """`y[:, out_start:]` += block i, place j of which is the sum over n and m of
    `kernel[i, n, m] * x[block n, place (j + m) % size]`."""

    out_start: int
    # [out of the part / size, in / size, size]
    kernel: Tensor


@dataclass(frozen=True, eq=False)
class TopKWeights:
    """`y[:, out_start:] += h @ b_t` with the `keep` entries of `h = x @ A.T` whose `|h + bias|` is
    the largest, for each token; the other entries are 0."""

    out_start: int
    keep: int
    # [rank, in]
    a: Tensor
    # [rank] float32
    bias: Tensor
    # [rank, out of the part]
    b_t: Tensor


@dataclass(frozen=True, eq=False)
class ScaleWeights:
    """`y[:, out_start:] *= vector`."""

    out_start: int
    # [out of the part] float32
    vector: Tensor


@dataclass(frozen=True, eq=False)
class RotateWeights:
    """`y = cos * y + sin * y[:, partner]`, for columns of one part."""

    out_start: int
    # [out of the part] float32
    cos: Tensor
    # [out of the part] float32
    sin: Tensor
    # [out of the part] int32
    partner: Tensor


# `y += f(x)`
AddWeights = (
    LowRankWeights
    | SparseWeights
    | ColumnsWeights
    | RowsWeights
    | OneBitWeights
    | KroneckerWeights
    | CirculantWeights
    | TopKWeights
)
# `y = f(y)`
ChangeWeights = ScaleWeights | RotateWeights
