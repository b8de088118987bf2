"""Every kind of delta, packed; `test_packing.py` has more on the first two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from polydelta.adapters_store.base_layout import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    BaseLayout,
    FusedLinear,
    LinearPart,
    NormPart,
)
from polydelta.adapters_store.delta import (
    Adapter,
    Bias,
    Circulant,
    Columns,
    Delta,
    Kronecker,
    NormWeight,
    OneBit,
    Rotate,
    Scale,
    Side,
    TokenRows,
    TopK,
)
from polydelta.adapters_store.packed import PackedLayer
from polydelta.adapters_store.packed_deltas import (
    FINAL_NORM_INDEX,
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
    PackedTopK,
)
from polydelta.adapters_store.packed_tensors import (
    ALIGNMENT,
    BYTES_ALIGNMENT,
    PackedMatrix,
    PackedVector,
    matrix_view,
    vector_view,
)
from polydelta.adapters_store.packing import pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Makers = Mapping[str, Callable[[tuple[int, int]], Delta]]
# What the embedding and the head can have of what a linear layer can.
OF_TOKENS = ("low rank", "output scale", "bias")
# Kinds that are packed one by one, and what they are packed as.
ONE_BY_ONE = (Columns, OneBit, Kronecker, Circulant, TopK, Scale, Rotate, Bias)
PACKED_ONE_BY_ONE = (
    PackedColumns, PackedOneBit, PackedKronecker, PackedCirculant, PackedTopK, PackedScale,
    PackedRotate, PackedBias,
)  # fmt: skip


def adapter_of(modules: Mapping[str, tuple[Delta, ...]]) -> Adapter:
    return Adapter("id", 1, "digest", "TEST", modules)


def token_rows(layout: BaseLayout) -> TokenRows:
    ids = torch.randperm(layout.vocab_size)[:5].sort().values
    return TokenRows(ids, torch.randn(len(ids), layout.hidden_size))


def draw_layout(draw: st.DrawFn) -> BaseLayout:
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
        for index in range(draw(st.integers(1, 2)))
    )
    norms = tuple(NormPart(f"norm{index}", draw(sizes)) for index in range(2))
    return BaseLayout(
        "random", draw(st.integers(1, 3)), linears, norms, draw(sizes), vocab_size=draw(sizes)
    )


def draw_adapter(draw: st.DrawFn, makers: Makers) -> tuple[BaseLayout, Adapter]:
    layout = draw_layout(draw)
    torch.manual_seed(draw(st.integers(0, 1000)))
    modules: dict[str, tuple[Delta, ...]] = {}
    for module, shape in layout.target_shapes.items():
        of_tokens = module in (EMBEDDING, HEAD)
        kinds = OF_TOKENS if of_tokens else tuple(makers)
        chosen = draw(st.lists(st.sampled_from(kinds), max_size=5))
        modules[module] = tuple(makers[kind](shape) for kind in chosen)
        if of_tokens and draw(st.booleans()):
            modules[module] += (token_rows(layout),)
    for module, size in layout.norm_sizes.items():
        if draw(st.booleans()):
            modules[module] = (NormWeight(torch.randn(size)),)
    return layout, adapter_of(modules)


def in_pool(layer: PackedLayer) -> Tensor:
    """The layer's data at an odd place of a larger storage, as a page of the pool is."""
    storage = torch.full((layer.data.numel() + 3 * ALIGNMENT,), 0xAB, dtype=torch.uint8)
    data = storage[ALIGNMENT : ALIGNMENT + layer.data.numel()]
    data.copy_(layer.data)
    return data


