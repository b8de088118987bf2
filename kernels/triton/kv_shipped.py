"""What the kernels over KV pages of any format ship for: heads of 128, bfloat16, pages of the
size that they have where none is set."""

from __future__ import annotations

import torch

from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_formats.format import KVShape
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.kv_sections import native_tokens_of, page_layout_for
from polydelta.kernels.kv_selection import FULL, DoubleSparsity, Quest, Selection
from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.triton import kv_choose, kv_decode, kv_encode, kv_prefill
from polydelta.kernels.triton.kv_pages import pages_of
from polydelta.kernels.triton.kv_tiles import kv_decode_tiles, kv_prefill_tiles
from polydelta.kernels.triton.shipping import Floor, ShippedKernel

_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128
_DTYPE = torch.bfloat16
# Of decode: 16 sequences of so many tokens.
_CONTEXT = 8192


def shipped() -> list[ShippedKernel]:
    """kivi-4 and gear are what kivi-2 is and more; the formats that are not here are read like one
    that is."""
    return [
        *(_encode(name) for name in ("native", "int8", "fp8", "int4", "mustafar-50")),
        *(_decode(name) for name in ("int8", "fp8", "int4", "mustafar-50", "kivi-4", "gear")),
        _decode("native", Quest()),
        _decode("native", DoubleSparsity()),
        *(_prefill(name) for name in ("native", "int8", "mustafar-50", "gear")),
        *(make(each) for each in (Quest(), DoubleSparsity()) for make in (_score, _rank)),
    ]


def _kind(name: str, selection: Selection = FULL) -> KVKind:
    format = FORMATS[name]()
    row = 2 * _KV_HEADS * _HEAD_DIM * _DTYPE.itemsize
    page_bytes = native_tokens_of(format, selection) * row
    token = KVShape(_KV_HEADS, _HEAD_DIM, _DTYPE)
    layout = page_layout_for(format, selection, token, page_bytes)
    shape = AttentionShape(_HEADS, _KV_HEADS, _HEAD_DIM, layout.block_size)
    return KVKind(format, layout, shape, _DTYPE)


def _token_bytes(kind: KVKind) -> float:
    return kind.layout.page_bytes / kind.layout.block_size


def _encode(name: str) -> ShippedKernel:
    kind, tokens = _kind(name), 256
    pages = pages_of(kind, kind.layout.page_bytes)
    row = 2 * _KV_HEADS * _HEAD_DIM * _DTYPE.itemsize
    return ShippedKernel(
        f"KV encode, {name}",
        kv_encode.encode_kernel,
        {
            "pages_ptr": "*u8", "keys_ptr": "*bf16", "values_ptr": "*bf16", "places_ptr": "*i64",
            "key_stride": "i32", "value_stride": "i32",
        },
        kv_encode.encode_constants(pages),
        Floor(f"{tokens} tokens of 8 heads of 128", tokens * (row + _token_bytes(kind))),
        aligned=("pages_ptr", "keys_ptr", "values_ptr", "places_ptr", "key_stride", "value_stride"),
        options=kv_encode.options(pages),
    )  # fmt: skip


def _decode(name: str, selection: Selection = FULL) -> ShippedKernel:
    kind = _kind(name, selection)
    shape, choice = kind.shape, kv_choose.Choice.of(kind, selection)
    read = _CONTEXT if choice is None else choice.tokens(_CONTEXT)
    pages = pages_of(kind, kind.layout.page_bytes)
    tiles = kv_decode_tiles(shape, pages, _DTYPE)
    unit = 0 if choice is None else choice.unit
    return ShippedKernel(
        f"KV decode, {name}, {selection}",
        kv_decode.decode_kernel,
        {
            "queries_ptr": "*bf16", "pages_ptr": "*u8", "open_ptr": "*bf16", "lists_ptr": "*i32",
            "table_ptr": "*i32", "sums_ptr": "*fp32", "stats_ptr": "*fp32",
            "query_stride": "i32", "chunks": "i32", "width": "i32", "scale": "fp32",
        },
        kv_decode.decode_constants(shape, pages, tiles, unit),
        Floor(
            f"16 sequences, {read} of {_CONTEXT} tokens",
            bytes=16 * read * _token_bytes(kind),
            flops=4 * 16 * read * _HEADS * _HEAD_DIM,
        ),
        aligned=(
            "queries_ptr", "pages_ptr", "open_ptr", "lists_ptr", "table_ptr", "sums_ptr",
            "stats_ptr", "query_stride",
        ),
        options=tiles.options,
    )  # fmt: skip


