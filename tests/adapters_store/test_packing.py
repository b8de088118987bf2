from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear, LinearPart
from polydelta.adapters_store.delta import Adapter, Delta, LowRank, Sparse
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.packed import PackedAdapter, PackedLayer
from polydelta.adapters_store.packed_deltas import PackedLowRank, PackedSparse
from polydelta.adapters_store.packed_tensors import ALIGNMENT, matrix_view, vector_view
from polydelta.adapters_store.packing import pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def low_rank(shape: tuple[int, int], rank: int) -> LowRank:
    return LowRank(torch.randn(rank, shape[1]), torch.randn(shape[0], rank))


def sparse(shape: tuple[int, int], nnz: int) -> Sparse:
    flat = torch.randperm(shape[0] * shape[1])[:nnz].sort().values
    rows = (flat // shape[1]).bincount(minlength=shape[0])
    pointers = torch.cat((torch.zeros(1), rows.cumsum(0))).to(torch.int32)
    return Sparse(shape, pointers, (flat % shape[1]).int(), torch.randn(nnz))


@st.composite
def layouts(draw: st.DrawFn) -> BaseLayout:
    sizes = st.integers(1, 70)
    linears = tuple(
        FusedLinear(
            f"linear{index}",
            draw(sizes),
            tuple(
                LinearPart(f"linear{index}.part{part}", draw(sizes))
                for part in range(draw(st.integers(1, 3)))
            ),
        )
        for index in range(draw(st.integers(1, 3)))
    )
    return BaseLayout("random", draw(st.integers(1, 3)), linears)


@st.composite
def deltas(draw: st.DrawFn, shape: tuple[int, int]) -> tuple[Delta, ...]:
    ranks = draw(st.lists(st.integers(1, 40), max_size=2))
    counts = draw(st.lists(st.integers(0, min(60, shape[0] * shape[1])), max_size=2))
    return (
        *(low_rank(shape, rank) for rank in ranks),
        *(sparse(shape, nnz) for nnz in counts),
    )


@st.composite
def adapters(draw: st.DrawFn) -> tuple[BaseLayout, Adapter]:
    layout = draw(layouts())
    modules = {name: draw(deltas(shape)) for name, shape in layout.module_shapes.items()}
    return layout, Adapter("id", 3, "digest", "LORA", modules)


def in_pool(layer: PackedLayer) -> Tensor:
    """The layer's data at an odd place of a larger storage, as a page of the pool is."""
    storage = torch.full((layer.data.numel() + 3 * ALIGNMENT,), 0xAB, dtype=torch.uint8)
    data = storage[ALIGNMENT : ALIGNMENT + layer.data.numel()]
    data.copy_(layer.data)
    return data


def parts_of(
    packed: PackedLowRank, data: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """A, B transposed, and the first output row, of each part."""
    a = matrix_view(data, packed.a, dtype)
    for block in packed.blocks:
        b_t = matrix_view(data, block.b_t, dtype)
        yield a[block.rank_start : block.rank_start + block.rank], b_t, block.out_start


def dense_linear(
    layer: PackedLayer, index: int, linear: FusedLinear, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What a layer's packed deltas add to one fused linear: low-rank and sparse, in float32."""
    data = in_pool(layer)
    shape = (linear.out_features, linear.in_features)
    low, entries = torch.zeros(shape), torch.zeros(shape)
    for delta in layer.deltas:
        if delta.linear != index:
            continue
        if isinstance(delta, PackedLowRank):
            for a, b_t, start in parts_of(delta, data, dtype):
                low[start : start + b_t.shape[1]] += b_t.float().T @ a.float()
        else:
            assert delta.shape == shape
            vectors = (delta.row_pointers, delta.columns, delta.values)
            pointers, columns, values = (vector_view(data, vector) for vector in vectors)
            entries += Sparse(shape, pointers, columns, values.float()).dense()
    return low, entries


@settings(max_examples=60, deadline=None)
@given(adapters(), st.sampled_from(DTYPES))
def test_what_is_read_back_is_what_was_packed(
    case: tuple[BaseLayout, Adapter], dtype: torch.dtype
) -> None:
    layout, adapter = case
    packed = pack(adapter, layout, dtype)
    assert (packed.digest, packed.dtype) == ("digest", dtype)
    assert len(packed.layers) == layout.num_layers
    for number, layer in enumerate(packed.layers):
        for index, linear in enumerate(layout.linears):
            low, entries = dense_linear(layer, index, linear, dtype)
            for part, start in linear.spans():
                rows = slice(start, start + part.out_features)
                module = adapter.modules[layout.module_name(number, part.name)]
                # Rounded as stored, so that only the order of sums may differ.
                expected = torch.zeros(part.out_features, linear.in_features)
                expected_entries = torch.zeros_like(expected)
                for delta in module:
                    if isinstance(delta, LowRank):
                        expected += delta.b.to(dtype).float() @ delta.a.to(dtype).float()
                    else:
                        expected_entries += delta.dense()
                torch.testing.assert_close(low[rows], expected, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(
                    entries[rows], expected_entries.to(dtype).float(), rtol=0, atol=0
                )


@settings(max_examples=60, deadline=None)
@given(adapters(), st.sampled_from(DTYPES))
def test_every_tensor_and_row_is_aligned_and_none_overlap(
    case: tuple[BaseLayout, Adapter], dtype: torch.dtype
) -> None:
    layout, adapter = case
    packed = pack(adapter, layout, dtype)
    assert packed.bytes_per_layer == max(layer.data.numel() for layer in packed.layers)
    assert packed.nbytes == sum(layer.data.numel() for layer in packed.layers)
    for layer in packed.layers:
        assert layer.data.numel() % ALIGNMENT == 0
        assert layer.data.is_contiguous()
        end = 0
        for delta in layer.deltas:
            if isinstance(delta, PackedLowRank):
                for matrix in (delta.a, *(block.b_t for block in delta.blocks)):
                    # Directly after each other: a kernel may take them as one piece of memory.
                    assert matrix.offset == end
                    assert matrix.row_stride * dtype.itemsize % ALIGNMENT == 0
                    assert 0 <= matrix.row_stride - matrix.shape[1] < ALIGNMENT // dtype.itemsize
                    end += matrix.shape[0] * matrix.row_stride * dtype.itemsize
            else:
                for vector in (delta.row_pointers, delta.columns, delta.values):
                    assert vector.offset == end
                    end += -(-vector.length * vector.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        assert end == layer.data.numel()


@settings(max_examples=60, deadline=None)
@given(adapters())
def test_the_rows_of_a_sparse_delta_ascend_without_repeats(
    case: tuple[BaseLayout, Adapter],
) -> None:
    layout, adapter = case
    for layer in pack(adapter, layout, torch.float32).layers:
        for delta in layer.deltas:
            if isinstance(delta, PackedSparse):
                pointers = vector_view(layer.data, delta.row_pointers)
                columns = vector_view(layer.data, delta.columns)
                assert pointers[0] == 0
                assert pointers[-1] == len(columns) == delta.values.length
                for start, stop in pairwise(pointers.tolist()):
                    assert (columns[start:stop].diff() > 0).all()


def one_module(layout: BaseLayout, module: str, *of_module: Delta) -> PackedAdapter:
    return pack(Adapter("id", 1, "", "LORA", {module: of_module}), layout, torch.float32)


def test_one_shrink_serves_all_parts_of_a_fused_linear(layout: BaseLayout) -> None:
    q, v = low_rank((36, 36), 3), low_rank((12, 36), 5)
    modules = {"model.layers.0.self_attn.q_proj": (q,), "model.layers.0.self_attn.v_proj": (v,)}
    layer = pack(Adapter("id", 1, "", "LORA", modules), layout, torch.float32).layers[0]
    (packed,) = layer.deltas
    assert isinstance(packed, PackedLowRank)
    torch.testing.assert_close(
        matrix_view(layer.data, packed.a, torch.float32), torch.cat((q.a, v.a)), rtol=0, atol=0
    )
    spans = [(b.out_start, b.out_features, b.rank_start, b.rank) for b in packed.blocks]
    assert spans == [(0, 36, 0, 3), (48, 12, 3, 5)]


def test_layers_without_deltas_are_empty(layout: BaseLayout) -> None:
    packed = one_module(layout, "model.layers.1.mlp.down_proj", low_rank((36, 52), 2))
    assert [len(layer.deltas) for layer in packed.layers] == [0, 1, 0]
    assert [layer.data.numel() > 0 for layer in packed.layers] == [False, True, False]
    assert packed.bytes_per_layer == packed.nbytes


def test_views_share_memory_with_the_data(layout: BaseLayout) -> None:
    packed = one_module(layout, "model.layers.0.mlp.up_proj", low_rank((52, 36), 2))
    layer = packed.layers[0]
    (delta,) = layer.deltas
    assert isinstance(delta, PackedLowRank)
    matrix_view(layer.data, delta.a, torch.float32)[1, 35] = 7
    assert matrix_view(layer.data, delta.a, torch.float32)[1, 35] == 7


def test_a_module_that_the_base_lacks_is_refused(layout: BaseLayout) -> None:
    with pytest.raises(InvalidAdapterError, match=r"model\.layers\.9\.mlp\.up_proj"):
        one_module(layout, "model.layers.9.mlp.up_proj", low_rank((52, 36), 2))


def test_a_delta_of_another_shape_is_refused(layout: BaseLayout) -> None:
    with pytest.raises(InvalidAdapterError, match=r"\[52, 40\]"):
        one_module(layout, "model.layers.0.mlp.up_proj", low_rank((52, 40), 2))


@pytest.mark.parametrize("value", [1e5, -1e5, torch.inf, torch.nan])
def test_a_number_that_the_dtype_cannot_hold_is_refused(layout: BaseLayout, value: float) -> None:
    delta = low_rank((52, 36), 2)
    delta.b[0, 0] = value
    adapter = Adapter("id", 1, "", "LORA", {"model.layers.0.mlp.up_proj": (delta,)})
    with pytest.raises(InvalidAdapterError, match=r"does not fit torch.float16"):
        pack(adapter, layout, torch.float16)
