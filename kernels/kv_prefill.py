"""Prompts that read only the blocks of their context that matter: XAttention (arXiv:2503.16428)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from polydelta.kernels.kv_selecting import precise
from polydelta.kernels.kv_selection import XAttention
from polydelta.kernels.ops import AttentionShape, SequenceSlice
from polydelta.kernels.running_softmax import RunningSoftmax

# Keys and values of tokens `[kv_heads, n]` int64, each `[kv_heads, n, head_dim]`.
Load = Callable[[Tensor], tuple[Tensor, Tensor]]

# Blocks that are decoded and looked at together.
_AT_ONCE = 8


def attended_blocks(
    selection: XAttention, shape: AttentionShape, part: SequenceSlice, queries: Tensor, load: Load
) -> Tensor:
    """Attention of a prompt's queries to the blocks that they choose. queries: `[length, heads,
    head_dim]`, the slice's -> the same shape; the first is at a multiple of the block's size."""
    wanted = block_mask(selection, shape, part, queries, load)
    positions = torch.arange(part.context - part.length, part.context, device=queries.device)
    blocks = zip(queries.split(selection.block), positions.split(selection.block), strict=True)
    return torch.cat(
        [
            _attended(selection, shape.num_kv_heads, *block, wanted[:, number], load)
            for number, block in enumerate(blocks)
        ]
    )


def block_mask(
    selection: XAttention, shape: AttentionShape, part: SequenceSlice, queries: Tensor, load: Load
) -> Tensor:
    """Which blocks of keys each block of queries reads: for each head the fewest that receive the
    threshold's share of its attention, by `_block_scores`, the first one and its own always among
    them. -> `[heads, query blocks, key blocks]` bool, both by position; shapes as above."""
    scores = _block_scores(selection, shape, part, queries, load)
    keys = torch.arange(scores.shape[2], device=scores.device)
    own = (part.context - part.length) // selection.block + keys[: scores.shape[1], None]
    always = (keys == 0) | (keys == own)
    if selection.threshold >= 1:
        # Those too whose scores are too small to count.
        return (keys <= own).expand_as(scores)
    ranked = scores.masked_fill(always, math.inf).sort(dim=-1, descending=True, stable=True).indices
    sorted_scores = scores.gather(-1, ranked)
    before = sorted_scores.cumsum(-1) - sorted_scores
    needed = before < selection.threshold * scores.sum(-1, keepdim=True)
    return (torch.zeros_like(needed).scatter(-1, ranked, needed) & (keys <= own)) | always


def _block_scores(
    selection: XAttention, shape: AttentionShape, part: SequenceSlice, queries: Tensor, load: Load
) -> Tensor:
    """About what attention each block of keys receives from a block's queries, summed over tiles of
    `stride` queries: `[heads, query blocks, key blocks]`.

    The score of a tile of so many queries and as many keys is the mean product along its
    antidiagonal, of the queries that there are; where a prompt ends inside of a tile, keys behind
    the end count as zeros.
    """
    stride, per_block = selection.stride, selection.block // selection.stride
    group = shape.num_heads // shape.num_kv_heads
    first = part.context - part.length
    if first % selection.block:
        raise ValueError(f"{selection} cannot begin at position {first}, inside of a block.")
    # The last query of a tile meets the first key: [kv_heads, group * tiles, stride * head_dim].
    tiles = _tiles(precise(queries), stride).flip(1)
    counts = queries.new_full((len(tiles), 1), stride, dtype=tiles.dtype)
    counts[-1] = (part.length - 1) % stride + 1
    products = []
    rows = tiles.unflatten(2, (-1, group)).permute(2, 3, 0, 1, 4).flatten(1, 2).flatten(2)
    for tokens in torch.arange(part.context, device=queries.device).split(
        _AT_ONCE * selection.block
    ):
        keys, _ = load(tokens.expand(shape.num_kv_heads, -1))
        # [kv_heads, tiles, stride * head_dim]
        columns = _tiles(keys.to(rows.dtype).transpose(0, 1), stride).permute(2, 0, 1, 3)
        products.append(rows @ columns.flatten(2).transpose(1, 2))
    # [heads, query tiles, key tiles]
    scores = torch.cat(products, -1).unflatten(1, (group, -1)).flatten(0, 1)
    scores = scores / (counts * math.sqrt(shape.head_dim))
    own = first // stride + torch.arange(scores.shape[1], device=scores.device)[:, None]
    later = torch.arange(scores.shape[2], device=scores.device) > own
    shares = scores.masked_fill(later, -math.inf).softmax(-1)
    missing = (-shares.shape[2] % per_block, -shares.shape[1] % per_block)
    shares = functional.pad(shares, (0, missing[0], 0, missing[1]))
    blocks: Tensor = shares.unflatten(2, (-1, per_block)).unflatten(1, (-1, per_block)).sum((2, 4))
    return blocks


def _tiles(tokens: Tensor, stride: int) -> Tensor:
    """`[n, heads, head_dim]` -> `[tiles, stride, heads, head_dim]`, with zeros behind the end."""
    padded = functional.pad(tokens, (0, 0, 0, 0, 0, -len(tokens) % stride))
    return padded.view(-1, stride, *tokens.shape[1:])


def _attended(
    selection: XAttention,
    num_kv_heads: int,
    queries: Tensor,
    positions: Tensor,
    wanted: Tensor,
    load: Load,
) -> Tensor:
    """Of one block's queries, `[n, heads, head_dim]`; wanted: `[heads, key blocks]` bool."""
    places = torch.arange(selection.block, device=queries.device)
    # [kv_heads, group, n, head_dim], and [kv_heads, group, key blocks]
    rows = precise(queries).transpose(0, 1).unflatten(0, (num_kv_heads, -1))
    wanted = wanted.unflatten(0, (num_kv_heads, -1))
    attended = [RunningSoftmax(each) for each in rows]
    for blocks in wanted.flatten(0, 1).any(0).nonzero()[:, 0].split(_AT_ONCE):
        tokens = (blocks[:, None] * selection.block + places).flatten()
        tokens = tokens[tokens <= positions[-1]]
        keys, values = (each.to(rows.dtype) for each in load(tokens.expand(num_kv_heads, -1)))
        causal = tokens <= positions[:, None]
        for head, softmax in enumerate(attended):
            # [group, tokens]
            reads = wanted[head][:, tokens // selection.block]
            some = reads.any(0).nonzero()[:, 0]
            if len(some):
                scores = rows[head] @ keys[head, some].T / math.sqrt(queries.shape[-1])
                softmax.add(scores, reads[:, None, some] & causal[:, some], values[head, some])
    together = torch.stack([softmax.result() for softmax in attended])
    return together.flatten(0, 1).transpose(0, 1).to(queries.dtype)