def read_back(
    packed: PackedDelta, data: Tensor, dtype: torch.dtype, linear: FusedLinear
) -> tuple[int, Delta]:
    """Where the part starts, and the delta; of kinds that are packed one by one."""

    def vector(where: PackedVector) -> Tensor:
        return vector_view(data, where)

    def matrix(where: PackedMatrix) -> Tensor:
        return matrix_view(data, where, dtype)

    match packed:
        case PackedColumns(_, start, indices, block_t):
            return start, Columns(linear.in_features, vector(indices), matrix(block_t).T)
        case PackedOneBit(_, start, in_features, bits, scale):
            signs = matrix_view(data, bits, torch.uint8)
            return start, OneBit(in_features, signs, vector(scale).item())
        case PackedKronecker(_, start, left, right):
            return start, Kronecker(matrix(left), matrix(right))
        case PackedCirculant(_, start, count, kernel):
            return start, Circulant(matrix(kernel).unflatten(0, (-1, count)))
        case PackedTopK(_, start, keep, a, bias, b_t):
            return start, TopK(matrix(a), matrix(b_t).T, vector(bias), keep)
        case PackedScale(_, start, scale):
            return start, Scale(vector(scale), Side.OUTPUT)
        case PackedRotate(_, start, cos, sin, partner):
            return start, Rotate(vector(cos), vector(sin), vector(partner))
        case PackedBias(_, start, added):
            return start, Bias(vector(added))
    raise TypeError(type(packed))


def as_stored(delta: Delta, dtype: torch.dtype) -> Delta:
    """Matrices rounded to the dtype; vectors are float32."""
    values = {field.name: getattr(delta, field.name) for field in fields(delta)}
    matrices = {
        name: value.to(dtype)
        for name, value in values.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
    }
    return replace(delta, **matrices)


def told(delta: Delta) -> list[Any]:
    """What can be compared: deltas are equal only as objects."""
    values = (getattr(delta, field.name) for field in fields(delta))
    return [type(delta), *((v.dtype, v.tolist()) if isinstance(v, Tensor) else v for v in values)]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(DTYPES))
def test_kinds_that_are_packed_one_by_one_are_read_back_as_they_were(
    delta_makers: Makers, data: st.DataObject, dtype: torch.dtype
) -> None:
    layout, adapter = draw_adapter(data.draw, delta_makers)
    for number, layer in enumerate(pack(adapter, layout, dtype).layers):
        memory = in_pool(layer)
        for index, linear in enumerate(layout.linears):
            got = [
                read_back(delta, memory, dtype, linear)
                for delta in layer.deltas
                if isinstance(delta, PACKED_ONE_BY_ONE) and delta.linear == index
            ]
            want = [
                (start, as_stored(delta, dtype))
                for part, start in linear.spans()
                for delta in adapter.modules[layout.module_name(number, part.name)]
                if isinstance(delta, ONE_BY_ONE)
                and not (isinstance(delta, Scale) and delta.side is Side.INPUT)
            ]
            assert [(start, told(d)) for start, d in got] == [(start, told(d)) for start, d in want]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(DTYPES))
