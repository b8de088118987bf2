"""What can change in a linear layer `y = W x + b`, W of shape `[out, in]`.

Most kinds are a change `dW` that is applied unmerged, `y += dW x`. Where a layer has several, the
base's input is scaled first, then its output is scaled and rotated; then every `dW x` is added, x
being the layer's own input, and the bias last.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from polydelta.adapters_store import delta_kinds


@dataclass(frozen=True, eq=False)
class LowRank:
    """`dW = B @ A`; the adapter's scale is folded into B when the file is read."""

    # [rank, in]
    a: Tensor
    # [out, rank]
    b: Tensor

    kind = delta_kinds.LOW_RANK

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> Tensor:
        """The change as a full matrix, `[out, in]`."""
        return self.b @ self.a


@dataclass(frozen=True, eq=False)
class Sparse:
    """`dW` is zero but for given entries, kept in CSR form; columns ascend within a row."""

    shape: tuple[int, int]
    # [out + 1], int32: entries of row i are row_pointers[i] : row_pointers[i + 1]
    row_pointers: Tensor
    # [nnz], int32
    columns: Tensor
    # [nnz]
    values: Tensor

    kind = delta_kinds.SPARSE

    @property
    def nnz(self) -> int:
        return self.values.shape[0]

    def dense(self) -> Tensor:
        """The change as a full matrix, `[out, in]`."""
        rows = torch.repeat_interleave(
            torch.arange(self.shape[0]), self.row_pointers.diff().to(torch.int64)
        )
        dense = torch.zeros(self.shape, dtype=self.values.dtype)
        dense[rows, self.columns.to(torch.int64)] = self.values
        return dense


@dataclass(frozen=True, eq=False)
class Columns:
    """`dW` is zero but for some input columns: `y += block @ x[indices]`."""

    in_features: int
    # [k], int32, ascending
    indices: Tensor
    # [out, k]
    block: Tensor

    kind = delta_kinds.COLUMNS

    @property
    def shape(self) -> tuple[int, int]:
        return self.block.shape[0], self.in_features

    def dense(self) -> Tensor:
        """The change as a full matrix, `[out, in]`."""
        dense = torch.zeros(self.shape, dtype=self.block.dtype)
        dense[:, self.indices.long()] = self.block
        return dense


@dataclass(frozen=True, eq=False)
class Rows:
    """`dW` is zero but for some output rows: `y[indices] += block @ x`."""

    out_features: int
    # [k], int32, ascending
    indices: Tensor
    # [k, in]
    block: Tensor

    kind = delta_kinds.ROWS

    @property
    def shape(self) -> tuple[int, int]:
        return self.out_features, self.block.shape[1]

    def dense(self) -> Tensor:
        """The change as a full matrix, `[out, in]`."""
        dense = torch.zeros(self.shape, dtype=self.block.dtype)
        dense[self.indices.long()] = self.block
        return dense


@dataclass(frozen=True, eq=False)
class OneBit:
    """`dW = scale * sign`, every sign 1 or -1 (BitDelta, arXiv:2402.10193)."""

    in_features: int
    # [out, in / 8 rounded up], uint8: bit j of byte i is 1 where the sign of column 8 i + j is 1
    bits: Tensor
    scale: float

    kind = delta_kinds.ONE_BIT

    @property
    def shape(self) -> tuple[int, int]:
        return self.bits.shape[0], self.in_features

    def dense(self) -> Tensor:
        """The change as a full matrix, `[out, in]`, float32."""
        places = torch.arange(8, dtype=torch.uint8)
        ones = (self.bits.unsqueeze(-1) >> places & 1).flatten(1)[:, : self.in_features]
        return (ones.float() * 2 - 1) * self.scale


@dataclass(frozen=True, eq=False)
class Kronecker:
    """`dW = kron(left, right)` (LoKr, arXiv:2309.14859)."""

    # [a, b]
    left: Tensor
    # [c, d]; out = a * c, in = b * d
    right: Tensor

    kind = delta_kinds.KRONECKER

    @property
    def shape(self) -> tuple[int, int]:
        return (
            self.left.shape[0] * self.right.shape[0],
            self.left.shape[1] * self.right.shape[1],
        )

    def dense(self) -> Tensor:
        """The change as a full matrix, `[out, in]`."""
        return torch.kron(self.left.contiguous(), self.right.contiguous())


@dataclass(frozen=True, eq=False)
class Circulant:
    """`dW` consists of circulant blocks (C3A, arXiv:2407.19342): in block (i, n), row j, column q
    there is `kernel[i, n, (q - j) % size]`."""

    # [out / size, in / size, size]
    kernel: Tensor

    kind = delta_kinds.CIRCULANT

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns, size = self.kernel.shape
        return rows * size, columns * size

    def dense(self) -> Tensor:
        """The change as a full matrix, `[out, in]`."""
        size = self.kernel.shape[2]
        steps = torch.arange(size)
        # [out / size, in / size, j, q]
        blocks = self.kernel[:, :, (steps - steps.unsqueeze(1)) % size]
        return blocks.transpose(1, 2).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Dense:
    """Any `dW`. Read so that it can be converted; it is not served, for it costs what the base
    layer costs."""

    # [out, in]
    weight: Tensor

    kind = delta_kinds.DENSE

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def dense(self) -> Tensor:
        """The change as a full matrix, `[out, in]`."""
        return self.weight


@dataclass(frozen=True, eq=False)
class TopK:
    """`y += B h`, where of `h = A x` only the `keep` entries with the largest `|h + bias|` are kept
    and the others are 0 (FlyLoRA, arXiv:2510.08396). Not linear in x, so there is no `dW`."""

    # [rank, in]
    a: Tensor
    # [out, rank]; the scale folded in
    b: Tensor
    # [rank]; takes part in the choice alone
    bias: Tensor
    keep: int

    kind = delta_kinds.TOP_K

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.b.shape[0], self.a.shape[1]


class Side(StrEnum):
    """What a Scale multiplies: the layer's input, or the base's output, its bias included."""

    INPUT = "input"
    OUTPUT = "output"


@dataclass(frozen=True, eq=False)
class Scale:
    """`y = g * (W x + b)`, or `y = W (g * x) + b`."""

    # [out] or [in]
    vector: Tensor
    side: Side

    kind = delta_kinds.SCALE


@dataclass(frozen=True, eq=False)
class Rotate:
    """`y = cos * y + sin * y[partner]`: pairs of outputs are rotated and scaled (RoAd,
    arXiv:2409.00119); signs are in `sin`."""

    # [out]
    cos: Tensor
    # [out]
    sin: Tensor
    # [out], int32: the other one of each pair
    partner: Tensor

    kind = delta_kinds.ROTATE


@dataclass(frozen=True, eq=False)
class Bias:
    """`y += vector`."""

    # [out]
    vector: Tensor

    kind = delta_kinds.BIAS


# Those with a matrix: `dense()`.
Matrix = LowRank | Sparse | Columns | Rows | OneBit | Kronecker | Circulant | Dense
LinearDelta = Matrix | TopK | Scale | Rotate | Bias
