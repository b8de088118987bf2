"""Which segments of a step go through page tables, which through a loop, and what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.delta_groups import DeltaSegment, OutputBias, SegmentLoop, SiteDeltas
from polydelta.kernels.triton import delta_group
from polydelta.kernels.triton.delta_group import MOST_ROWS, PagedGroup, bind_pages, group

Packers = dict[str, Callable[..., Any]]
Segments = Sequence[tuple[int, int, Any, float]]

BF16 = torch.bfloat16
IN, OUT = 20, 66


class Adapters:
    """One that is read through page tables, one that is not, and one that is not in the pool."""

    def __init__(self, adapter_pool: Any, packers: Packers, device: torch.device) -> None:
        self.device = device
        self.pool = adapter_pool(torch.float32, device, layers=2)
        self.packers = packers
        self.lora = self.paged([packers["low_rank"](IN, (0, OUT, 4)), packers["scale"](0, OUT)])
        self.other = self.paged([packers["kronecker"](6, 4, 11, 5), packers["scale"](0, OUT)])
        self.loose = [SiteDeltas(biases=[OutputBias(0, torch.randn(OUT, device=device))])]

    def paged(self, *sites: Sequence[Any]) -> Any:
        adapter = self.pool.add(*sites)
        return bind_pages(adapter.places, adapter.others, self.device)

    def group(self, segments: Segments) -> Any:
        return group([DeltaSegment(*segment) for segment in segments], self.device)


@pytest.fixture
def adapters(adapter_pool: Any, packers: Packers, device: torch.device) -> Adapters:
    return Adapters(adapter_pool, packers, device)


def loop(segments: Segments, x: Tensor, y: Tensor) -> Tensor:
    """What comes out segment by segment."""
    expected = y.clone()
    SegmentLoop([DeltaSegment(*segment) for segment in segments]).apply(0, expected, x)
    return expected


def inputs(device: torch.device, rows: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, IN, device=device), torch.randn(rows, OUT, device=device)


def test_what_is_not_in_the_pool_goes_through_a_loop(adapters: Adapters) -> None:
    assert isinstance(adapters.group([(0, 1, adapters.loose, 1.0)]), SegmentLoop)
    assert isinstance(adapters.group([(0, 1, adapters.other, 1.0)]), SegmentLoop)


def test_all_kinds_of_adapters_in_one_group(adapters: Adapters) -> None:
    segments = [
        (0, 1, adapters.lora, 1.0),
        (1, 3, adapters.other, 1.0),
        (3, 4, adapters.loose, 1.0),
        (4, 6, adapters.lora, 0.5),
    ]
    x, y = inputs(adapters.device)
    expected, mixed = loop(segments, x, y), adapters.group(segments)
    assert isinstance(mixed, PagedGroup)
    assert not mixed.recordable
    mixed.apply(0, y, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, -1])
def test_a_sum_with_one_that_goes_through_a_loop_keeps_its_order(
    order: int, adapters: Adapters
) -> None:
    both = [(0, 2, adapters.lora, 0.5), (0, 2, adapters.other, 2.0)][::order]
    segments = [*both, (2, 3, adapters.lora, 1.0)]
    x, y = inputs(adapters.device)
    expected = loop(segments, x, y)
    adapters.group(segments).apply(0, y, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_multiply_adds_to_the_product_of_the_base(adapters: Adapters) -> None:
    segments = [(0, 3, adapters.lora, 1.0)]
    x, _ = inputs(adapters.device)
    weight = torch.randn(OUT, IN, device=adapters.device)
    got = adapters.group(segments).multiply(0, lambda x: x @ weight.T, x)
    torch.testing.assert_close(got, loop(segments, x, x @ weight.T), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["dtype", "x", "y"])
def test_what_the_kernel_does_not_take_goes_through_a_loop(
    what: str, adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta_group, "apply_deltas", None)
    adapter = adapters.paged([adapters.packers["scale"](0, OUT)])
    segments = [(0, 3, adapter, 1.0)]
    x, y = inputs(adapters.device)
    expected = loop(segments, x, y)
    if what == "dtype":
        x, y = x.double(), y.double()
    elif what == "x":
        x = x.T.contiguous().T
    else:
        y = y.T.contiguous().T
    adapters.group(segments).apply(0, y, x)
    torch.testing.assert_close(y.float(), expected)


def test_a_recorded_group_takes_the_place_of_another(adapters: Adapters) -> None:
    first = [(0, 1, adapters.lora, 1.0), (2, 3, adapters.lora, 0.5)]
    mixed = adapters.paged([adapters.packers["sparse"](IN, OUT), adapters.packers["bias"](0, 9)])
    second = [(1, 2, mixed, 1.0), (2, 7, adapters.lora, 2.0), (2, 7, mixed, -1.0)]
    held, fresh = adapters.group(first), adapters.group(second)
    assert held.recordable
    assert fresh.recordable
    memory = held._steps.tensor.data_ptr()
    held.assume(fresh)
    assert held._steps.tensor.data_ptr() == memory
    x, y = inputs(adapters.device)
    expected = loop(second, x, y)
    held.apply(0, y, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_recorded_group_launches_where_it_has_no_deltas(
    adapters: Adapters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another may have some there."""
    launched: list[int] = []
    monkeypatch.setattr(delta_group, "apply_deltas", lambda *args: launched.append(args[-1]))
    x, y = inputs(adapters.device)
    adapters.group([(0, 1, adapters.lora, 1.0)]).apply(1, y, x)
    assert launched == [1]
    long = adapters.group([(0, MOST_ROWS + 1, adapters.lora, 1.0)])
    long.apply(1, y, x)
    assert launched == [1]


def test_which_groups_can_be_recorded(adapters: Adapters) -> None:
    lora, most = adapters.lora, MOST_ROWS
    one_each = [(row, row + 1, lora, 1.0) for row in range(most)]
    assert adapters.group(one_each).recordable
    assert adapters.group([(0, most, lora, 1.0)]).recordable
    assert adapters.group([*one_each, *one_each]).recordable
    assert not adapters.group([(1, most + 1, lora, 1.0)]).recordable
    assert not adapters.group([*one_each, *one_each, *one_each]).recordable
    assert not adapters.group([(0, 1, lora, 1.0), (1, 2, adapters.loose, 1.0)]).recordable


def test_adapters_of_another_pool_or_dtype_go_through_a_loop(
    adapters: Adapters, adapter_pool: Any, packers: Packers
) -> None:
    theirs = []
    for dtype in (torch.float32, BF16):
        adapter = adapter_pool(dtype, adapters.device).add([packers["bias"](0, OUT)])
        theirs.append(bind_pages(adapter.places, adapter.others, adapters.device))
    segments = [(0, 1, adapters.lora, 1.0), (1, 2, theirs[0], 1.0), (2, 3, theirs[1], 1.0)]
    x, y = inputs(adapters.device)
    expected, mixed = loop(segments, x, y), adapters.group(segments)
    assert not mixed.recordable
    mixed.apply(0, y, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_sites_are_those_that_were_bound(adapters: Adapters) -> None:
    adapter = adapters.pool.add([adapters.packers["bias"](0, 9)], [])
    sites = bind_pages(adapter.places, adapter.others, adapters.device)
    assert sites[0] is adapter.others[0]
    assert sites[1] is None
    assert sites.sites == {0}
