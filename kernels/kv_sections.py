"""What a page has: the sections of its format, and those that a selection adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polydelta.kernels.kv_formats.format import KVFormat, KVShape
from polydelta.kernels.kv_layout import PageLayout, Section, page_layout
from polydelta.kernels.kv_selection import DoubleSparsity, InfLLM, Quest, Selection


def native_tokens_of(format: KVFormat, selection: Selection) -> int:
    """Of native KV in a page, where an operator sets none. A selection that chooses pages says it,
    whatever the format: bounds of many tokens find the wrong ones."""
    return (selection if isinstance(selection, Quest) else format).native_tokens


def page_layout_for(
    format: KVFormat, selection: Selection, shape: KVShape, page_bytes: int
) -> PageLayout:
    """Of pages of so many bytes. Raises ValueError for a shape that the format cannot store."""

    def sections(tokens: int) -> Sequence[Section]:
        return [*format.sections(tokens, shape), *extra_sections(selection, tokens, shape)]

    return page_layout(page_bytes, sections)


def extra_sections(selection: Selection, tokens: int, shape: KVShape) -> Sequence[Section]:
    """What a page of so many tokens notes for a selection, beside its keys and values."""
    heads, head_dim, dtype = shape.num_kv_heads, shape.head_dim, shape.dtype
    match selection:
        case Quest():
            bounds = (heads, head_dim)
            return [Section("key_least", dtype, bounds), Section("key_most", dtype, bounds)]
        case DoubleSparsity(label_share=share):
            return [Section("labels", dtype, (tokens, heads, head_dim // share))]
        case InfLLM(representatives=count):
            return [Section("representatives", torch.int16, (heads, count))]
    return []
