"""What kernels are compiled for that read pages of the KV cache: the format, and where in a page
its sections lie."""

from __future__ import annotations

from dataclasses import dataclass

from polydelta.kernels.kv_formats.gear import Gear
from polydelta.kernels.kv_formats.int4 import Int4
from polydelta.kernels.kv_formats.kivi import Kivi
from polydelta.kernels.kv_formats.mustafar import Mustafar
from polydelta.kernels.kv_formats.native import Native
from polydelta.kernels.kv_formats.scaled import Fp8, Int8
from polydelta.kernels.kv_memory import KVKind

# Formats that are read alike, but for numbers.
FAMILIES: dict[type, str] = {
    Native: "native",
    Int8: "int8",
    Fp8: "fp8",
    Int4: "int4",
    Mustafar: "mustafar",
    Kivi: "kivi",
    Gear: "gear",
}


@dataclass(frozen=True)
class SideAt:
    """Where the sections of keys, or of values, begin in a page, in bytes; 0 for those that the
    format does not have."""

    codes: int
    scales: int
    bits: int
    outliers: int
    outlier_places: int
    rows: int
    columns: int
    means: int


@dataclass(frozen=True)
class Pages:
    """A constant of kernels: what is written in it is known when they are compiled."""

    family: str
    by_page: bool
    # Of a code that is packed into bytes.
    bits: int
    # Numbers of a row that are stored, where not all are.
    kept: int
    # Of a row, above and below together.
    outliers: int
    # Bits of an outlier's place.
    place_bits: int
    keys: SideAt
    values: SideAt
    # Bytes from one page to the next.
    page_bytes: int
    # Tokens of a page.
    size: int
    kv_heads: int
    head_dim: int


def pages_of(kind: KVKind, page_bytes: int) -> Pages:
    """page_bytes: from one page of the pool to the next. Raises ValueError for a format that no
    kernel knows."""
    layout, shape = kind.layout, kind.shape
    family = FAMILIES.get(type(kind.format))
    if family is None:
        raise ValueError(f"KV format {kind.format.name} has no kernels in Triton")
    gear = layout.has("key_outliers")
    return Pages(
        family,
        kind.format.by_page,
        bits=4 if family == "int4" else getattr(kind.format, "bits", 8),
        kept=layout.section("keys").shape[-1] if family == "mustafar" else shape.head_dim,
        outliers=layout.section("key_outliers").shape[-1] if gear else 0,
        place_bits=8 * layout.section("key_outlier_places").dtype.itemsize if gear else 0,
        keys=_side(kind, "key"),
        values=_side(kind, "value"),
        page_bytes=page_bytes,
        size=layout.block_size,
        kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )


def _side(kind: KVKind, side: str) -> SideAt:
    names = ("s", "_scales", "_bits", "_outliers", "_outlier_places", "_rows", "_columns", "_means")
    layout = kind.layout
    return SideAt(*(layout.offset(side + name) if layout.has(side + name) else 0 for name in names))
