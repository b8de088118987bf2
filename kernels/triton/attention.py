"""Causal attention over paged KV, for one token of each sequence or runs of them."""

from __future__ import annotations

import torch
from torch import Tensor

from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton.attention_decode import (
    combine_constants,
    combine_kernel,
    decode,
    decode_kernel,
)
from polydelta.kernels.triton.attention_plan import AttentionPlan
from polydelta.kernels.triton.attention_prefill import (
    prefill,
    prefill_constants,
    prefill_kernel,
)
from polydelta.kernels.triton.attention_tiles import (
    Tiles,
    constants,
    decode_choices,
    decode_tiles,
    prefill_choices,
    prefill_tiles,
)
from polydelta.kernels.triton.shipping import Floor, ShippedKernel
from polydelta.kernels.triton.tuning import Options

_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def attend(plan: AttentionPlan, queries: Tensor, kv: Tensor) -> Tensor:
    """queries: `[tokens, heads, head_dim]`, perhaps a part of each row of a wider tensor; kv:
    `[pages, 2, block_size, kv_heads, head_dim]`, dense, of the same dtype -> as queries, dense.

    Sequences without context get zeros. At most three launches.
    """
    if queries.stride()[1:] != (queries.shape[2], 1):
        queries = queries.contiguous()
    out = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if plan.prefill is not None:
        part = plan.prefill
        prefill(plan.shape, part.tiles, part.count, part.table.tensor, queries, kv, out)
    if plan.decode is not None:
        single = plan.decode
        decode(plan.shape, single.tiles, single.sizes, single.table.tensor, queries, kv, out)
    return out


def shipped() -> list[ShippedKernel]:
    """For 32 heads on 8 of KV and pages of 16 tokens."""
    shape = _shape(128)
    decodes = decode_choices(shape, torch.bfloat16).choices
    prefills = prefill_choices(shape, torch.bfloat16).choices
    return [
        *(_decode(128, options=options) for options in decodes),
        *(_decode(size) for size in (64, 80, 96, 256)),
        _decode(128, dtype=torch.float16),
        _decode(128, dtype=torch.float32),
        _combine(128),
        *(_prefill(128, options=options) for options in prefills),
        _prefill(128, window=4096),
        *(_prefill(size) for size in (64, 80, 96, 256)),
        _prefill(128, dtype=torch.float16),
        _prefill(128, dtype=torch.float32),
    ]


def _shape(head_dim: int, window: int | None = None) -> AttentionShape:
    return AttentionShape(32, 8, head_dim, block_size=16, window=window)


def _name(kind: str, shape: AttentionShape, dtype: torch.dtype) -> str:
    window = "" if shape.window is None else f", window {shape.window}"
    return f"attention, {kind}, head {shape.head_dim}, {str(dtype)[6:]}{window}"


def _tuned(tiles: Tiles) -> str:
    return f"{tiles.kv} tokens, {tiles.num_warps} warps, {tiles.num_stages} stages"


def _decode(
    head_dim: int, dtype: torch.dtype = torch.bfloat16, options: Options | None = None
) -> ShippedKernel:
    """options: those that are tuned, where they are not the first ones."""
    shape = _shape(head_dim)
    tiles = decode_tiles(shape, dtype)
    tiles = tiles if options is None else Tiles.of(tiles.rows, tiles.features, options)
    pointer = _TYPES[dtype]
    tokens = 16 * 8192
    return ShippedKernel(
        f"{_name('decode', shape, dtype)}, {_tuned(tiles)}",
        decode_kernel,
        {
            "queries_ptr": pointer, "kv_ptr": pointer, "table_ptr": "*i32", "sums_ptr": "*fp32",
            "stats_ptr": "*fp32", "query_stride": "i32", "chunks": "i32", "scale": "fp32",
        },
        constants(shape, tiles),
        Floor(
            "16 sequences of 8192 tokens",
            bytes=2 * tokens * shape.num_kv_heads * head_dim * dtype.itemsize,
            flops=4 * tokens * shape.num_heads * head_dim,
        ),
        aligned=("queries_ptr", "kv_ptr", "table_ptr", "sums_ptr", "stats_ptr", "query_stride"),
        options=tiles.options,
        hot=dtype != torch.float32,
    )  # fmt: skip


def _combine(head_dim: int) -> ShippedKernel:
    shape = _shape(head_dim)
    tiles = decode_tiles(shape, torch.bfloat16)
    parts = 16 * shape.num_heads * 32
    return ShippedKernel(
        f"attention, chunks joined, head {head_dim}",
        combine_kernel,
        {
            "sums_ptr": "*fp32", "stats_ptr": "*fp32", "sequences_ptr": "*i32",
            "out_ptr": "*bf16", "chunks": "i32",
        },
        combine_constants(shape, tiles),
        Floor("16 sequences of 32 chunks", bytes=parts * (head_dim + 2) * 4),
        aligned=("sums_ptr", "stats_ptr", "sequences_ptr", "out_ptr"),
        options={"num_warps": 4, "num_stages": 2},
    )  # fmt: skip


def _prefill(
    head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    options: Options | None = None,
) -> ShippedKernel:
    shape = _shape(head_dim, window)
    tiles = prefill_tiles(shape, dtype)
    tiles = tiles if options is None else Tiles.of(tiles.rows, tiles.features, options)
    pointer = _TYPES[dtype]
    tokens = 2048
    return ShippedKernel(
        f"{_name('prefill', shape, dtype)}, {_tuned(tiles)}",
        prefill_kernel,
        {
            "queries_ptr": pointer, "kv_ptr": pointer, "table_ptr": "*i32", "out_ptr": pointer,
            "query_stride": "i32", "scale": "fp32",
        },
        prefill_constants(shape, tiles),
        Floor(
            f"one sequence of {tokens} tokens",
            bytes=2 * tokens * (shape.num_heads + shape.num_kv_heads) * head_dim * dtype.itemsize,
            flops=2 * tokens * tokens * shape.num_heads * head_dim,
        ),
        aligned=("queries_ptr", "kv_ptr", "table_ptr", "out_ptr", "query_stride"),
        options=tiles.options,
        hot=dtype != torch.float32,
    )  # fmt: skip
