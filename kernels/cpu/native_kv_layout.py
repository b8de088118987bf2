"""A cache's layout for the C files."""

from __future__ import annotations

import torch

from polydelta.kernels.cpu.native import Struct
from polydelta.kernels.kv_formats.gear import Gear
from polydelta.kernels.kv_formats.int4 import Int4
from polydelta.kernels.kv_formats.kivi import Kivi
from polydelta.kernels.kv_formats.mustafar import Mustafar
from polydelta.kernels.kv_formats.native import Native
from polydelta.kernels.kv_formats.scaled import Fp8, Int8
from polydelta.kernels.kv_layout import PageLayout
from polydelta.kernels.kv_memory import KVKind

# Their numbers in kv_formats.c.
_FORMATS = {Native: 0, Int8: 1, Fp8: 2, Int4: 3, Mustafar: 4, Kivi: 5, Gear: 6}

# As in attention.c: rows of scores that are computed together, and the widest head.
MOST_SCORES, MOST_HEAD_DIM = 64, 256


def takes(kind: KVKind) -> bool:
    """Whether the C files know the format, and compute with heads of this size."""
    shape = kind.shape
    return (
        kind.dtype == torch.bfloat16
        and type(kind.format) in _FORMATS
        and shape.head_dim % 2 == 0
        and shape.head_dim <= MOST_HEAD_DIM
        and shape.num_heads // shape.num_kv_heads <= MOST_SCORES
    )


def encodes_rows(kind: KVKind) -> bool:
    """Whether each token is encoded by itself, if only with its page: the C files do that."""
    return not isinstance(kind.format, Kivi | Gear)


def takes_notes(layout: PageLayout) -> bool:
    """Whether pages note anything of their keys."""
    return any(layout.has(name) for name in ("labels", "key_least", "representatives"))


def layout_struct(kind: KVKind) -> Struct:
    """`KVLayout`."""
    layout, shape, format = kind.layout, kind.shape, kind.format
    keys = layout.section("keys")
    return Struct(
        (
            _FORMATS[type(format)],
            format.by_page,
            layout.block_size,
            shape.num_kv_heads,
            shape.head_dim,
            layout.offset(kind.stored[-1]) + layout.section(kind.stored[-1]).nbytes,
            keys.nbytes // (layout.block_size * shape.num_kv_heads),
            format.bits if isinstance(format, Kivi | Gear) else 0,
            _last(layout, "key_outliers"),
            _offset(layout, "labels"),
            _last(layout, "labels"),
            _offset(layout, "key_least"),
            _offset(layout, "key_most"),
            _offset(layout, "representatives"),
            _last(layout, "representatives"),
            *_side(layout, "key"),
            *_side(layout, "value"),
        )
    )


def _side(layout: PageLayout, side: str) -> list[int]:
    """`KVSide`."""
    names = ("s", "_scales", "_bits", "_outliers", "_outlier_places", "_rows", "_columns", "_means")
    return [_offset(layout, side + name) for name in names]


def _offset(layout: PageLayout, name: str) -> int:
    """Below 0 where there is no such section."""
    return layout.offset(name) if layout.has(name) else -1


def _last(layout: PageLayout, name: str) -> int:
    """How many numbers the last axis of a section has."""
    return layout.section(name).shape[-1] if layout.has(name) else 0
