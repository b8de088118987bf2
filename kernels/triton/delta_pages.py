"""Reading an adapter through its page table.

Everything in the pool starts at a multiple of 64 bytes, and so do the pages: a group of 64 bytes
lies in one page, and one look-up serves it. Rows of bits start at multiples of 16 bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Bytes; as in adapters_store/packed_tensors.py.
GROUP_BYTES = 64
CHUNK_BYTES = 16


class Source(NamedTuple):
    """An adapter in one layer of the pool."""

    # The pool as numbers of the adapter's dtype, bytes, float16, int32 and float32
    numbers: Any
    codes: Any
    halves: Any
    ints: Any
    floats: Any
    # The adapter's page ids, and the number of the layer's first page in the pool
    pages: Any
    first_page: Any


class Matrix(NamedTuple):
    """Where its rows lie, as `adapter_table.Rows` says."""

    start: Any
    stride: Any
    scales: Any
    scales_stride: Any


class Span(NamedTuple):
    """Columns of y that a program owns: start : stop."""

    start: Any
    stop: Any


@triton.jit
def in_pool(source, units, mask, PAGE_UNITS: tl.constexpr, UNIT: tl.constexpr):
    """Where units of an adapter's bytes lie in the pool, int64, in elements; units: int32, how many
    there are before each in the layer; UNIT: elements in one, PAGE_UNITS: units in a page."""
    units = units.to(tl.uint32)
    page = tl.load(source.pages + units // PAGE_UNITS, mask=mask, other=0)
    within = (units % PAGE_UNITS).to(tl.int32) * UNIT
    return (source.first_page + page).to(tl.int64) * (PAGE_UNITS * UNIT) + within


@triton.jit
def in_vector(source, start, index, mask, PAGE_GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """Where elements of a vector lie; start: of the vector, GROUP: elements in 64 bytes."""
    at = in_pool(source, start + index // GROUP, mask, PAGE_GROUPS, GROUP)
    return at + index % GROUP


@triton.jit
def load_ints(source, start, index, mask, other, PAGE_GROUPS: tl.constexpr):
    """Elements of a vector of int32."""
    at = in_vector(source, start, index, mask, PAGE_GROUPS, 16)
    return tl.load(source.ints + at, mask=mask, other=other)


@triton.jit
def load_floats(source, start, index, mask, PAGE_GROUPS: tl.constexpr):
    """Elements of a vector of float32."""
    at = in_vector(source, start, index, mask, PAGE_GROUPS, 16)
    return tl.load(source.floats + at, mask=mask, other=0)


@triton.jit
def own_part(span, out_start, out_features):
    """Columns of a part of y, counted from its first one, that are in the span."""
    start = tl.maximum(span.start - out_start, 0)
    return Span(start, tl.minimum(span.stop - out_start, out_features))


@triton.jit
def add_to(at, change, mask):
    """In float32, rounded once."""
    before = tl.load(at, mask=mask, other=0).to(tl.float32)
    tl.store(at, before + change, mask=mask)
