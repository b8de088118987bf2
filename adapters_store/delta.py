"""The delta algebra: what a fine-tuned variant changes in the base model.

A format (PEFT LoRA, SHiRA, ...) is a parser from files to these kinds; the engine and the kernels
know only the kinds. For a target linear layer `y = W x + b`, W of shape `[out, in]`, a delta is a
change `dW` that is applied unmerged: `y += dW x`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.delta_kinds import LOW_RANK, SPARSE


@dataclass(frozen=True, eq=False)
class LowRank:
    """`dW = B @ A`; the adapter's scale is folded into B when the file is read."""

    # [rank, in]
    a: Tensor
    # [out, rank]
    b: Tensor

    kind = LOW_RANK

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

    kind = SPARSE

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


Delta = LowRank | Sparse


@dataclass(frozen=True, eq=False)
class Adapter:
    """One immutable version of a fine-tuned variant.

    `digest` is the sha256 of the adapter's content: it, not the name, seeds the prefix cache.
    """

    id: str
    version: int
    digest: str
    # The format it was read from, e.g. "LORA" or "SHIRA".
    format: str
    # Full module path -> the deltas of that linear layer.
    modules: Mapping[str, tuple[Delta, ...]]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({d.kind for deltas in self.modules.values() for d in deltas}))

    @property
    def max_rank(self) -> int:
        """The largest rank of a low-rank delta in it; 0 when there is none."""
        ranks = [
            d.rank for deltas in self.modules.values() for d in deltas if isinstance(d, LowRank)
        ]
        return max(ranks, default=0)
