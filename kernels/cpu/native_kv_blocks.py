"""Prompts that read only the blocks of their context that matter, for kv_blocks.c."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from polydelta.kernels.cpu.native import Struct, float_bits
from polydelta.kernels.cpu.native_kv_plan import Workspace
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.kv_selection import XAttention
from polydelta.kernels.ops import SequenceSlice


def prompts_struct(
    kind: KVKind, slices: Sequence[SequenceSlice], workspace: Workspace
) -> Struct | None:
    """`KVPrompts`; None where there are none. slices: with XAttention each. Raises ValueError for
    one that begins inside of a block."""
    if not slices:
        return None
    rows: list[int] = []
    pages: list[int] = []
    blocks = shares = 0
    for part in slices:
        selection = part.selection
        assert isinstance(selection, XAttention)
        first = part.context - part.length
        if first % selection.block:
            raise ValueError(f"{selection} cannot begin at position {first}, inside of a block.")
        rows += (part.start, part.length, part.context, part.slot, len(pages))
        rows += (selection.stride, float_bits(selection.threshold), blocks, shares)
        pages += part.pages[: -(-part.context // kind.layout.block_size)]
        of_queries, of_keys = (-(-n // selection.block) for n in (part.length, part.context))
        blocks += of_queries
        shares += kind.shape.num_heads * of_queries * of_keys
    return Struct(
        (
            kind.shape.num_heads,
            len(slices),
            blocks,
            torch.tensor(rows),
            torch.tensor(pages),
            workspace.of(torch.float32, shares),
            1.0 / math.sqrt(kind.shape.head_dim),
        )
    )
