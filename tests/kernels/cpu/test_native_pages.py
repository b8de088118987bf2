"""Adapters in pages of the pool that lie anywhere, against the same bytes in one piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.packed import PackedAdapter, PackedLayer
from polydelta.adapters_store.packed_deltas import (
    LowRankBlock,
    PackedBias,
    PackedDelta,
    PackedLowRank,
    PackedScale,
)
from polydelta.adapters_store.packing_writer import LayerWriter
from polydelta.engine.adapter_places import adapter_places
from polydelta.engine.pool_adapter import PoolAdapter, linear_site
from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.delta_groups import AdapterSites, DeltaGroup, DeltaSegment, SitePlaces
from polydelta.kernels.page_writing import write_pages

BF16 = torch.bfloat16
LAYERS, IN, OUT = 3, 198, 640
PARTS = ((3, 530), (540, 33), (575, 63))
# Pages that cut each row several times, some rows, and hardly any.
PAGE_BYTES = (64, 704, 12288)
# The layer without deltas, and two with them.
EMPTY, FIRST, LAST = 1, 0, 2


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def low_rank(writer: LayerWriter, linear: int, ranks: Sequence[int]) -> PackedLowRank:
    a = writer.low_rank_matrix(torch.randn(sum(ranks), IN) / IN**0.5)
    blocks, start = [], 0
    for (out_start, out), rank in zip(PARTS, ranks, strict=False):
        b_t = writer.low_rank_matrix(torch.randn(rank, out) / rank**0.5)
        blocks.append(LowRankBlock(out_start, out, start, rank, b_t))
        start += rank
    return PackedLowRank(linear, a, tuple(blocks))


def adapter(
    *ranks: int, bits: int | None = None, bias: bool = False, of_first: int = 1
) -> PackedAdapter:
    """of_first: deltas of the first layer's first linear."""
    layers = []
    for layer in range(LAYERS):
        writer, deltas = LayerWriter(BF16, bits), []
        if layer != EMPTY:
            each: list[PackedDelta] = [
                low_rank(writer, 0, ranks) for _ in range(of_first if layer == FIRST else 1)
            ]
            each.append(low_rank(writer, 3, (2, 1)))
            if bias:
                each.append(PackedBias(0, 5, writer.vector(torch.randn(90), torch.float32)))
            deltas = each
        layers.append(PackedLayer(writer.data(), tuple(deltas)))
    return PackedAdapter("", BF16, tuple(layers))


