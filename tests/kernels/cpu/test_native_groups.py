"""All adapters of a step in one call, against each of them in plain torch, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.deltas import MOST_ROWS, NATIVE_ROWS
from polydelta.kernels.delta_groups import (
    AdapterSites,
    DeltaGroup,
    DeltaSegment,
    OutputBias,
    SiteDeltas,
)
from polydelta.kernels.delta_weights import (
    CirculantWeights,
    ColumnsWeights,
    KroneckerWeights,
    LowRankBlock,
    LowRankWeights,
    OneBitWeights,
    RotateWeights,
    RowsWeights,
    ScaleWeights,
    SparseWeights,
    TopKWeights,
)
from polydelta.kernels.ops import Kernels
from polydelta.kernels.reference import ReferenceKernels

Near = Callable[[Tensor, Tensor, torch.dtype], None]
WithThreads = Callable[[int], Bfloat16Kernels]

REFERENCE = ReferenceKernels()
BF16 = torch.bfloat16
# Parts of y, as of q, k and v: neither multiples of 32, nor next to each other.
IN, OUT = 70, 640
PARTS = ((3, 530), (540, 33), (575, 63))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def padded(rows: int, columns: int) -> Tensor:
    """Rows that lie apart, as in a page; what is between them is no number."""
    memory = torch.full((rows, columns + 5), torch.nan)
    memory[:, :columns] = torch.randn(rows, columns)
    return memory.bfloat16()[:, :columns]


def low_rank(*ranks: int) -> LowRankWeights:
    """As many parts as there are ranks."""
    blocks, start = [], 0
    for (out_start, out), rank in zip(PARTS, ranks, strict=False):
        blocks.append(LowRankBlock(out_start, start, padded(rank, out) / rank))
        start += rank
    return LowRankWeights(padded(start, IN) / IN**0.5, tuple(blocks))


def sparse() -> SparseWeights:
    wanted = torch.rand(OUT, IN) < 0.1
    pointers = torch.cat((torch.zeros(1), wanted.sum(1).cumsum(0))).int()
    columns = wanted.nonzero()[:, 1].int()
    return SparseWeights(pointers, columns, torch.randn(len(columns)).bfloat16() / 3)


# Kinds that add, and those that change y.
ADDS: dict[str, Callable[[], Any]] = {
    "low rank": lambda: low_rank(5, 1, 8),
    "sparse": sparse,
    "columns": lambda: ColumnsWeights(9, torch.tensor([0, 7, 69]).int(), padded(3, 50)),
    "rows": lambda: RowsWeights(torch.tensor([0, 639, 5, 5]).int(), padded(4, IN) / 8),
    "one bit": lambda: OneBitWeights(
        11, torch.randint(0, 256, (33, 9), dtype=torch.uint8), torch.tensor([0.03])
    ),
    "kronecker": lambda: KroneckerWeights(2, padded(5, 10) / 8, padded(11, 7)),
    "circulant": lambda: CirculantWeights(4, padded(15, 14).unflatten(0, (3, 5)) / 8),
    # All are kept, so that no rounding chooses others.
    "top k": lambda: TopKWeights(6, 8, padded(8, IN) / 8, torch.randn(8), padded(8, 50)),
}
CHANGES: dict[str, Callable[[], Any]] = {
    "scale": lambda: ScaleWeights(3, torch.randn(50)),
    "rotate": lambda: RotateWeights(5, torch.randn(50), torch.randn(50), torch.randperm(50).int()),
}


@dataclass(frozen=True)
class Deltas:
    """What an adapter does to a site."""

    adds: Sequence[Any] = ()
    changes: Sequence[Any] = ()
    biases: Sequence[OutputBias] = ()


@dataclass(frozen=True)
class Rows:
    """A segment, of an adapter with some deltas at each site."""

    start: int
    stop: int
    sites: Sequence[Deltas | None]
    weight: float = 1.0


def widened(weights: Any) -> Any:
    """The same numbers in float64."""
    if isinstance(weights, LowRankWeights):
        blocks = [replace(block, b_t=block.b_t.double()) for block in weights.blocks]
        return LowRankWeights(weights.a.double(), tuple(blocks))
    values = {f.name: getattr(weights, f.name) for f in fields(weights)}
    numbers = {k: v for k, v in values.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return replace(weights, **{name: value.double() for name, value in numbers.items()})


def bind(kernels: Kernels, sites: Sequence[Deltas | None], wide: bool = False) -> AdapterSites:
    def of(weights: Any) -> Any:
        return widened(weights) if wide else weights

    return kernels.bind_sites(
        [
            site
            and SiteDeltas(
                [kernels.change_output(of(weights)) for weights in site.changes],
                [kernels.add_delta(of(weights)) for weights in site.adds],
                list(site.biases),
            )
            for site in sites
        ]
    )


def grouped(kernels: Kernels, step: Sequence[Rows], wide: bool = False) -> DeltaGroup:
    return kernels.group_deltas(
        [DeltaSegment(s.start, s.stop, bind(kernels, s.sites, wide), s.weight) for s in step]
    )


def one_after_the_other(counts: Sequence[int], gap: int = 0) -> list[tuple[int, int]]:
    """Rows start : stop of segments, with rows of the bare base between them."""
    places, start = [], gap
    for count in counts:
        places.append((start, start + count))
        start += count + gap
    return places


def check(near: Near, kernels: Bfloat16Kernels, step: Sequence[Rows], sites: int = 1) -> Tensor:
    """y of the last site."""
    rows = max((s.stop for s in step), default=3) + 2
    group, truth = grouped(kernels, step), grouped(REFERENCE, step, wide=True)
    for site in range(sites):
        x, y = torch.randn(rows, IN).bfloat16(), torch.randn(rows, OUT).bfloat16()
        before, expected = y.clone(), y.double()
        truth.apply(site, expected, x.double())
        group.apply(site, y, x)
        near(y, expected, BF16)
        theirs = torch.zeros(rows, dtype=torch.bool)
        for s in step:
            theirs[s.start : s.stop] |= s.sites[site] is not None
        assert torch.equal(y[~theirs], before[~theirs])
    return y


@pytest.mark.parametrize("counts", [(1,), (3,), (4,), (5,), (70,), (200,), (1, 3, 4, 5, 70, 200)])
@pytest.mark.parametrize("ranks", [(1,), (2,), (3,), (17, 3, 1), (64, 33, 70), (8, 8, 8)])
def test_segments_of_any_length_and_any_ranks(
    near: Near, ours: Bfloat16Kernels, counts: Sequence[int], ranks: Sequence[int]
) -> None:
    places = one_after_the_other(counts, gap=1)
    check(near, ours, [Rows(*rows, [Deltas([low_rank(*ranks)])]) for rows in places])


def test_every_rank(near: Near, ours: Bfloat16Kernels) -> None:
    for rank in range(1, 71):
        places = one_after_the_other([1 + rank % 4, 5 + rank % 7])
        check(near, ours, [Rows(*rows, [Deltas([low_rank(rank, 71 - rank)])]) for rows in places])


def test_blocks_may_share_the_rows_of_a(near: Near, ours: Bfloat16Kernels) -> None:
    weights = low_rank(5, 6)
    first, second = weights.blocks
    shared = LowRankWeights(weights.a[:6], (first, replace(second, rank_start=0)))
    for count in 3, 9:
        check(near, ours, [Rows(0, count, [Deltas([shared])])])


@pytest.mark.parametrize("count", [1, 4, 5, 200])
def test_several_low_rank_deltas_at_one_site(near: Near, ours: Bfloat16Kernels, count: int) -> None:
    """They are added in turns, because they may meet in the same columns."""
    several = Deltas([low_rank(3), low_rank(2, 5), low_rank(1, 1, 7)])
    step = [
        Rows(0, count, [several]),
        Rows(count, count + 2, [Deltas([low_rank(9, 4)])]),
        Rows(count + 2, 2 * count + 2, [Deltas([low_rank(33), low_rank(6)])]),
    ]
    check(near, ours, step)


@pytest.mark.parametrize("count", [1, 4, 6, 70])
def test_sums_of_adapters_with_weights(near: Near, ours: Bfloat16Kernels, count: int) -> None:
    """Segments with the same rows; beside them, adapters that are alone."""
    sites = [[Deltas([low_rank(rank, rank + 1)])] for rank in (3, 8, 20, 5)]
    step = [
        Rows(0, count, sites[0], 0.7),
        Rows(0, count, sites[1], -1.5),
        Rows(0, count, sites[2]),
        Rows(count, 2 * count, sites[3]),
        Rows(2 * count, 3 * count, sites[0], 2.0),
        Rows(2 * count, 3 * count, sites[3], 0.0),
    ]
    assert grouped(ours, step).recordable
    check(near, ours, step)


@pytest.mark.parametrize("name", [*ADDS, *CHANGES])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 16, 17, 200])
def test_each_kind_beside_low_rank(
    near: Near, ours: Bfloat16Kernels, name: str, count: int
) -> None:
    """Alone, with low rank at the same site, and beyond the rows that our kernels take of it."""
    adds = [ADDS[name]()] if name in ADDS else []
    changes = [CHANGES[name]()] if name in CHANGES else []
    bias = OutputBias(7, torch.randn(100))
    (first, second, third, fourth) = one_after_the_other([count, 3, count, count])
    step = [
        Rows(*first, [Deltas(adds, changes)]),
        Rows(*second, [Deltas([low_rank(4, 6)])]),
        Rows(*third, [Deltas([low_rank(5), *adds], changes, [bias])]),
        Rows(*fourth, [Deltas([low_rank(2, 2, 2)])]),
    ]
    check(near, ours, step)


def test_everything_at_once(near: Near, ours: Bfloat16Kernels) -> None:
    changes = [make() for make in CHANGES.values()]
    adds = [make() for make in ADDS.values()]
    biases = [OutputBias(0, torch.randn(20)), OutputBias(600, torch.randn(40))]
    for count in 1, 2, 3, 20:
        check(near, ours, [Rows(1, 1 + count, [Deltas(adds, changes, biases)])])


def test_kinds_that_do_not_scale_with_a_weight_go_the_long_way(
    near: Near, ours: Bfloat16Kernels
) -> None:
    with_bias = Deltas([low_rank(3)], biases=[OutputBias(1, torch.randn(9))])
    step = [Rows(0, 2, [with_bias], 0.5), Rows(0, 2, [Deltas([sparse()])], -2.0)]
    assert not grouped(ours, step).recordable
    check(near, ours, step)


def test_more_rows_than_our_kernels_take_of_a_kind_are_not_recordable(
    ours: Bfloat16Kernels,
) -> None:
    for name in "kronecker", "circulant", "top k":
        weights = ADDS[name]()
        most = MOST_ROWS.get(type(weights), NATIVE_ROWS)
        for rows in most, most + 1:
            group = grouped(ours, [Rows(0, rows, [Deltas([weights])])])
            assert group.recordable == (rows == most)
    assert grouped(ours, [Rows(0, 500, [Deltas([low_rank(3)])])]).recordable
    assert grouped(ours, [Rows(0, 500, [Deltas(changes=[CHANGES["scale"]()])])]).recordable


def test_sites_without_deltas_and_adapters_without_sites(near: Near, ours: Bfloat16Kernels) -> None:
    step = [
        Rows(0, 2, [None, Deltas([low_rank(3)]), None]),
        Rows(2, 9, [Deltas([sparse()]), None, None]),
        Rows(9, 10, [Deltas(), Deltas(changes=[CHANGES["scale"]()]), None]),
        Rows(10, 11, [None, None, None]),
    ]
    check(near, ours, step, sites=3)


def test_no_segments_change_nothing(near: Near, ours: Bfloat16Kernels) -> None:
    check(near, ours, [])
    group, linear = ours.group_deltas([]), ours.linear(torch.randn(OUT, IN).bfloat16(), None)
    for rows in 3, 60:
        x = torch.randn(rows, IN).bfloat16()
        assert torch.equal(group.multiply(0, linear, x), linear(x))
    assert not group.recordable


@pytest.mark.parametrize("rows", [3, 48, 49, 97, 230])
def test_a_product_with_deltas_has_the_bits_of_the_product_and_then_the_deltas(
    ours: Bfloat16Kernels, rows: int
) -> None:
    """Of many rows, low-rank deltas are added while the product is computed."""
    linear = ours.linear(torch.randn(OUT, IN).bfloat16(), torch.randn(OUT).bfloat16())
    x = torch.randn(rows, IN).bfloat16()
    third = rows // 3
    plain = [
        Rows(1, third, [Deltas([low_rank(17, 3, 1)])]),
        Rows(third, rows - 1, [Deltas([low_rank(64)])]),
    ]
    for step in (
        plain,
        [*plain, Rows(third, rows - 1, [Deltas([low_rank(5)])], 0.5)],
        [Rows(0, third, [Deltas([low_rank(3), low_rank(4)])])],
        [*plain, Rows(rows - 1, rows, [Deltas([low_rank(3)])])],
        [Rows(0, min(2, third), [Deltas([sparse()])]), *plain[1:]],
        [Rows(0, rows, [None])],
        [Rows(0, rows, [Deltas([sparse()])])],
    ):
        group = grouped(ours, step)
        expected = linear(x)
        group.apply(0, expected, x)
        assert torch.equal(group.multiply(0, linear, x), expected)


def test_rows_of_larger_tensors(near: Near, ours: Bfloat16Kernels) -> None:
    step = [Rows(0, 3, [Deltas([low_rank(3, 2)])]), Rows(3, 13, [Deltas([low_rank(9)])])]
    whole_y, whole_x = torch.randn(30, OUT + 9).bfloat16(), torch.randn(30, IN + 4).bfloat16()
    before = whole_y.clone()
    y, x = whole_y[4:17, 5 : 5 + OUT], whole_x[::2, 1 : 1 + IN][:13]
    expected = y.double()
    grouped(REFERENCE, step, wide=True).apply(0, expected, x.double())
    grouped(ours, step).apply(0, y, x)
    near(y, expected, BF16)
    y.copy_(before[4:17, 5 : 5 + OUT])
    assert torch.equal(whole_y, before)


@pytest.mark.parametrize("transposed", [False, True])
def test_float32_and_columns_that_are_not_adjacent_go_to_torch(
    near: Near, ours: Bfloat16Kernels, transposed: bool
) -> None:
    step = [Rows(0, 3, [Deltas([low_rank(3, 2)])]), Rows(0, 3, [Deltas([low_rank(9)])], 0.5)]
    x, y = torch.randn(5, IN).bfloat16(), torch.randn(5, OUT).bfloat16()
    expected = y.double()
    grouped(REFERENCE, step, wide=True).apply(0, expected, x.double())
    if transposed:
        y = y.t().contiguous().t()
        grouped(ours, step).apply(0, y, x)
        near(y, expected, BF16)
    else:
        single = [replace(s, sites=[Deltas([as_float(s.sites[0])])]) for s in step]
        wide = y.float()
        grouped(ours, single).apply(0, wide, x.float())
        near(wide, expected, torch.float32)


def as_float(deltas: Deltas | None) -> LowRankWeights:
    assert deltas is not None
    (weights,) = deltas.adds
    blocks = tuple(replace(block, b_t=block.b_t.float()) for block in weights.blocks)
    return LowRankWeights(weights.a.float(), blocks)


def test_a_row_has_the_same_bits_alone_and_among_others(with_threads: WithThreads) -> None:
    sites = [Deltas([low_rank(17, 3, 30), low_rank(8)])]
    x, y = torch.randn(130, IN).bfloat16(), torch.randn(130, OUT).bfloat16()
    together = y.clone()
    grouped(with_threads(1), [Rows(0, 130, sites, 0.7)]).apply(0, together, x)
    for threads in 1, 2, 3:
        start = 0
        for count in (1, 2, 4, 5, 17, 101):
            rows = slice(start, start + count)
            for others in [], [Rows(count, count + 9, [Deltas([low_rank(40, 2)])])]:
                own_x = torch.cat((x[rows], torch.randn(9, IN).bfloat16()))
                own_y = torch.cat((y[rows], torch.randn(9, OUT).bfloat16()))
                step = [Rows(0, count, sites, 0.7), *others]
                grouped(with_threads(threads), step).apply(0, own_y, own_x)
                assert torch.equal(own_y[:count], together[rows])
            start += count
        assert start == 130
