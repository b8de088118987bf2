"""What one adapter does to the embedding and to the head, whose bytes are cut over the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.adapters_store.packed import PackedLayer
from polydelta.adapters_store.packed_deltas import (
    EMBEDDING_LINEAR,
    HEAD_LINEAR,
    PackedBias,
    PackedDelta,
    PackedHeadExpand,
    PackedHeadShrink,
    PackedScale,
    PackedTokenExpand,
    PackedTokenRows,
    PackedTokenShrink,
)
from polydelta.adapters_store.packed_tensors import matrix_view, vector_view
from polydelta.engine.delta_views import low_rank_matrix
from polydelta.engine.linear_deltas import LinearDeltas
from polydelta.kernels.delta_groups import Linear
from polydelta.kernels.delta_weights import LowRankBlock, LowRankWeights
from polydelta.kernels.ops import Kernels


@dataclass(frozen=True, eq=False)
class TokenMatrix:
    """A matrix in pieces: one in each of some layers, of as many rows in all but the last."""

    # [rows, columns] each
    pieces: Sequence[Tensor]

    def rows(self, places: Tensor) -> Tensor:
        """Those at `[n]` int64, `[n, columns]`."""
        first = self.pieces[0]
        rows = first.new_empty(len(places), first.shape[1])
        pieces, offsets = places // len(first), places % len(first)
        for piece in pieces.unique().tolist():
            here = pieces == piece
            rows[here] = self.pieces[piece][offsets[here]]
        return rows


@dataclass(frozen=True, eq=False)
class ReplacedRows:
    """Rows of some tokens."""

    # [n] int64, ascending
    ids: Tensor
    # [n, hidden]
    matrix: TokenMatrix

    def find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the tokens `[t]` have a row, `[found]`, and these, `[found, hidden]`."""
        places = torch.searchsorted(self.ids, tokens).clamp_(max=len(self.ids) - 1)
        found = (self.ids[places] == tokens).nonzero().squeeze(1)
        return found, self.matrix.rows(places[found])

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and rows, piece by piece."""
        each = self.matrix.pieces
        return zip(self.ids.split(len(each[0])), each, strict=True)


@dataclass(frozen=True, eq=False)
class EmbeddingDeltas:
    """`e(token) = base(token) + A[:, token] @ B.T`, the base's row being replaced where the token
    has one of its own, and scaled; and a bias."""

    rows: ReplacedRows | None
    vectors: LinearDeltas
    # [vocab, rank] and [rank, hidden]
    low_rank: tuple[TokenMatrix, Tensor] | None

    def apply(self, embedded: Tensor, tokens: Tensor, weight: float) -> None:
        """embedded: `[rows, hidden]`, the base's, changed in place; tokens: `[rows]` int64; weight:
        the adapter's in a sum."""
        if self.rows is not None:
            embedded.index_copy_(0, *self.rows.find(tokens))
        self.vectors.apply(embedded, embedded, weight, _identity)
        if self.low_rank is not None:
            a_t, b_t = self.low_rank
            embedded.addmm_(a_t.rows(tokens), b_t, alpha=weight)


@dataclass(frozen=True, eq=False)
class HeadDeltas:
    """What an adapter makes of logits; other deltas act on what replaced rows give."""

    rows: ReplacedRows | None
    linear: LinearDeltas

    def apply(self, logits: Tensor, hidden: Tensor, weight: float, base: Linear) -> None:
        """logits: `[rows, vocab]`, the base's, changed in place; hidden: `[rows, hidden]`."""
        if self.rows is not None:
            for ids, piece in self.rows.pieces():
                logits.index_copy_(1, ids, F.linear(hidden, piece))
        self.linear.apply(logits, hidden, weight, base)


@dataclass(frozen=True, eq=False)
class TokenDeltas:
    """None where the adapter does not change it."""

    embedding: EmbeddingDeltas | None = None
    head: HeadDeltas | None = None


def bind_tokens(layers: Sequence[PackedLayer], dtype: torch.dtype, kernels: Kernels) -> TokenDeltas:
    """layers: all, their bytes in the pool; dtype: the adapter's."""
    return TokenDeltas(_bind_embedding(layers, dtype, kernels), _bind_head(layers, dtype, kernels))


def _bind_embedding(
    layers: Sequence[PackedLayer], dtype: torch.dtype, kernels: Kernels
) -> EmbeddingDeltas:
    pieces, b_t = [], None
    for delta, data in _each(layers):
        match delta:
            case PackedTokenShrink():
                pieces.append(matrix_view(data, delta.a_t, dtype))
            case PackedTokenExpand():
                b_t = matrix_view(data, delta.b_t, dtype)
    return EmbeddingDeltas(
        _replaced_rows(layers, EMBEDDING_LINEAR, dtype),
        _vectors(layers, EMBEDDING_LINEAR, dtype, kernels),
        None if b_t is None else (TokenMatrix(pieces), b_t),
    )


def _bind_head(layers: Sequence[PackedLayer], dtype: torch.dtype, kernels: Kernels) -> HeadDeltas:
    linear = _vectors(layers, HEAD_LINEAR, dtype, kernels)
    a, blocks = None, []
    for delta, data in _each(layers):
        match delta:
            case PackedHeadShrink():
                a = matrix_view(data, delta.a, dtype)
            case PackedHeadExpand(block):
                b_t = low_rank_matrix(data, block.b_t, dtype)
                blocks.append(LowRankBlock(block.out_start, block.rank_start, b_t))
    if a is not None:
        linear.output.adds.append(kernels.add_delta(LowRankWeights(a, tuple(blocks))))
    return HeadDeltas(_replaced_rows(layers, HEAD_LINEAR, dtype), linear)


def changes_tokens(deltas: Sequence[Sequence[PackedDelta]]) -> bool:
    """Whether an adapter with these layers has anything for `bind_tokens`."""
    of_tokens = PackedTokenRows | PackedHeadShrink | PackedTokenExpand
    return any(
        isinstance(delta, of_tokens) or getattr(delta, "linear", 0) < 0
        for layer in deltas
        for delta in layer
    )


def _each(layers: Sequence[PackedLayer]) -> Iterator[tuple[PackedDelta, Tensor]]:
    """Each delta, with its layer's bytes."""
    for layer in layers:
        for delta in layer.deltas:
            yield delta, layer.data


def _vectors(
    layers: Sequence[PackedLayer], linear: int, dtype: torch.dtype, kernels: Kernels
) -> LinearDeltas:
    """Scales and biases."""
    bound = LinearDeltas()
    for delta, data in _each(layers):
        if isinstance(delta, PackedScale | PackedBias) and delta.linear == linear:
            bound.bind(delta, data, dtype, kernels)
    return bound


def _replaced_rows(
    layers: Sequence[PackedLayer], linear: int, dtype: torch.dtype
) -> ReplacedRows | None:
    ids, pieces = [], []
    for delta, data in _each(layers):
        if isinstance(delta, PackedTokenRows) and delta.linear == linear:
            # The ids are few bytes beside the rows: copied, so that they are one vector.
            ids.append(vector_view(data, delta.ids).clone())
            pieces.append(matrix_view(data, delta.rows, dtype))
    return ReplacedRows(torch.cat(ids), TokenMatrix(pieces)) if pieces else None


def _identity(x: Tensor) -> Tensor:
    return x
