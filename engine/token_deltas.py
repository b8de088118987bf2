"""What one adapter does to the embedding and to the head, whose bytes are cut over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.adapters_store.packed import (
    EMBEDDING_LINEAR,
    HEAD_LINEAR,
    PackedDelta,
    PackedHeadExpand,
    PackedHeadShrink,
    PackedTokenExpand,
    PackedTokenRows,
    PackedTokenShrink,
    matrix_view,
    vector_view,
)
from polydelta.engine.linear_deltas import LinearDeltas, bind_linears
from polydelta.kernels.delta_weights import LowRankBlock, LowRankWeights
from polydelta.kernels.ops import Kernels, Linear

# A layer's deltas and its bytes in the pool.
Layer = tuple[Sequence[PackedDelta], Tensor]


@dataclass(frozen=True, eq=False)
class TokenMatrix:
    """Rows of some tokens, in pieces: one in each of some layers, the same number in all but the
    last."""

    # [n] int64, ascending
    ids: Tensor
    # [rows, columns] each
    pieces: Sequence[Tensor]

    def find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the tokens `[t]` have a row, `[found]`, and these, `[found, columns]`."""
        places = torch.searchsorted(self.ids, tokens).clamp_(max=len(self.ids) - 1)
        found = (self.ids[places] == tokens).nonzero().squeeze(1)
        piece, place = self._split(places[found])
        rows = self.pieces[0].new_empty(len(found), self.pieces[0].shape[1])
        for index in piece.unique().tolist():
            here = piece == index
            rows[here] = self.pieces[index][place[here]]
        return found, rows

    def _split(self, places: Tensor) -> tuple[Tensor, Tensor]:
        size = len(self.pieces[0])
        return places // size, places % size


@dataclass(frozen=True, eq=False)
class EmbeddingDeltas:
    """`e(token) = base(token) + A[:, token] @ B.T`, or a row of its own."""

    linear: LinearDeltas | None
    # [vocab, rank] in pieces, with [rank, hidden]
    low_rank: tuple[TokenMatrix, Tensor] | None
    rows: TokenMatrix | None

    def apply(self, embedded: Tensor, tokens: Tensor, weight: float) -> None:
        """embedded: `[rows, hidden]`, the base's, changed in place; tokens: `[rows]` int64; weight:
        the adapter's in a sum."""
        if self.linear is not None:
            self.linear.apply(embedded, embedded, weight, _identity)
        if self.low_rank is not None:
            matrix, b_t = self.low_rank
            _, shrunk = matrix.find(tokens)
            embedded.addmm_(shrunk, b_t, alpha=weight)
        if self.rows is not None:
            found, rows = self.rows.find(tokens)
            embedded.index_copy_(0, found, rows)


@dataclass(frozen=True, eq=False)
class HeadDeltas:
    """What an adapter makes of logits."""

    linear: LinearDeltas | None
    rows: TokenMatrix | None

    def apply(self, logits: Tensor, hidden: Tensor, weight: float, base: Linear) -> None:
        """logits: `[rows, vocab]`, the base's, changed in place; hidden: `[rows, hidden]`."""
        if self.rows is not None:
            for ids, piece in zip(
                self.rows.ids.split(len(self.rows.pieces[0])), self.rows.pieces, strict=True
            ):
                logits.index_copy_(1, ids, F.linear(hidden, piece))
        if self.linear is not None:
            self.linear.apply(logits, hidden, weight, base)


def bind_embedding(
    layers: Sequence[Layer], dtype: torch.dtype, kernels: Kernels
) -> EmbeddingDeltas | None:
    """None when the adapter does not change the embedding."""
    linear = bind_linears(*layers[0], dtype, kernels).get(EMBEDDING_LINEAR)
    rows = _token_rows(layers, EMBEDDING_LINEAR, dtype)
    pieces, b_t, num_tokens = [], None, 0
    for deltas, data in layers:
        for delta in deltas:
            if isinstance(delta, PackedTokenShrink):
                pieces.append(matrix_view(data, delta.a_t, dtype))
                num_tokens = delta.first_id + len(pieces[-1])
            elif isinstance(delta, PackedTokenExpand):
                b_t = matrix_view(data, delta.b_t, dtype)
    low_rank = None
    if b_t is not None:
        low_rank = TokenMatrix(torch.arange(num_tokens, device=b_t.device), pieces), b_t
    if linear is None and rows is None and low_rank is None:
        return None
    return EmbeddingDeltas(linear, low_rank, rows)


def bind_head(layers: Sequence[Layer], dtype: torch.dtype, kernels: Kernels) -> HeadDeltas | None:
    """None when the adapter does not change the head."""
    linear = LinearDeltas()
    a, blocks = None, []
    for deltas, data in layers:
        for delta in deltas:
            if isinstance(delta, PackedHeadShrink):
                a = matrix_view(data, delta.a, dtype)
            elif isinstance(delta, PackedHeadExpand):
                b_t = matrix_view(data, delta.block.b_t, dtype)
                blocks.append(LowRankBlock(delta.block.out_start, 0, b_t))
        if (here := bind_linears(deltas, data, dtype, kernels).get(HEAD_LINEAR)) is not None:
            linear.changes += here.changes
            linear.biases += here.biases
    if a is not None:
        linear.adds.append(kernels.add_delta(LowRankWeights(a, tuple(blocks))))
    rows = _token_rows(layers, HEAD_LINEAR, dtype)
    used = linear.changes or linear.adds or linear.biases
    if not used and rows is None:
        return None
    return HeadDeltas(linear if used else None, rows)


def changes_tokens(deltas: Sequence[Sequence[PackedDelta]]) -> bool:
    """Whether an adapter with these layers has anything for `bind_embedding` or `bind_head`."""
    of_tokens = PackedTokenRows | PackedHeadShrink | PackedTokenExpand
    return any(
        isinstance(delta, of_tokens) or getattr(delta, "linear", 0) < 0
        for layer in deltas
        for delta in layer
    )


def _token_rows(layers: Sequence[Layer], linear: int, dtype: torch.dtype) -> TokenMatrix | None:
    ids, pieces = [], []
    for deltas, data in layers:
        for delta in deltas:
            if isinstance(delta, PackedTokenRows) and delta.linear == linear:
                # The ids are few bytes beside the rows: copied, so that they are one vector.
                ids.append(vector_view(data, delta.ids).clone())
                pieces.append(matrix_view(data, delta.rows, dtype))
    return TokenMatrix(torch.cat(ids), pieces) if pieces else None


def _identity(x: Tensor) -> Tensor:
    return x
