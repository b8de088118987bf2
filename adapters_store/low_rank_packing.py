"""The low-rank deltas of a fused linear layer, as they lie in the pool."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import torch

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.packed_deltas import LowRankBlock, PackedLowRank
from polydelta.adapters_store.packing_writer import LayerWriter
from polydelta.adapters_store.row_codes import balanced


def pack_low_rank(
    writer: LayerWriter, linear: int, placed: Sequence[tuple[int, LowRank]]
) -> PackedLowRank:
    """placed: part by part, each with where its part's outputs start. The ranks of a part's deltas
    are concatenated. Raises InvalidAdapterError for numbers that the writer's bits cannot hold."""
    starts, all_a, all_b = [], [], []
    for out_start, of_part in groupby(placed, key=itemgetter(0)):
        deltas = [delta for _, delta in of_part]
        a, b_t = torch.cat([d.a for d in deltas]), torch.cat([d.b.T for d in deltas])
        if writer.bits is not None:
            a, b_t = balanced(a, b_t)
        starts.append(out_start)
        all_a.append(a)
        all_b.append(b_t)
    packed_a = writer.low_rank_matrix(torch.cat(all_a))
    blocks: list[LowRankBlock] = []
    rank_start = 0
    for out_start, b_t in zip(starts, all_b, strict=True):
        rank, out_features = b_t.shape
        packed_b = writer.low_rank_matrix(b_t)
        blocks.append(LowRankBlock(out_start, out_features, rank_start, rank, packed_b))
        rank_start += rank
    return PackedLowRank(linear, packed_a, tuple(blocks))
