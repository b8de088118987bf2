"""What an adapter of the usual size costs over a base."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from polydelta.adapters_store.base_layout import HEAD, MODEL, BaseLayout
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Circulant,
    Columns,
    Delta,
    Kronecker,
    LowRank,
    OneBit,
    Rotate,
    Rows,
    Scale,
    Sparse,
    TokenRows,
    TopK,
)
from polydelta.adapters_store.formats.format_table import FormatRow, usual_adapter
from polydelta.adapters_store.packing import pack


@dataclass(frozen=True)
class Cost:
    """Besides what the base takes."""

    # In the pool, rounding to pages aside.
    nbytes: int
    # For each token.
    multiply_adds: int
    # Tokens that each one attends to.
    prefix_tokens: int


def cost(row: FormatRow, layout: BaseLayout, dtype: torch.dtype) -> Cost:
    """Of a row that is served, in this dtype.

    Decoder blocks are alike, so the deltas of one are made and counted as often as there are
    blocks.
    """
    single = replace(layout, num_layers=1)
    usual = usual_adapter(row, single, seed=0)
    block = _only(usual, lambda module: module.startswith(single.module_name(0, "")))
    model = _only(usual, lambda module: module == MODEL)
    rest = _only(usual, lambda module: module not in block.modules and module != MODEL)
    prefix_tokens = pack(model, single, dtype).traits.num_prefix_tokens
    kv_bytes = 2 * layout.num_layers * layout.num_kv_heads * layout.head_dim * dtype.itemsize
    return Cost(
        layout.num_layers * pack(block, single, dtype).nbytes
        + pack(rest, layout, dtype).nbytes
        + prefix_tokens * kv_bytes,
        layout.num_layers * _multiply_adds(block.modules) + _multiply_adds(rest.modules),
        prefix_tokens,
    )


def base_multiply_adds(layout: BaseLayout) -> int:
    """Of the linear layers in the decoder blocks, for each token."""
    return sum(map(math.prod, layout.module_shapes.values()))


def _only(adapter: Adapter, wanted: Callable[[str], bool]) -> Adapter:
    modules = {name: deltas for name, deltas in adapter.modules.items() if wanted(name)}
    return replace(adapter, modules=modules)


def _multiply_adds(modules: Mapping[str, tuple[Delta, ...]]) -> int:
    return sum(
        multiply_adds(module, delta) for module, deltas in modules.items() for delta in deltas
    )


def multiply_adds(module: str, delta: Delta) -> int:
    """For each token. An addition, or a multiplication of one number, counts in full."""
    match delta:
        case LowRank():
            return delta.rank * sum(delta.shape)
        case Sparse():
            return delta.nnz
        case Columns(_, _, block) | Rows(_, _, block):
            return block.numel()
        case OneBit() | Circulant():
            return math.prod(delta.shape)
        case Kronecker(left, right):
            (a, b), (c, d) = left.shape, right.shape
            return b * c * (a + d)
        case TopK():
            out_features, in_features = delta.shape
            return delta.rank * in_features + delta.keep * out_features
        case Rotate(cos):
            return 2 * len(cos)
        case Scale(vector) | Bias(vector):
            return len(vector)
        case TokenRows(_, rows) if module == HEAD:
            return rows.numel()
        case _:
            return 0
