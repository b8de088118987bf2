"""Paged attention on a CPU: torch's flash kernel over pages gathered by the block table.

Decoding sequences are computed together, padded to the longest of their group; a prefill chunk is
computed alone. The query heads that share a key head are laid out as queries of that head, so that
keys and values are never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.kernels.ops import AttentionShape, SequenceSlice
from polydelta.kernels.reference import visible


@dataclass(frozen=True, eq=False)
class DecodeGroup:
    """Sequences with one query each."""

    # Rows of the flat batch, [sequences] int64.
    rows: Tensor
    # [sequences * blocks] int64, padded with page 0.
    pages: Tensor
    # [sequences, 1, 1, blocks * block_size]: 0 where seen, -inf elsewhere.
    mask: Tensor
    # [places] int64: of all gathered places, those after a sequence's last token. They are zeroed:
    # an adapter may have left there what reads as NaN, which no mask stops.
    empty: Tensor


@dataclass(frozen=True, eq=False)
class PrefillChunk:
    """One sequence with several queries."""

    rows: slice
    # [blocks] int64
    pages: Tensor
    context: int
    # [queries, context]: 0 where seen, -inf elsewhere; None when plain causality says it.
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    shape: AttentionShape
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillChunk, ...]


def plan(
    shape: AttentionShape, sequences: Sequence[SequenceSlice], dtype: torch.dtype
) -> AttentionPlan:
    decoding = sorted((s for s in sequences if s.length == 1), key=lambda s: s.context)
    return AttentionPlan(
        shape,
        tuple(_decode_group(shape, group, dtype) for group in _groups_of_like_length(decoding)),
        tuple(_prefill_chunk(shape, s, dtype) for s in sequences if s.length > 1),
    )


def attend(plan: AttentionPlan, queries: Tensor, kv: Tensor) -> Tensor:
    """queries: `[tokens, heads, head_dim]`; kv: `[pages, 2, block_size, kv_heads, head_dim]`."""
    out = torch.empty_like(queries)
    for group in plan.decode:
        out.index_copy_(0, group.rows, _decode(plan.shape, group, queries, kv))
    for chunk in plan.prefill:
        out[chunk.rows] = _prefill(chunk, queries[chunk.rows], kv)
    return out


def _groups_of_like_length(decoding: Sequence[SequenceSlice]) -> list[list[SequenceSlice]]:
    """Cuts sequences sorted by length so that padding never doubles a group's work."""
    groups: list[list[SequenceSlice]] = []
    for sequence in decoding:
        if groups and sequence.context <= 2 * max(groups[-1][0].context, 64):
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups


def _decode_group(
    shape: AttentionShape, group: Sequence[SequenceSlice], dtype: torch.dtype
) -> DecodeGroup:
    size, window = shape.block_size, shape.window
    # Pages wholly before the window are not read at all.
    firsts = [0 if window is None else max(0, s.context - window) // size for s in group]
    pages = [
        list(s.pages[first : -(-s.context // size)]) for s, first in zip(group, firsts, strict=True)
    ]
    blocks = max(map(len, pages))
    table = torch.tensor([p + [0] * (blocks - len(p)) for p in pages])
    contexts = torch.tensor([s.context for s in group])[:, None]
    positions = torch.tensor(firsts)[:, None] * size + torch.arange(blocks * size)
    after = positions >= contexts
    hidden = after if window is None else after | (positions < contexts - window)
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
    rows = torch.tensor([s.start for s in group])
    empty = after.flatten().nonzero().flatten()
    return DecodeGroup(rows, table.flatten(), mask[:, None, None], empty)


def _prefill_chunk(
    shape: AttentionShape, sequence: SequenceSlice, dtype: torch.dtype
) -> PrefillChunk:
    rows = slice(sequence.start, sequence.start + sequence.length)
    pages = torch.tensor(sequence.pages[: -(-sequence.context // shape.block_size)])
    fresh = sequence.context == sequence.length
    if fresh and (shape.window is None or sequence.context <= shape.window):
        return PrefillChunk(rows, pages, sequence.context, None)
    seen = visible(sequence, shape.window, torch.device("cpu"))
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -math.inf)
    return PrefillChunk(rows, pages, sequence.context, mask)


def _decode(shape: AttentionShape, group: DecodeGroup, queries: Tensor, kv: Tensor) -> Tensor:
    count, heads = len(group.rows), shape.num_kv_heads
    gathered = (
        kv[:, side].index_select(0, group.pages).flatten(0, 1).index_fill_(0, group.empty, 0.0)
        for side in (0, 1)
    )
    keys, values = (side.view(count, -1, heads, shape.head_dim) for side in gathered)
    grouped = queries.index_select(0, group.rows).view(count, heads, -1, shape.head_dim)
    mixed = F.scaled_dot_product_attention(
        grouped,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=group.mask.expand(-1, -1, grouped.shape[2], -1),
    )
    return mixed.reshape(count, shape.num_heads, shape.head_dim)


def _prefill(chunk: PrefillChunk, queries: Tensor, kv: Tensor) -> Tensor:
    keys, values = (
        kv[:, side].index_select(0, chunk.pages).flatten(0, 1)[: chunk.context].transpose(0, 1)
        for side in (0, 1)
    )
    mixed = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=chunk.mask,
        is_causal=chunk.mask is None,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1)
