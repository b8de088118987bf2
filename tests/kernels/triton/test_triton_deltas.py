"""Every kind of delta, read in place from scattered pages, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.delta_groups import DeltaSegment, SegmentLoop
from polydelta.kernels.triton import deltas
from polydelta.kernels.triton.delta_group import PagedGroup, bind_pages, group
from polydelta.kernels.triton.tuning import Tunable

Packers = dict[str, Callable[..., Any]]
Rows = tuple[int, int]

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of the largest number of y; what is changed several times is rounded several times.
TOLERANCE = {FP32: 1e-6, FP16: 2e-3, BF16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
# One row, and more than a tile of them.
ROWS = pytest.mark.parametrize("rows", [(1, 2), (2, 21)], ids=["one", "many"])
IN, OUT = 70, 200


def kinds(packers: Packers, in_features: int = IN) -> dict[str, Any]:
    """Parts neither begin nor end at a multiple of anything."""
    return {
        "low rank": packers["low_rank"](in_features, (3, 130, 5), (135, 33, 1), (170, 20, 40)),
        "sparse": packers["sparse"](in_features, OUT),
        "columns": packers["columns"](in_features, 9, 101, 17),
        "rows": packers["rows"](in_features, OUT, 30),
        "one bit": packers["one_bit"](in_features, 7, 150),
        "scale": packers["scale"](3, 101),
        "bias": packers["bias"](5, 99),
    }


def error(
    segments: Sequence[tuple[Rows, Any, float]],
    x: Tensor,
    y: Tensor,
    site: int = 0,
) -> float:
    """Of y after the deltas, as a share of the largest number; y is changed."""
    before, expected = y.clone(), y.double()
    truth = [DeltaSegment(*rows, adapter.truth, weight) for rows, adapter, weight in segments]
    SegmentLoop(truth).apply(site, expected, x.double())
    ours = group(
        [
            DeltaSegment(*rows, bind_pages(adapter.places, adapter.others, y.device), weight)
            for rows, adapter, weight in segments
        ],
        y.device,
    )
    assert isinstance(ours, PagedGroup)
    ours.apply(site, y, x)
    theirs = torch.zeros(len(y), dtype=torch.bool)
    for (start, stop), _, _ in segments:
        theirs[start:stop] = True
    assert torch.equal(y[~theirs], before[~theirs])
    return float((y.double() - expected).abs().max() / expected.abs().max())


def inputs(dtype: torch.dtype, rows: int, device: torch.device, in_features: int = IN) -> Any:
    """x and y, whose rows lie apart."""
    x = torch.randn(rows, in_features + 3, device=device).to(dtype)[:, :in_features]
    return x, torch.randn(rows, OUT + 5, device=device).to(dtype)[:, :OUT]


@DTYPES
@ROWS
@pytest.mark.parametrize(
    "kind", ["low rank", "sparse", "columns", "rows", "one bit", "scale", "bias"]
)
def test_each_kind(
    kind: str, rows: Rows, dtype: torch.dtype, adapter_pool: Any, packers: Packers,
    device: torch.device,
) -> None:  # fmt: skip
    adapter = adapter_pool(dtype, device).add([kinds(packers)[kind]])
    x, y = inputs(dtype, 23, device)
    assert error([(rows, adapter, 0.5)], x, y) < TOLERANCE[dtype]


@DTYPES
@ROWS
@pytest.mark.parametrize("bits", [8, 4])
def test_matrices_of_few_bits(
    bits: int, rows: Rows, dtype: torch.dtype, adapter_pool: Any, packers: Packers,
    device: torch.device,
) -> None:  # fmt: skip
    adapter = adapter_pool(dtype, device).add([kinds(packers)["low rank"]], bits=bits)
    x, y = inputs(dtype, 23, device)
    assert error([(rows, adapter, 1.0)], x, y) < TOLERANCE[dtype]


@ROWS
@pytest.mark.parametrize("rank", [1, 15, 33, 256, 300])
def test_any_rank(
    rank: int, rows: Rows, adapter_pool: Any, packers: Packers, device: torch.device
) -> None:
    adapter = adapter_pool(FP32, device).add([packers["low_rank"](IN, (3, 33, rank))])
    x, y = inputs(FP32, 23, device)
    assert error([(rows, adapter, 1.0)], x, y) < TOLERANCE[FP32]


@pytest.mark.parametrize("page_bytes", [64, 320, 4096])
def test_any_size_of_pages(
    page_bytes: int, adapter_pool: Any, packers: Packers, device: torch.device
) -> None:
    pool = adapter_pool(BF16, device, page_bytes=page_bytes)
    adapter = pool.add([kinds(packers)["low rank"], kinds(packers)["sparse"]])
    x, y = inputs(BF16, 23, device)
    segments = [((0, 1), adapter, 1.0), ((3, 20), adapter, 1.0)]
    assert error(segments, x, y) < TOLERANCE[BF16]


@pytest.mark.parametrize("kind", ["low rank", "sparse", "rows", "one bit", "bias"])
@ROWS
def test_more_inputs_and_columns_than_a_program_takes_at_once(
    kind: str, rows: Rows, adapter_pool: Any, packers: Packers, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # One program for all columns of y, of which a block has 16 to 512.
    one = Tunable("one program", ({"num_warps": 4, "num_stages": 2, "programs": 1},))
    monkeypatch.setattr(deltas, "choices", lambda rows: one)
    in_features, out = 530, 530
    packer = {
        "low rank": packers["low_rank"](in_features, (0, out, 3)),
        "sparse": packers["sparse"](in_features, out, 0.01),
        "rows": packers["rows"](in_features, out, 20),
        "one bit": packers["one_bit"](in_features, 0, 100),
        "bias": packers["bias"](0, out),
    }[kind]
    adapter = adapter_pool(FP32, device).add([packer])
    x, y = (torch.randn(23, size, device=device) for size in (in_features, out))
    assert error([(rows, adapter, 1.0)], x, y) < TOLERANCE[FP32]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_adapters_of_all_kinds_in_one_step_with_sums(
    dtype: torch.dtype, adapter_pool: Any, packers: Packers, device: torch.device
) -> None:
    pool, each = adapter_pool(dtype, device), kinds(packers)
    lora = pool.add([each["low rank"], each["bias"], each["scale"]])
    coded = pool.add([each["low rank"]], bits=4)
    mixed = pool.add([each["sparse"], each["rows"], each["columns"], each["one bit"]])
    x, y = inputs(dtype, 45, device)
    segments = [
        ((0, 1), lora, 1.0),
        ((1, 2), coded, 0.5),
        ((1, 2), mixed, -0.5),
        ((1, 2), lora, 0.25),
        ((3, 20), mixed, 2.0),
        ((20, 22), mixed, 1.0),
        ((24, 44), lora, 1.0),
        ((24, 44), coded, 1.0),
    ]
    assert error(segments, x, y) < TOLERANCE[dtype]


def test_a_long_prefill(adapter_pool: Any, packers: Packers, device: torch.device) -> None:
    pool, each = adapter_pool(BF16, device), kinds(packers)
    lora = pool.add([each["low rank"], each["bias"]])
    mixed = pool.add([each["sparse"], each["rows"], each["columns"], each["one bit"]])
    x, y = inputs(BF16, 301, device)
    segments = [((0, 130), mixed, 1.0), ((130, 132), lora, 0.5), ((132, 300), lora, 1.0)]
    assert error(segments, x, y) < TOLERANCE[BF16]


def test_each_layer_has_its_own_numbers(
    adapter_pool: Any, packers: Packers, device: torch.device
) -> None:
    adapter = adapter_pool(FP32, device, layers=3).add(
        [kinds(packers)["low rank"]], [], [kinds(packers)["sparse"]]
    )
    for site in range(3):
        x, y = inputs(FP32, 4, device)
        assert error([((0, 1), adapter, 1.0)], x, y, site) < TOLERANCE[FP32]


@pytest.mark.parametrize("rows", [(4, 5), (4, 30)], ids=["one", "many"])
def test_a_result_does_not_depend_on_who_shares_the_step(
    rows: Rows, adapter_pool: Any, packers: Packers, device: torch.device
) -> None:
    pool, each = adapter_pool(BF16, device), kinds(packers)
    mine = pool.add([each["low rank"], each["sparse"], each["one bit"]])
    other = pool.add([each["low rank"], each["rows"], each["scale"]])
    x, y = inputs(BF16, 33, device)
    alone, shared = y.clone(), y.clone()
    error([(rows, mine, 1.0)], x, alone)
    error([((0, 2), other, 1.0), (rows, mine, 1.0), ((30, 31), mine, 0.5)], x, shared)
    assert torch.equal(alone[slice(*rows)], shared[slice(*rows)])
