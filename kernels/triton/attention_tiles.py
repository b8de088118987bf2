"""What decode and prefill have in common: the sizes of their tiles, how a tile of paged KV is
found, and one step of the online softmax (arXiv:1805.02867)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton.tuning import Options, Tunable

# Below every score and yet finite, so that rows that have seen nothing make no NaN.
LOWEST = tl.constexpr(-1e30)


@dataclass(frozen=True)
class Tiles:
    """The block sizes of a kernel, and how it is compiled."""

    # Rows of queries: a row is one head of one token.
    rows: int
    # Tokens of KV.
    kv: int
    # Features of a head, a power of two.
    features: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, rows: int, features: int, options: Options) -> Tiles:
        return cls(rows, options["kv"], features, options["num_warps"], options["num_stages"])

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def decode_tiles(shape: AttentionShape, dtype: torch.dtype) -> Tiles:
    """For one token of each sequence, as fast as is known for this GPU."""
    rows = _power_of_two(shape.num_heads // shape.num_kv_heads)
    return Tiles.of(rows, _power_of_two(shape.head_dim), decode_choices(shape, dtype).options())


def decode_choices(shape: AttentionShape, dtype: torch.dtype) -> Tunable:
    """For one token of each sequence: as many bytes in flight as two programs on a multiprocessor
    leave room for.

    Page ids are loaded one stage before the KV that they lead to; with five stages both are two
    tiles ahead, with three or four only one.
    """
    features = _power_of_two(shape.head_dim)
    rows = _power_of_two(shape.num_heads // shape.num_kv_heads)
    # 16 KiB of keys and as many of values, less where many rows take the registers.
    kv = max(16, min(64, 16384 // (features * dtype.itemsize), 4096 // rows))
    many = rows * features > 4096
    if many:
        return _tunable("decode", shape, dtype, (kv, 8, 3))
    # Fewer bytes in flight, and more programs on a multiprocessor.
    narrow = max(16, kv // 2)
    return _tunable("decode", shape, dtype, (kv, 4, 5), (kv, 4, 3), (narrow, 4, 5))


def prefill_tiles(shape: AttentionShape, dtype: torch.dtype) -> Tiles:
    """For a run of tokens, as fast as is known for this GPU."""
    features = _power_of_two(shape.head_dim)
    rows = 32 if dtype == torch.float32 else 64 if features > 128 else 128
    return Tiles.of(rows, features, prefill_choices(shape, dtype).options())


def prefill_choices(shape: AttentionShape, dtype: torch.dtype) -> Tunable:
    """For a run of tokens: what 99 KiB of shared memory hold, which every Ampere GPU has."""
    features = _power_of_two(shape.head_dim)
    if dtype == torch.float32:
        # No tensor cores: small tiles, that the registers hold.
        return _tunable("prefill", shape, dtype, (16, 8 if features > 64 else 4, 2))
    if features > 128:
        return _tunable("prefill", shape, dtype, (32, 8, 3))
    return _tunable("prefill", shape, dtype, (64, 8, 5), (64, 8, 3), (32, 8, 4))


def _tunable(
    kind: str, shape: AttentionShape, dtype: torch.dtype, *choices: tuple[int, int, int]
) -> Tunable:
    """choices: tokens of KV, warps, stages."""
    heads = f"{shape.num_heads} heads of {shape.head_dim} on {shape.num_kv_heads}"
    names = ("kv", "num_warps", "num_stages")
    options = tuple(dict(zip(names, choice, strict=True)) for choice in choices)
    return Tunable(f"attention, {kind}, {heads}, {str(dtype)[6:]}", options)


def constants(shape: AttentionShape, tiles: Tiles) -> dict[str, int]:
    """What both kernels are compiled for."""
    return {
        "HEADS": shape.num_heads,
        "KV_HEADS": shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "PAGE_TOKENS": shape.block_size,
        "BLOCK_ROWS": tiles.rows,
        "BLOCK_KV": tiles.kv,
        "BLOCK_DIM": tiles.features,
    }


def scale(shape: AttentionShape) -> float:
    """Of the scores, which are exponents of 2."""
    return math.log2(math.e) / math.sqrt(shape.head_dim)


def _power_of_two(size: int) -> int:
    """The next one, and no less than a tensor core's 16."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit
def key_pointers(
    kv_ptr,
    table_ptr,
    tokens,
    inside,
    kv_head,
    features,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """`[BLOCK_KV, BLOCK_DIM]`: where the keys of tokens `[BLOCK_KV]` are."""
    ROW: tl.constexpr = KV_HEADS * HEAD_DIM
    pages = tl.load(table_ptr + tokens // PAGE_TOKENS, mask=inside, other=0)
    rows = pages.to(tl.int64) * (2 * PAGE_TOKENS * ROW) + tokens % PAGE_TOKENS * ROW
    return kv_ptr + (rows + kv_head * HEAD_DIM)[:, None] + features[None, :]


@triton.jit
def softmax_step(scores, peak, total):
    """Scores `[rows, tokens]` join what was seen before: their weights, what the old sums are to be
    multiplied with, the new peaks `[rows]` and the new totals `[rows]`."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    return weights, shrink, new_peak, total * shrink + tl.sum(weights, 1)