def test_the_rows_of_all_parts_are_read_back_in_their_order(
    delta_makers: Makers, data: st.DataObject, dtype: torch.dtype
) -> None:
    layout = draw_layout(data.draw)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    modules = {
        module: tuple(delta_makers["rows"](shape) for _ in range(data.draw(st.integers(0, 2))))
        for module, shape in layout.module_shapes.items()
    }
    for number, layer in enumerate(pack(adapter_of(modules), layout, dtype).layers):
        memory = in_pool(layer)
        found = {delta.linear: delta for delta in layer.deltas if isinstance(delta, PackedRows)}
        assert len(found) == len(layer.deltas)
        for index, linear in enumerate(layout.linears):
            want = [
                (start + int(place), row.to(dtype).tolist())
                for part, start in linear.spans()
                for delta in modules[layout.module_name(number, part.name)]
                for place, row in zip(delta.indices, delta.block, strict=True)
            ]
            assert (index in found) == bool(want)
            if want:
                indices = vector_view(memory, found[index].indices)
                block = matrix_view(memory, found[index].block, dtype)
                assert indices.dtype is torch.int32
                assert list(zip(indices.tolist(), block.tolist(), strict=True)) == want


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_input_scales_of_a_part_are_one(delta_makers: Makers, data: st.DataObject) -> None:
    """Several would each be taken for the part's only one."""
    layout = draw_layout(data.draw)
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    make = delta_makers["input scale"]
    modules = {
        module: tuple(make(shape) for _ in range(data.draw(st.integers(0, 3))))
        for module, shape in layout.module_shapes.items()
    }
    for number, layer in enumerate(pack(adapter_of(modules), layout, torch.bfloat16).layers):
        memory = in_pool(layer)
        found = iter(layer.deltas)
        for index, linear in enumerate(layout.linears):
            for part, start in linear.spans():
                scales = [d.vector for d in modules[layout.module_name(number, part.name)]]
                if not scales:
                    continue
                packed = next(found)
                assert isinstance(packed, PackedInputScale)
                assert packed.linear == index
                assert (packed.out_start, packed.out_features) == (start, part.out_features)
                assert packed.whole == (len(linear.parts) == 1)
                want = torch.ones(linear.in_features)
                for scale in scales:
                    want = want * scale
                torch.testing.assert_close(vector_view(memory, packed.vector), want)
        assert next(found, None) is None


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(DTYPES))
def test_norms_are_read_back_as_they_were(
    delta_makers: Makers, data: st.DataObject, dtype: torch.dtype
) -> None:
    layout, adapter = draw_adapter(data.draw, delta_makers)
    got = {}
    for number, layer in enumerate(pack(adapter, layout, dtype).layers):
        memory = in_pool(layer)
        for delta in layer.deltas:
            if isinstance(delta, PackedNorm):
                is_last = delta.norm == FINAL_NORM_INDEX
                assert number == 0 or not is_last
                name = "" if is_last else layout.norms[delta.norm].name
                module = FINAL_NORM if is_last else layout.module_name(number, name)
                got[module] = (delta.weight.dtype, vector_view(memory, delta.weight).tolist())
    assert got == {
        module: (dtype, delta.weight.to(dtype).tolist())
        for module, deltas in adapter.modules.items()
        for delta in deltas
        if isinstance(delta, NormWeight)
    }


def spans(value: Any, dtype: torch.dtype) -> Iterator[tuple[int, int, int]]:
    """Offset, bytes and bytes in a row of every tensor in packed deltas, however deep; 0 bytes in a
    row of bits, which is aligned to less."""
    for field in fields(value):
        match getattr(value, field.name):
            case PackedMatrix(offset, (rows, columns), row_stride):
                if field.name == "bits":
                    assert row_stride % BYTES_ALIGNMENT == 0
                    assert 0 <= row_stride - columns < BYTES_ALIGNMENT
                    yield offset, rows * row_stride, 0
                else:
                    assert 0 <= row_stride - columns < ALIGNMENT // dtype.itemsize
                    row_bytes = row_stride * dtype.itemsize
                    yield offset, rows * row_bytes, row_bytes
            case PackedVector(offset, length, of_vector):
                yield offset, length * of_vector.itemsize, 0
            case tuple(inner):
                for one in inner:
                    if is_dataclass(one):
                        yield from spans(one, dtype)
            case inner if is_dataclass(inner):
                yield from spans(inner, dtype)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from(DTYPES))
def test_every_tensor_and_row_is_aligned_and_none_overlap(
    delta_makers: Makers, data: st.DataObject, dtype: torch.dtype
) -> None:
    layout, adapter = draw_adapter(data.draw, delta_makers)
    for layer in pack(adapter, layout, dtype).layers:
        end = 0
        places = sorted(place for delta in layer.deltas for place in spans(delta, dtype))
        for offset, nbytes, row_bytes in places:
            assert offset % ALIGNMENT == 0
            assert row_bytes % ALIGNMENT == 0
            # Nothing between them but what fills up to the next aligned byte.
            assert offset == -(-end // ALIGNMENT) * ALIGNMENT
            end = offset + nbytes
        assert layer.data.numel() == -(-end // ALIGNMENT) * ALIGNMENT