def _prefill(name: str) -> ShippedKernel:
    kind, tokens = _kind(name), 2048
    pages = pages_of(kind, kind.layout.page_bytes)
    tiles = kv_prefill_tiles(kind.shape, pages, _DTYPE)
    return ShippedKernel(
        f"KV prefill, {name}",
        kv_prefill.prefill_kernel,
        {
            "queries_ptr": "*bf16", "pages_ptr": "*u8", "open_ptr": "*bf16", "table_ptr": "*i32",
            "out_ptr": "*bf16", "query_stride": "i32", "scale": "fp32",
        },
        kv_prefill.prefill_constants(kind.shape, pages, tiles),
        Floor(
            f"one sequence of {tokens} tokens",
            bytes=tokens * (_token_bytes(kind) + 2 * _HEADS * _HEAD_DIM * _DTYPE.itemsize),
            flops=2 * tokens * tokens * _HEADS * _HEAD_DIM,
        ),
        aligned=("queries_ptr", "pages_ptr", "open_ptr", "table_ptr", "out_ptr", "query_stride"),
        options=tiles.options,
    )  # fmt: skip


def _score(selection: Selection) -> ShippedKernel:
    kind = _kind("native", selection)
    pages, notes = pages_of(kind, kind.layout.page_bytes), kv_choose.notes_of(kind)
    choice = kv_choose.Choice.of(kind, selection)
    assert choice is not None
    blocks = choice.blocks(_CONTEXT)
    noted = notes.labels or 2 * _HEAD_DIM
    return ShippedKernel(
        f"KV scores, {selection}",
        kv_choose.score_kernel,
        {
            "queries_ptr": "*bf16", "pages_ptr": "*u8", "open_ptr": "*bf16",
            "channels_ptr": "*i64", "table_ptr": "*i32", "scores_ptr": "*fp32",
            "query_stride": "i32", "asks_at": "i32", "width": "i32",
        },
        kv_choose.choose_constants(kind.shape, pages, notes),
        Floor(
            f"16 sequences of {blocks} blocks",
            bytes=16 * blocks * (_KV_HEADS * noted * _DTYPE.itemsize + _HEADS * 4),
            flops=2 * 16 * blocks * _HEADS * noted,
        ),
        aligned=("queries_ptr", "pages_ptr", "open_ptr", "channels_ptr", "table_ptr", "scores_ptr"),
        options={"num_warps": 4, "num_stages": 2},
    )  # fmt: skip


def _rank(selection: Selection) -> ShippedKernel:
    kind = _kind("native", selection)
    pages, notes = pages_of(kind, kind.layout.page_bytes), kv_choose.notes_of(kind)
    choice = kv_choose.Choice.of(kind, selection)
    assert choice is not None
    blocks = choice.blocks(_CONTEXT)
    return ShippedKernel(
        f"KV ranks, {selection}",
        kv_choose.rank_kernel,
        {
            "scores_ptr": "*fp32", "ranks_ptr": "*i64", "table_ptr": "*i32", "asks_at": "i32",
            "width": "i32", "scale": "fp32",
        },
        kv_choose.rank_constants(kind.shape, pages, notes),
        Floor(
            f"16 sequences of {blocks} blocks", bytes=16 * blocks * (_HEADS * 4 + _KV_HEADS * 8)
        ),
        aligned=("scores_ptr", "ranks_ptr", "table_ptr"),
        options={"num_warps": 4, "num_stages": 2},
    )  # fmt: skip
