"""Which tokens a query reads, in plain torch.

A choice is a function of the query and of what is stored before it, and of nothing else. Equal
scores go to the lower position. A kv head has several query heads: what counts is the largest share
that one of them would give of its attention, among the candidates. (Scores themselves are larger in
some heads than in others, which would be all that is heard.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polydelta.kernels.kv_memory import KVKind, KVMemory, decode_blocks, section_of
from polydelta.kernels.kv_notes import labels_of
from polydelta.kernels.kv_selection import DoubleSparsity, InfLLM, Quest
from polydelta.kernels.ops import SequenceSlice

# Tokens of InfLLM's pages that are decoded together.
_AT_ONCE = 1024


def select(
    kind: KVKind, layer: int, memory: KVMemory, part: SequenceSlice, queries: Tensor
) -> Tensor | None:
    """Positions that the slice's one query reads, `[kv_heads, n]` int64, ascending, its own among
    them; None for all. queries: `[length, heads, head_dim]`.

    A layer with a window of its own reads that, and chooses nothing.
    """
    if kind.shape.window is not None:
        return None
    match part.selection:
        case Quest() as quest if layer >= quest.dense_layers:
            return _quest(kind, memory, part, _grouped(kind, queries), quest)
        case DoubleSparsity(budget):
            return _double_sparsity(kind, layer, memory, part, _grouped(kind, queries), budget)
        case InfLLM() as infllm:
            return _infllm(kind, memory, part, _grouped(kind, queries), infllm)
    return None


def precise(x: Tensor) -> Tensor:
    """What attention is computed in: float32, or float64 where it comes so."""
    return x if x.dtype == torch.float64 else x.float()


def _quest(
    kind: KVKind, memory: KVMemory, part: SequenceSlice, queries: Tensor, quest: Quest
) -> Tensor | None:
    """queries: `[kv_heads, group, head_dim]`, here and below."""
    own = (part.context - 1) // kind.layout.block_size
    count = quest.num_pages(kind.layout.block_size)
    if own < count:
        return None
    pages = torch.tensor(part.pages[1:own], device=queries.device)
    by_least, by_most = map(precise, bound_weights(queries, quest.reach))
    # Both [kv_heads, head_dim, pages].
    least, most = (
        section_of(kind, memory, name, pages).to(by_most.dtype).permute(1, 2, 0)
        for name in ("key_least", "key_most")
    )
    scores = by_most @ most + by_least @ least
    chosen = _best(_largest_shares(kind, scores), count - 2) + 1
    return _tokens(kind, part, 1, chosen, own)


def bound_weights(queries: Tensor, reach: float) -> tuple[Tensor, Tensor]:
    """What the least and the most of each channel are multiplied with, both like the queries."""
    toward = queries * ((1 + reach) / 2)
    away = queries * ((1 - reach) / 2)
    return toward.where(queries < 0, away), toward.where(queries >= 0, away)


def _double_sparsity(
    kind: KVKind, layer: int, memory: KVMemory, part: SequenceSlice, queries: Tensor, budget: int
) -> Tensor | None:
    assert kind.labels is not None
    if part.context <= budget:
        return None
    own = (part.context - 1) // kind.layout.block_size
    pages = torch.tensor(part.pages[: own + 1], device=queries.device)
    # [pages, block_size, kv_heads, labels]
    labels = section_of(kind, memory, "labels", pages)
    if kind.format.by_page:
        assert memory.open is not None
        labels[own] = labels_of(kind, layer, memory.open[part.slot, :, 0])
    # [kv_heads, labels, tokens], the query's own not among them: it is read anyway.
    before = labels.flatten(0, 1)[: part.context - 1].permute(1, 2, 0)
    channels = kind.labels[layer, :, None].to(queries.device)
    asked = precise(queries).gather(-1, channels.expand(-1, queries.shape[1], -1))
    chosen = _best(_largest_shares(kind, asked @ before.to(asked.dtype)), budget - 1)
    return torch.cat((chosen, chosen.new_full((len(chosen), 1), part.context - 1)), 1)


def _infllm(
    kind: KVKind, memory: KVMemory, part: SequenceSlice, queries: Tensor, infllm: InfLLM
) -> Tensor | None:
    size = kind.layout.block_size
    between, count = infllm.blocks(part.context, size), infllm.num_chosen(size)
    if len(between) <= count:
        return None
    blocks = torch.tensor(between, device=queries.device)
    scores = [
        _represented(kind, memory, part, precise(queries), some)
        for some in blocks.split(max(1, _AT_ONCE // size))
    ]
    chosen = _best(_largest_shares(kind, torch.cat(scores, -1)), count) + between.start
    return _tokens(kind, part, between.start, chosen, between.stop)


def _represented(
    kind: KVKind, memory: KVMemory, part: SequenceSlice, queries: Tensor, blocks: Tensor
) -> Tensor:
    """The highest score of each block's representatives, `[kv_heads, group, blocks]`. blocks:
    `[n]`."""
    pages = torch.tensor(part.pages, device=blocks.device)[blocks]
    places = section_of(kind, memory, "representatives", pages).long()
    keys, _ = decode_blocks(kind, memory, part, blocks)
    # [blocks, kv_heads, representatives, head_dim]
    chosen = keys.transpose(1, 2).gather(
        2, places[..., None].expand(-1, -1, -1, kind.shape.head_dim)
    )
    return torch.einsum("hgd,nhrd->hgnr", queries, chosen.to(queries.dtype)).amax(-1)


def _grouped(kind: KVKind, queries: Tensor) -> Tensor:
    """`[1, heads, head_dim]` -> `[kv_heads, group, head_dim]`."""
    assert len(queries) == 1, "What chooses by query is asked for one query at a time."
    grouped: Tensor = queries[0].unflatten(0, (kind.shape.num_kv_heads, -1))
    return grouped


def _largest_shares(kind: KVKind, scores: Tensor) -> Tensor:
    """Logarithms of them, `[kv_heads, group, n]` -> `[kv_heads, n]`."""
    return (scores / math.sqrt(kind.shape.head_dim)).log_softmax(-1).amax(1)


def _best(scores: Tensor, count: int) -> Tensor:
    """Where they are highest, `[kv_heads, n]` -> `[kv_heads, count]` int64, ascending."""
    # Not topk, which may take any of equal ones.
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[:, :count].sort(-1).values


def _tokens(kind: KVKind, part: SequenceSlice, first: int, chosen: Tensor, end: int) -> Tensor:
    """Positions up to the query's in the blocks before `first`, the chosen ones `[kv_heads, n]` and
    those from `end` on, `[kv_heads, positions]` int64."""
    size, here = kind.layout.block_size, chosen.device
    oldest = torch.arange(first, device=here).expand(len(chosen), -1)
    newest = torch.arange(end, -(-part.context // size), device=here).expand(len(chosen), -1)
    blocks = torch.cat((oldest, chosen, newest), 1)
    positions = (blocks[..., None] * size + torch.arange(size, device=here)).flatten(1)
    # Without the places of the last block that come behind the query.
    return positions[:, : positions.shape[1] - (-part.context % size)]
