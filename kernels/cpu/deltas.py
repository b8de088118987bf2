"""Adapter deltas on a CPU."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.kernels.cpu.native import NativeLibrary
from polydelta.kernels.cpu.native_deltas import bind
from polydelta.kernels.delta_groups import AddDelta, ChangeOutput
from polydelta.kernels.delta_weights import (
    AddWeights,
    ChangeWeights,
    CirculantWeights,
    KroneckerWeights,
    LowRankWeights,
    OneBitWeights,
    SparseWeights,
    dense,
)
from polydelta.kernels.reference_deltas import add_delta as add_by_reference, change_output

# Up to so many rows, a bfloat16 delta goes to our own kernel, which reads its weights once and has
# no overhead, but computes row by row. On a 2-core Zen 5, for q, k, v of a 576-wide model, torch
# against ours: rank 8 and 1 row 39 -> 3 us, rank 32 and 2 rows 65 -> 11 us, rank 64 and 16 rows
# 109 -> 105 us. (float32 has none: its small products cost torch 3 us each.)
NATIVE_ROWS = 16
# Of other kinds: torch does the products of some faster for several rows at once; an entry of a
# sparse delta is read once for 16 rows.
MOST_ROWS = {SparseWeights: 2**62, KroneckerWeights: 4, CirculantWeights: 2}


class FewRowsDelta:
    """`y += f(x)` by our own kernel for few rows, by torch for many. Matrices have the dtype of x
    and y."""

    def __init__(self, weights: AddWeights, library: NativeLibrary) -> None:
        self.native = bind(library, weights)
        self.most_rows = MOST_ROWS.get(type(weights), NATIVE_ROWS)
        self._for_many = _for_many_rows(weights, library)

    def __call__(self, y: Tensor, x: Tensor) -> None:
        adjacent = x.stride(1) == y.stride(1) == 1
        if x.shape[0] <= self.most_rows and adjacent and x.dtype == torch.bfloat16:
            self.native.add(y, x)
        else:
            self._for_many(y, x)


class NativeChange:
    """`y = f(y)` by our own kernel, where y is bfloat16."""

    def __init__(self, weights: ChangeWeights, library: NativeLibrary) -> None:
        self.native = bind(library, weights)
        self._weights = weights

    def __call__(self, y: Tensor) -> None:
        if y.dtype == torch.bfloat16 and y.stride(1) == 1:
            self.native.change(y)
        else:
            change_output(self._weights, y)


def add_delta(weights: AddWeights, library: NativeLibrary | None) -> AddDelta:
    """See `ops.Kernels.add_delta`."""
    if library is None:
        return _for_many_rows(weights, library)
    return FewRowsDelta(weights, library)


def change(weights: ChangeWeights, library: NativeLibrary | None) -> ChangeOutput:
    """See `ops.Kernels.change_output`."""
    return partial(change_output, weights) if library is None else NativeChange(weights, library)


def _for_many_rows(weights: AddWeights, library: NativeLibrary | None) -> AddDelta:
    match weights:
        case LowRankWeights():
            return partial(_add_low_rank, weights)
        case SparseWeights():
            return partial(_add_sparse, weights)
        case OneBitWeights() if library is not None:
            return partial(_add_one_bit, weights, library)
        case _:
            return partial(add_by_reference, weights)


def _add_low_rank(weights: LowRankWeights, y: Tensor, x: Tensor) -> None:
    """Of matrices in 8 or 4 bits, the numbers are written out each time."""
    shrunk = F.linear(x, dense(weights.a, x.dtype))
    for block in weights.blocks:
        rank, out_features = block.b_t.shape
        columns = y.narrow(1, block.out_start, out_features)
        columns.addmm_(shrunk.narrow(1, block.rank_start, rank), dense(block.b_t, x.dtype))


def _add_sparse(weights: SparseWeights, y: Tensor, x: Tensor) -> None:
    """A row of dW times x is a weighted sum of rows of x transposed: an embedding bag, whose kernel
    is vectorised over tokens (at 1% density and 16 tokens 15 times faster than gather and
    index_add, 3 times faster than writing dW out in full)."""
    delta = F.embedding_bag(
        weights.columns,
        x.t().contiguous(),
        weights.row_pointers,
        mode="sum",
        per_sample_weights=weights.values,
        include_last_offset=True,
    )
    y.add_(delta.t())


def _add_one_bit(weights: OneBitWeights, library: NativeLibrary, y: Tensor, x: Tensor) -> None:
    """With the signs written out, which takes as long as reading them from memory would."""
    if x.dtype != torch.bfloat16:
        add_by_reference(weights, y, x)
        return
    signs = library.unpack_signs(weights.bits, x.shape[1])
    added = F.linear(x, signs).mul_(weights.scale)
    y.narrow(1, weights.out_start, len(signs)).add_(added)