def in_pool(
    packed: PackedAdapter, kernels: Bfloat16Kernels, page_bytes: int, scattered: bool
) -> PoolAdapter:
    count = max(1, -(-packed.bytes_per_layer // page_bytes))
    storage = torch.full((LAYERS, 2 * count + 1, page_bytes), 0xFF, dtype=torch.uint8)
    pages = torch.randperm(2 * count + 1)[:count].tolist() if scattered else [*range(1, count + 1)]
    return PoolAdapter(packed, storage, pages, kernels)


def in_one_piece(packed: PackedAdapter, kernels: Bfloat16Kernels) -> AdapterSites:
    """Views that the kernels have the addresses of."""
    whole = in_pool(packed, kernels, 1 << 20, scattered=False)
    deltas = [whole.linear(layer, index) for layer in range(LAYERS) for index in range(4)]
    return kernels.bind_sites([each and each.output for each in deltas])


def grouped(
    kernels: Bfloat16Kernels, step: Sequence[tuple[int, int, AdapterSites, float]]
) -> DeltaGroup:
    return kernels.group_deltas([DeltaSegment(*segment) for segment in step])


def results(kernels: Bfloat16Kernels, group: DeltaGroup, rows: int) -> list[Tensor]:
    """By site, of the same inputs each time."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(OUT, IN, generator=generator).bfloat16()
    x = torch.randn(rows, IN, generator=generator).bfloat16()
    linear = kernels.linear(weight, None)
    sites = [linear_site(layer, index) for layer in (LAST, EMPTY, FIRST) for index in (0, 1, 3)]
    return [group.multiply(site, linear, x) for site in sites]


@pytest.mark.parametrize("page_bytes", PAGE_BYTES)
@pytest.mark.parametrize("rows", [1, 3, 7, 50, 130])
@pytest.mark.parametrize("ranks", [(1,), (8, 3), (5, 17, 2)])
def test_wherever_pages_lie_the_bits_are_those_of_one_piece(
    ours: Bfloat16Kernels, page_bytes: int, rows: int, ranks: Sequence[int]
) -> None:
    each = [adapter(*ranks), adapter(4, 4, 4), adapter(2, 9, of_first=2)]
    # The first two alone, the third in a sum with the first.
    places = [(0, rows), (rows, rows + 2), (rows + 2, 2 * rows + 2), (rows + 2, 2 * rows + 2)]
    found = []
    for bind in (
        lambda packed: in_one_piece(packed, ours),
        lambda packed: in_pool(packed, ours, page_bytes, scattered=False).sites,
        lambda packed: in_pool(packed, ours, page_bytes, scattered=True).sites,
    ):
        one, two, three = (bind(packed) for packed in each)
        sites = zip(places, (one, two, three, one), (1.0, 1.0, -0.5, 0.7), strict=True)
        group = grouped(ours, [(start, stop, s, w) for (start, stop), s, w in sites])
        assert group.recordable
        found.append(results(ours, group, 2 * rows + 5))
    for together in zip(*found, strict=True):
        assert all(torch.equal(together[0], other) for other in together[1:])


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: adapter(3, 2),
        lambda: adapter(3, 2, bits=8),
        lambda: adapter(3, 2, bits=4),
        lambda: adapter(3, 2, bias=True),
    ],
    ids=["low rank", "8 bits", "4 bits", "with a bias"],
)
def test_what_is_not_read_through_pages_is_copied_together(
    ours: Bfloat16Kernels,
    make: Callable[[], PackedAdapter],
    scattered: bool,
) -> None:
    packed = make()
    expected = results(ours, grouped(ours, [(1, 4, in_one_piece(packed, ours), 1.0)]), 6)
    bound = in_pool(packed, ours, 704, scattered)
    group = grouped(ours, [(1, 4, bound.sites, 1.0)])
    assert group.recordable
    # Twice: what was copied for the last layer is not taken for the first one's.
    for _ in range(2):
        for got, wanted in zip(results(ours, group, 6), expected, strict=True):
            assert torch.equal(got, wanted)


def scale(writer: LayerWriter) -> PackedDelta:
    return PackedScale(0, 5, writer.vector(torch.randn(90), torch.float32))


def bias(writer: LayerWriter) -> PackedDelta:
    return PackedBias(0, 5, writer.vector(torch.randn(90), torch.float32))


def eight_bits(writer: LayerWriter) -> PackedDelta:
    return low_rank(writer, 0, (3, 2))


@pytest.mark.parametrize("make", [scale, bias, eight_bits])
def test_layers_share_only_deltas_that_all_lie_at_the_same_places(
    ours: Bfloat16Kernels, make: Callable[[LayerWriter], PackedDelta]
) -> None:
    """Of adapters with one kind of delta, whose places differ from layer to layer; that they have
    none of the other kinds is told by the same object everywhere."""
    layers = []
    for layer in range(LAYERS):
        writer = LayerWriter(BF16, bits=8)
        writer.vector(torch.randn(50 * layer), torch.float32)
        delta = make(writer)
        layers.append(PackedLayer(writer.data(), (delta,)))
    packed = PackedAdapter("", BF16, tuple(layers))
    whole = in_one_piece(packed, ours)
    expected = results(ours, grouped(ours, [(1, 4, whole, 1.0)]), 6)
    count = -(-packed.bytes_per_layer // 64)
    storage = torch.full((LAYERS, 2 * count, 64), 0xFF, dtype=torch.uint8)
    pages = torch.randperm(2 * count)[:count].tolist()
    write_pages(storage, pages, [layer.data for layer in layers])
    places = adapter_places([layer.deltas for layer in layers], BF16, storage, pages)
    none: list[Any] = []
    sites = [
        site
        and SitePlaces(
            site.layer, *(each or none for each in (site.changes, site.adds, site.biases))
        )
        for site in places.sites
    ]
    bound = ours.bind_pages(replace(places, sites=sites), whole)
    group = grouped(ours, [(1, 4, bound, 1.0)])
    assert group.recordable
    for got, wanted in zip(results(ours, group, 6), expected, strict=True):
        assert torch.equal(got, wanted)


def test_pages_that_cut_vectors_are_copied_together(ours: Bfloat16Kernels) -> None:
    packed = adapter(3, 2)
    expected = results(ours, grouped(ours, [(0, 2, in_one_piece(packed, ours), 1.0)]), 2)
    bound = in_pool(packed, ours, 72, scattered=True)
    group = grouped(ours, [(0, 2, bound.sites, 1.0)])
    assert group.recordable
    for got, wanted in zip(results(ours, group, 2), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("pages", [[4, 5, 6], [6, 1, 3], [2]])
def test_bytes_are_written_as_plainly(ours: Bfloat16Kernels, pages: Sequence[int]) -> None:
    """Layers of different sizes, one of them empty, and nothing beyond their bytes."""
    sizes = [200 * len(pages), 0, 201 * len(pages) - 1]
    layers = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    storage = torch.full((3, 7, 201), 0xAB, dtype=torch.uint8)
    expected = storage.clone()
    write_pages(expected, pages, layers)
    ours.write_pages(storage, pages, layers)
    assert torch.equal(storage, expected)
