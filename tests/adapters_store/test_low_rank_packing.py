"""Low-rank deltas in 8 or 4 bits among a layer's bytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear, LinearPart
from polydelta.adapters_store.delta import Adapter, Columns, Delta, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packed_deltas import PackedColumns, PackedLowRank
from polydelta.adapters_store.packed_file import read_packed, write_packed
from polydelta.adapters_store.packed_tensors import ALIGNMENT, PackedMatrix, PackedQuantizedMatrix
from polydelta.adapters_store.packing import pack
from polydelta.engine.delta_views import low_rank_view
from polydelta.kernels.delta_weights import dense

BITS = pytest.mark.parametrize("bits", [8, 4])
# What A and B, rounded each, make of a product of normal numbers.
MOST_OFF = {None: 0.004, 8: 0.009, 4: 0.125}
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(hidden: int, out: int, rank: int) -> tuple[BaseLayout, Adapter]:
    """One layer with a linear of two parts, the second of them with two deltas."""
    parts = (LinearPart("first", out), LinearPart("second", 2 * out))
    layout = BaseLayout("one", 1, (FusedLinear("both", hidden, parts),))

    def low_rank(part: LinearPart, rank: int) -> LowRank:
        a, b = torch.randn(rank, hidden) / hidden**0.5, torch.randn(part.out_features, rank) * 1e-4
        return LowRank(a, b)

    columns = Columns(hidden, torch.tensor([1, 4]).int(), torch.randn(2 * out, 2))
    names = [layout.module_name(0, part.name) for part in parts]
    modules: dict[str, tuple[Delta, ...]] = {
        names[0]: (low_rank(parts[0], rank),),
        names[1]: (low_rank(parts[1], 3), columns, low_rank(parts[1], rank)),
    }
    return layout, Adapter("id", 1, "d" * 64, "LORA", modules)


def low_rank_of(packed: PackedAdapter) -> PackedLowRank:
    (delta,) = (d for d in packed.layers[0].deltas if isinstance(d, PackedLowRank))
    return delta


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(("hidden", "out"), [(36, 21), (96, 64), (450, 77)])
def test_what_the_pool_holds_is_the_adapters_product(
    bits: int | None, hidden: int, out: int
) -> None:
    layout, adapter = made(hidden, out, 5)
    packed = pack(adapter, layout, BF16, bits)
    weights = low_rank_view(low_rank_of(packed), packed.layers[0].data, BF16)
    a = dense(weights.a, torch.float32).double()
    for block, deltas in zip(weights.blocks, adapter.modules.values(), strict=True):
        expected = sum(d.b.double() @ d.a.double() for d in deltas if isinstance(d, LowRank))
        b_t = dense(block.b_t, torch.float32).double()
        product = b_t.T @ a[block.rank_start : block.rank_start + len(b_t)]
        assert (product - expected).norm() <= MOST_OFF[bits] * expected.norm()
    assert [block.out_start for block in weights.blocks] == [0, out]


@BITS
def test_rows_of_codes_and_of_scales_start_at_multiples_of_the_alignment(bits: int) -> None:
    packed = pack(*reversed(made(450, 77, 5)), BF16, bits)
    delta = low_rank_of(packed)
    for matrix in (delta.a, *(block.b_t for block in delta.blocks)):
        assert isinstance(matrix, PackedQuantizedMatrix)
        for inner, size in ((matrix.codes, 1), (matrix.scales, 2)):
            assert inner.offset % ALIGNMENT == 0
            assert inner.row_stride * size % ALIGNMENT == 0


@pytest.mark.parametrize(("bits", "share"), [(8, 0.54), (4, 0.29)])
def test_the_pool_holds_nearly_two_or_four_times_as_many(bits: int, share: float) -> None:
    layout, adapter = made(4096, 1024, 16)
    modules = {
        name: tuple(d for d in deltas if isinstance(d, LowRank))
        for name, deltas in adapter.modules.items()
    }
    adapter = replace(adapter, modules=modules)
    whole, packed = pack(adapter, layout, BF16), pack(adapter, layout, BF16, bits)
    # 8 or 4 bits and 16 for each 32 columns, of 16.
    assert packed.bytes_per_layer <= share * whole.bytes_per_layer
    assert packed.fusable


@BITS
def test_other_kinds_stay_in_the_dtype(bits: int) -> None:
    packed = pack(*reversed(made(36, 21, 2)), BF16, bits)
    (columns,) = (d for d in packed.layers[0].deltas if isinstance(d, PackedColumns))
    assert isinstance(columns.block_t, PackedMatrix)
    assert isinstance(low_rank_of(pack(*reversed(made(36, 21, 2)), BF16)).a, PackedMatrix)


@BITS
def test_a_packed_file_keeps_the_codes(bits: int, tmp_path: Path) -> None:
    packed = pack(*reversed(made(96, 64, 3)), BF16, bits)
    write_packed(packed, tmp_path / "file")
    read = read_packed(tmp_path / "file")
    assert torch.equal(read.layers[0].data, packed.layers[0].data)
    kept = low_rank_view(low_rank_of(read), read.layers[0].data, BF16)
    weights = low_rank_view(low_rank_of(packed), packed.layers[0].data, BF16)
    assert torch.equal(dense(kept.a, BF16), dense(weights.a, BF16))


@BITS
def test_an_adapter_with_numbers_beyond_the_scales_is_refused(bits: int) -> None:
    layout, adapter = made(36, 21, 2)
    name, (delta,) = next(iter(adapter.modules.items()))
    assert isinstance(delta, LowRank)
    huge = replace(adapter, modules={name: (LowRank(delta.a * 1e9, delta.b * 1e9),)})
    assert pack(huge, layout, BF16).nbytes
    with pytest.raises(InvalidAdapterError, match="without --adapter-bits"):
        pack(huge, layout, BF16, bits)
