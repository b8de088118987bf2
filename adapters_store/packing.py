"""From an adapter to the form in which it lies in the pool; see `packed.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import MODEL, BaseLayout, FusedLinear
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Circulant,
    Columns,
    Delta,
    Invocation,
    Kronecker,
    LowRank,
    NormWeight,
    OneBit,
    Prefix,
    Prompt,
    Rotate,
    Rows,
    Scale,
    Side,
    Sparse,
    TopK,
)
from polydelta.adapters_store.low_rank_packing import pack_low_rank
from polydelta.adapters_store.packed import PackedAdapter, PackedLayer, PackedPrefix
from polydelta.adapters_store.packed_deltas import (
    PackedBias,
    PackedCirculant,
    PackedColumns,
    PackedDelta,
    PackedInputScale,
    PackedKronecker,
    PackedNorm,
    PackedOneBit,
    PackedRotate,
    PackedRows,
    PackedScale,
    PackedSparse,
    PackedTopK,
)
from polydelta.adapters_store.packing_checks import check_adapter
from polydelta.adapters_store.packing_writer import LayerWriter
from polydelta.adapters_store.token_packing import TokenPacker

D = TypeVar("D", bound=Delta)
# Deltas of one kind in a fused linear, part by part, each with where its part's outputs start.
Placed = Sequence[tuple[int, D]]


def pack(
    adapter: Adapter, layout: BaseLayout, dtype: torch.dtype, bits: int | None = None
) -> PackedAdapter:
    """Converts to dtype and lays out for the pool; with bits, 8 or 4, low-rank matrices of the
    decoder's linear layers are rounded to so many.

    Raises InvalidAdapterError when the adapter does not fit the layout, or its numbers the dtype or
    the bits, or when it has deltas that are not served.
    """
    check_adapter(adapter, layout, dtype)
    tokens = TokenPacker(adapter, layout, dtype)
    layers = tuple(
        _pack_layer(LayerWriter(dtype, bits), adapter.modules, layout, layer, tokens)
        for layer in range(layout.num_layers)
    )
    prefix: PackedPrefix | None = None
    invocation: tuple[int, ...] = ()
    for delta in adapter.modules.get(MODEL, ()):
        match delta:
            case Prefix(values) | Prompt(values):
                prefix = PackedPrefix(values.to(dtype).contiguous())
            case Invocation(token_ids):
                invocation = token_ids
    return PackedAdapter(adapter.digest, dtype, layers, prefix, invocation)


def _pack_layer(
    writer: LayerWriter,
    modules: Mapping[str, Sequence[Delta]],
    layout: BaseLayout,
    layer: int,
    tokens: TokenPacker,
) -> PackedLayer:
    packed: list[PackedDelta] = []
    for index, linear in enumerate(layout.linears):
        parts = [modules.get(layout.module_name(layer, part.name), ()) for part in linear.parts]
        packed += _pack_linear(writer, index, linear, parts)
    for index, norm in enumerate(layout.norms):
        for delta in modules.get(layout.module_name(layer, norm.name), ()):
            if isinstance(delta, NormWeight):
                packed.append(PackedNorm(index, writer.vector(delta.weight, writer.dtype)))
    packed += tokens.pack_layer(writer, layer)
    return PackedLayer(writer.data(), tuple(packed))


def _pack_linear(
    writer: LayerWriter, index: int, linear: FusedLinear, parts: Sequence[Sequence[Delta]]
) -> list[PackedDelta]:
    """parts: the deltas of each part of the linear."""
    packed: list[PackedDelta] = []
    placed = [
        (out_start, delta)
        for (_, out_start), deltas in zip(linear.spans(), parts, strict=True)
        for delta in deltas
    ]
    if low_rank := _of_kind(placed, LowRank):
        packed.append(pack_low_rank(writer, index, low_rank))
    if sparse := _of_kind(placed, Sparse):
        packed.append(_pack_sparse(writer, index, linear, sparse))
    if rows := _of_kind(placed, Rows):
        packed.append(_pack_rows(writer, index, rows))
    for (part, out_start), deltas in zip(linear.spans(), parts, strict=True):
        if scales := [d.vector for d in deltas if isinstance(d, Scale) and d.side is Side.INPUT]:
            # Several scale one after the other.
            vector = writer.vector(torch.stack(scales).prod(0), torch.float32)
            span, whole = (out_start, part.out_features), len(linear.parts) == 1
            packed.append(PackedInputScale(index, *span, whole, vector))
    for out_start, delta in placed:
        packed += _pack_one(writer, index, out_start, delta)
    return packed


def _of_kind(placed: Placed[Delta], kind: type[D]) -> list[tuple[int, D]]:
    return [(out_start, delta) for out_start, delta in placed if isinstance(delta, kind)]


def _pack_sparse(
    writer: LayerWriter, index: int, linear: FusedLinear, placed: Placed[Sparse]
) -> PackedSparse:
    """Entries of a part's deltas that meet are summed."""
    shape = (linear.out_features, linear.in_features)
    places = torch.cat([_places(delta, out_start) for out_start, delta in placed])
    entries, to_entry = torch.unique(places, return_inverse=True)
    values = torch.zeros(len(entries), dtype=torch.float32)
    values.index_add_(0, to_entry, torch.cat([delta.values.float() for _, delta in placed]))
    row_pointers = torch.zeros(shape[0] + 1, dtype=torch.int64)
    row_pointers[1:] = (entries // shape[1]).bincount(minlength=shape[0]).cumsum(0)
    return PackedSparse(
        index,
        shape,
        writer.vector(row_pointers, torch.int32),
        writer.vector(entries % shape[1], torch.int32),
        writer.vector(values, writer.dtype),
    )


def _places(delta: Sparse, out_start: int) -> Tensor:
    """[nnz] int64: row * in + column of each entry, rows counted in the fused linear."""
    rows = torch.arange(delta.shape[0]).repeat_interleave(delta.row_pointers.diff().long())
    return (rows + out_start) * delta.shape[1] + delta.columns


def _pack_rows(writer: LayerWriter, linear: int, placed: Placed[Rows]) -> PackedRows:
    """A row may occur several times."""
    indices = torch.cat([delta.indices + out_start for out_start, delta in placed])
    block = torch.cat([delta.block for _, delta in placed])
    return PackedRows(linear, writer.vector(indices, torch.int32), writer.matrix(block))


def _pack_one(
    writer: LayerWriter, linear: int, out_start: int, delta: Delta
) -> Iterator[PackedDelta]:
    """A delta of a kind that is not put together with others; nothing for one that is."""
    floats = torch.float32
    match delta:
        case Columns():
            indices = writer.vector(delta.indices, torch.int32)
            yield PackedColumns(linear, out_start, indices, writer.matrix(delta.block.T))
        case OneBit():
            scale = writer.vector(torch.tensor([delta.scale]), floats)
            bits = writer.byte_matrix(delta.bits)
            yield PackedOneBit(linear, out_start, delta.in_features, bits, scale)
        case Kronecker(left, right):
            yield PackedKronecker(linear, out_start, writer.matrix(left), writer.matrix(right))
        case Circulant(kernel):
            rows = writer.matrix(kernel.flatten(0, 1))
            yield PackedCirculant(linear, out_start, kernel.shape[1], rows)
        case TopK():
            a, bias = writer.matrix(delta.a), writer.vector(delta.bias, floats)
            yield PackedTopK(linear, out_start, delta.keep, a, bias, writer.matrix(delta.b.T))
        case Scale(vector, Side.OUTPUT):
            yield PackedScale(linear, out_start, writer.vector(vector, floats))
        case Rotate():
            cos, sin = writer.vector(delta.cos, floats), writer.vector(delta.sin, floats)
            partner = writer.vector(delta.partner, torch.int32)
            yield PackedRotate(linear, out_start, cos, sin, partner)
        case Bias(vector):
            yield PackedBias(linear, out_start, writer.vector(vector, floats))
