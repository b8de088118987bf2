"""What changes a base by token: the embedding, the head, and the norm between blocks and head.

A vocabulary is long, so what has a row for each token is cut over the decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from polydelta.adapters_store.base_layout import EMBEDDING, FINAL_NORM, HEAD, BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Delta,
    LowRank,
    NormWeight,
    Scale,
    TokenRows,
)
from polydelta.adapters_store.packed_deltas import (
    EMBEDDING_LINEAR,
    FINAL_NORM_INDEX,
    HEAD_LINEAR,
    LowRankBlock,
    PackedBias,
    PackedDelta,
    PackedHeadExpand,
    PackedHeadShrink,
    PackedNorm,
    PackedScale,
    PackedTokenExpand,
    PackedTokenRows,
    PackedTokenShrink,
)
from polydelta.adapters_store.packing_writer import LayerWriter

# Fewer bytes than that are not worth a piece of their own.
_MIN_PIECE_BYTES = 16384


class TokenPacker:
    """Packs what an adapter changes by token, layer by layer."""

    def __init__(self, adapter: Adapter, layout: BaseLayout, dtype: torch.dtype) -> None:
        self._num_layers = layout.num_layers
        self._hidden_size = layout.hidden_size
        self._dtype = dtype
        self._embedding = adapter.modules.get(EMBEDDING, ())
        self._head = adapter.modules.get(HEAD, ())
        self._norm = adapter.modules.get(FINAL_NORM, ())

    def pack_layer(self, writer: LayerWriter, layer: int) -> Iterator[PackedDelta]:
        """The layer's share."""
        if layer == 0:
            for norm in self._norm:
                if isinstance(norm, NormWeight):
                    yield PackedNorm(FINAL_NORM_INDEX, writer.vector(norm.weight, self._dtype))
        yield from self._pack_embedding(writer, layer)
        yield from self._pack_head(writer, layer)
        yield from self._pack_rows(writer, layer, EMBEDDING_LINEAR, self._embedding)
        yield from self._pack_rows(writer, layer, HEAD_LINEAR, self._head)

    def _pack_embedding(self, writer: LayerWriter, layer: int) -> Iterator[PackedDelta]:
        low_rank = [delta for delta in self._embedding if isinstance(delta, LowRank)]
        if low_rank:
            a_t = torch.cat([delta.a for delta in low_rank]).T
            tokens = self._piece(layer, *a_t.shape)
            if len(tokens):
                piece = writer.matrix(a_t[tokens.start : tokens.stop])
                yield PackedTokenShrink(tokens.start, piece)
        if layer == 0:
            if low_rank:
                yield PackedTokenExpand(writer.matrix(torch.cat([d.b.T for d in low_rank])))
            yield from _vectors(writer, EMBEDDING_LINEAR, self._embedding, range(self._hidden_size))

    def _pack_head(self, writer: LayerWriter, layer: int) -> Iterator[PackedDelta]:
        low_rank = [delta for delta in self._head if isinstance(delta, LowRank)]
        if low_rank:
            b = torch.cat([delta.b for delta in low_rank], dim=1)
            tokens, rank = self._piece(layer, *b.shape), b.shape[1]
            if layer == 0:
                yield PackedHeadShrink(writer.matrix(torch.cat([d.a for d in low_rank])))
            if len(tokens):
                piece = writer.matrix(b[tokens.start : tokens.stop].T)
                yield PackedHeadExpand(LowRankBlock(tokens.start, len(tokens), 0, rank, piece))
        for delta in self._head:
            if isinstance(delta, Scale | Bias):
                tokens = self._piece(layer, len(delta.vector), 1)
                yield from _vectors(writer, HEAD_LINEAR, [delta], tokens)

    def _pack_rows(
        self, writer: LayerWriter, layer: int, linear: int, deltas: Sequence[Delta]
    ) -> Iterator[PackedDelta]:
        for delta in deltas:
            if isinstance(delta, TokenRows):
                piece = self._piece(layer, *delta.rows.shape)
                if len(piece):
                    ids = writer.vector(delta.ids[piece.start : piece.stop], torch.int64)
                    rows = writer.matrix(delta.rows[piece.start : piece.stop])
                    yield PackedTokenRows(linear, ids, rows)

    def _piece(self, layer: int, rows: int, columns: int) -> range:
        """Which rows of a matrix lie in a layer."""
        least = -(-_MIN_PIECE_BYTES // max(1, columns * self._dtype.itemsize))
        size = max(-(-rows // self._num_layers), least)
        return range(min(layer * size, rows), min((layer + 1) * size, rows))


def _vectors(
    writer: LayerWriter, linear: int, deltas: Sequence[Delta], outputs: range
) -> Iterator[PackedDelta]:
    """Scales and biases of these outputs."""
    if not outputs:
        return
    for delta in deltas:
        if isinstance(delta, Scale | Bias):
            piece = delta.vector[outputs.start : outputs.stop]
            vector = writer.vector(piece, torch.float32)
            kind = PackedScale if isinstance(delta, Scale) else PackedBias
            yield kind(linear, outputs.start, vector)
