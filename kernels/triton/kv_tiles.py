"""How large the tiles are that are read from pages of a format: what is decoded takes registers,
and each section of a page that is read takes shared memory for every stage."""

from __future__ import annotations

import torch

from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton.attention_tiles import Tiles, decode_tiles, prefill_tiles
from polydelta.kernels.triton.kv_pages import Pages

# Numbers of a tile of keys, and stages, by family.
_DECODE = {"mustafar": (2048, 2), "kivi": (4096, 2), "gear": (2048, 2)}
_PREFILL = {"native": (4096, 3), "mustafar": (4096, 3)}


def kv_decode_tiles(shape: AttentionShape, pages: Pages, dtype: torch.dtype) -> Tiles:
    """For one token of each sequence."""
    tiles = decode_tiles(shape, dtype)
    numbers, stages = _DECODE.get(pages.family, (4096, 3))
    return _tiles(tiles, min(numbers // tiles.features, 4096 // tiles.rows), 4, stages)


def kv_prefill_tiles(shape: AttentionShape, pages: Pages, dtype: torch.dtype) -> Tiles:
    """For a run of tokens."""
    tiles = prefill_tiles(shape, dtype)
    numbers, stages = _PREFILL.get(pages.family, (2048, 2))
    return _tiles(tiles, numbers // tiles.features, 8, stages)


def _tiles(like: Tiles, tokens: int, warps: int, stages: int) -> Tiles:
    kv = max(16, min(64, tokens))
    # No loads ahead where heads are wide: with two stages, gear would take 130 KiB.
    stages = 1 if like.features > 128 else stages
    return Tiles(like.rows, kv, like.features, warps, stages)
