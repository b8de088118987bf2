"""How a tile of keys or values is read from pages of any format: decoded on its way into registers,
a page's bytes being all that is ever read.

The formats are those of `polydelta.kernels.kv_formats`; which one it is, a kernel knows when it is
compiled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from polydelta.kernels.kv_formats import codes

KEYS = tl.constexpr(0)
VALUES = tl.constexpr(1)
# Numbers that share a scale in KIVI.
GROUP = tl.constexpr(codes.GROUP)
# Of GEAR's factors.
RANK = tl.constexpr(2)


class Tokens(NamedTuple):
    """Tokens of one sequence and kv head, a tile's worth; all but the head are `[tokens]`."""

    # Where their pages begin, as pointers to bytes.
    pages: Any
    places: Any
    # Which of them are there, encoded in their pages, and which in the open page. The others are 0.
    encoded: Any
    opened: Any
    # The open page of the sequence, a pointer to numbers of the model's dtype.
    open_ptr: Any
    head: Any


@triton.jit
def find_tokens(
    pages_ptr, open_ptr, table_ptr, positions, inside, context, slot, head, PAGES: tl.constexpr
):
    """Tokens at positions `[tokens]`, of which those inside are there. table: the sequence's page
    ids; slot: its place among the open pages."""
    blocks = positions // PAGES.size
    # The page of the newest token is not encoded yet, where the format is by page.
    opened = inside & (blocks == (context - 1) // PAGES.size) & PAGES.by_page
    encoded = inside & (opened == 0)
    ids = tl.load(table_ptr + blocks, mask=encoded, other=0)
    return Tokens(
        pages_ptr + ids.to(tl.int64) * PAGES.page_bytes,
        positions % PAGES.size,
        encoded,
        opened,
        open_ptr + slot.to(tl.int64) * (PAGES.size * 2 * PAGES.kv_heads * PAGES.head_dim),
        head,
    )


@triton.jit
def load_tile(tokens, SIDE: tl.constexpr, PAGES: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Keys or values of tokens, `[tokens, BLOCK_DIM]` of the model's dtype; what is not there is
    0."""
    dtype: tl.constexpr = tokens.open_ptr.dtype.element_ty
    AT: tl.constexpr = PAGES.keys if SIDE == KEYS else PAGES.values
    row = tokens.places * PAGES.kv_heads + tokens.head
    if PAGES.family == "native":
        tile = load_rows(tokens, row, AT.codes, dtype, PAGES, BLOCK_DIM)
    elif PAGES.family == "int8":
        codes = load_rows(tokens, row, AT.codes, tl.int8, PAGES, BLOCK_DIM)
        scales = load_each(tokens, row, AT.scales, tl.float16, 0)
        tile = codes.to(tl.float32) * scales[:, None]
    elif PAGES.family == "fp8":
        codes = load_rows(tokens, row, AT.codes, tl.uint8, PAGES, BLOCK_DIM)
        scales = load_each(tokens, row, AT.scales, tl.float16, 0)
        tile = float_of_e4m3(codes) * scales[:, None]
    elif PAGES.family == "int4":
        codes = load_codes(tokens, row, AT.codes, PAGES, BLOCK_DIM)
        scales = load_each(tokens, row * 2, AT.scales, tl.float16, 0)
        zeros = load_each(tokens, row * 2, AT.scales, tl.float16, 1)
        tile = codes.to(tl.float32) * scales[:, None] + zeros[:, None]
    elif PAGES.family == "mustafar":
        tile = load_sparse(tokens, row, AT.bits, AT.codes, dtype, PAGES, BLOCK_DIM)
        if SIDE == KEYS:
            tile = tile.to(tl.float32) + load_means(tokens, AT.means, dtype, PAGES, BLOCK_DIM)
    else:
        codes = load_codes(tokens, row, AT.codes, PAGES, BLOCK_DIM)
        tile = scaled(tokens, row, codes, AT.scales, SIDE, PAGES, BLOCK_DIM)
        if PAGES.family == "gear":
            tile = mended(tokens, row, tile, AT, dtype, PAGES, BLOCK_DIM)
    tile = tile.to(dtype)
    if PAGES.by_page:
        feature = tl.arange(0, BLOCK_DIM)
        place = ((tokens.places * 2 + SIDE) * PAGES.kv_heads + tokens.head) * PAGES.head_dim
        own = tokens.opened[:, None] & (feature < PAGES.head_dim)[None, :]
        opened = tl.load(tokens.open_ptr + place[:, None] + feature[None, :], mask=own, other=0.0)
        tile = tl.where(tokens.opened[:, None], opened, tile)
    return tile


@triton.jit
def section(tokens, AT: tl.constexpr, TYPE: tl.constexpr):
    """Where one begins in each token's page, `[tokens]`."""
    return (tokens.pages + AT).to(tl.pointer_type(TYPE))


@triton.jit
def load_rows(
    tokens, row, AT: tl.constexpr, TYPE: tl.constexpr, PAGES: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """One number a channel, `[tokens, BLOCK_DIM]`."""
    feature = tl.arange(0, BLOCK_DIM)
    at = section(tokens, AT, TYPE)[:, None] + (row * PAGES.head_dim)[:, None] + feature[None, :]
    own = tokens.encoded[:, None] & (feature < PAGES.head_dim)[None, :]
    return tl.load(at, mask=own, other=0)


@triton.jit
def load_each(tokens, index, AT: tl.constexpr, TYPE: tl.constexpr, PLACE: tl.constexpr):
    """One number a token, `[tokens]` float32."""
    at = section(tokens, AT, TYPE) + index + PLACE
    return tl.load(at, mask=tokens.encoded, other=0).to(tl.float32)


@triton.jit
def load_codes(tokens, row, AT: tl.constexpr, PAGES: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Codes of 2 or 4 bits, `[tokens, BLOCK_DIM]` uint8. A byte is read once."""
    INSIDE: tl.constexpr = 8 // PAGES.bits
    ROW: tl.constexpr = PAGES.head_dim // INSIDE
    byte = tl.arange(0, BLOCK_DIM // INSIDE)
    at = section(tokens, AT, tl.uint8)[:, None] + (row * ROW)[:, None] + byte[None, :]
    packed = tl.load(at, mask=tokens.encoded[:, None] & (byte < ROW)[None, :], other=0)
    if PAGES.bits == 4:
        codes = tl.interleave(packed & 15, packed >> 4)
    else:
        even = tl.interleave(packed & 3, (packed >> 4) & 3)
        codes = tl.interleave(even, tl.interleave((packed >> 2) & 3, packed >> 6))
    return codes


@triton.jit
def float_of_e4m3(codes):
    """float32. As halves the bytes' bits are the numbers over 256, small ones too; NaN is no code
    that is stored."""
    wide = codes.to(tl.uint16)
    halves = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return halves.to(tl.float32) * 256.0


@triton.jit
def load_sparse(
    tokens, row, BITS_AT: tl.constexpr, AT: tl.constexpr, TYPE: tl.constexpr,
    PAGES: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Numbers where a bitmap has ones, each at the place that the ones before it leave."""
    feature = tl.arange(0, BLOCK_DIM)
    own = tokens.encoded[:, None] & (feature < PAGES.head_dim)[None, :]
    byte = (row * (PAGES.head_dim // 8))[:, None] + (feature // 8)[None, :]
    bytes_ = tl.load(section(tokens, BITS_AT, tl.uint8)[:, None] + byte, mask=own, other=0)
    bits = (bytes_.to(tl.int32) >> (feature % 8)[None, :]) & 1
    place = (row * PAGES.kept)[:, None] + tl.cumsum(bits, 1) - bits
    return tl.load(section(tokens, AT, TYPE)[:, None] + place, mask=bits != 0, other=0.0)


@triton.jit
def load_means(
    tokens, AT: tl.constexpr, TYPE: tl.constexpr, PAGES: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Of each token's page, `[tokens, BLOCK_DIM]` float32."""
    feature = tl.arange(0, BLOCK_DIM)
    at = section(tokens, AT, TYPE)[:, None] + (tokens.head * PAGES.head_dim + feature)[None, :]
    own = tokens.encoded[:, None] & (feature < PAGES.head_dim)[None, :]
    return tl.load(at, mask=own, other=0.0).to(tl.float32)


@triton.jit
def scaled(
    tokens, row, codes, AT: tl.constexpr, SIDE: tl.constexpr, PAGES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """KIVI: keys by channel of a group of tokens, values by group of channels of a token;
    `[tokens, BLOCK_DIM]` float32."""
    feature = tl.arange(0, BLOCK_DIM)
    if SIDE == KEYS:
        group = tokens.places // GROUP * PAGES.kv_heads + tokens.head
        pair = (group * PAGES.head_dim)[:, None] + feature[None, :]
    else:
        pair = (row * tl.cdiv(PAGES.head_dim, GROUP))[:, None] + (feature // GROUP)[None, :]
    own = tokens.encoded[:, None] & (feature < PAGES.head_dim)[None, :]
    # Scale and zero in one load.
    both = tl.load(section(tokens, AT, tl.uint32)[:, None] + pair, mask=own, other=0)
    scales = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    zeros = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return codes.to(tl.float32) * scales + zeros


@triton.jit
def mended(
    tokens, row, tile, AT: tl.constexpr, TYPE: tl.constexpr, PAGES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """GEAR: what the factors of the page add, and then outliers in their places."""
    OUTLIERS: tl.constexpr = PAGES.outliers
    feature = tl.arange(0, BLOCK_DIM)
    own = tokens.encoded[:, None] & (feature < PAGES.head_dim)[None, :]
    for rank in tl.static_range(RANK):
        left = load_each(tokens, row * RANK, AT.rows, tl.float16, rank)
        column = (tokens.head * RANK + rank) * PAGES.head_dim + feature
        at = section(tokens, AT.columns, tl.float16)[:, None] + column[None, :]
        tile += left[:, None] * tl.load(at, mask=own, other=0.0).to(tl.float32)
    for number in tl.static_range(OUTLIERS):
        first = row * OUTLIERS
        if PAGES.place_bits == 8:
            channels = load_each(tokens, first, AT.outlier_places, tl.uint8, number)
        else:
            channels = load_each(tokens, first, AT.outlier_places, tl.int16, number)
        outliers = load_each(tokens, first, AT.outliers, TYPE, number)
        here = feature[None, :] == channels.to(tl.int32)[:, None]
        tile = tl.where(here, outliers[:, None], tile)
    return tile
