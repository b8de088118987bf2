"""Deltas of every kind on a CPU against the reference in float64, and that against definitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu import deltas, native
from polydelta.kernels.delta_weights import (
    AddWeights,
    ChangeWeights,
    CirculantWeights,
    ColumnsWeights,
    KroneckerWeights,
    OneBitWeights,
    RotateWeights,
    RowsWeights,
    ScaleWeights,
    SparseWeights,
    TopKWeights,
)
from polydelta.kernels.reference_deltas import add_delta, change_output, unpacked_signs

Near = Callable[[Tensor, Tensor, torch.dtype], None]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Around the numbers of rows where a bfloat16 delta changes its way of computing.
ROWS = pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17])
# Neither a multiple of 8 nor of 16, nor powers of 2.
IN, OUT, START = 42, 70, 9


def padded(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix whose rows lie apart, as in a page; what is between them is no number."""
    memory = torch.full((rows, columns + 5), torch.nan)
    memory[:, :columns] = torch.randn(rows, columns)
    return memory.to(dtype)[:, :columns]


def sparse(dtype: torch.dtype) -> SparseWeights:
    dense = torch.randn(OUT, IN) * (torch.rand(OUT, IN) < 0.1)
    dense[3] = 0.0
    counts = (dense != 0).sum(1)
    pointers = torch.cat((torch.zeros(1), counts.cumsum(0))).int()
    places = dense.nonzero()
    return SparseWeights(pointers, places[:, 1].int(), dense[dense != 0].to(dtype))


def columns(dtype: torch.dtype) -> ColumnsWeights:
    return ColumnsWeights(START, torch.tensor([0, 7, 41]).int(), padded(3, OUT - START, dtype))


def rows_weights(dtype: torch.dtype) -> RowsWeights:
    return RowsWeights(torch.tensor([0, 69, 5, 5]).int(), padded(4, IN, dtype))


def one_bit(dtype: torch.dtype) -> OneBitWeights:
    bits = torch.randint(0, 256, (33, 64), dtype=torch.uint8)[:, : -(-IN // 8)]
    return OneBitWeights(START, bits, torch.tensor([0.03]))


def kronecker(dtype: torch.dtype) -> KroneckerWeights:
    return KroneckerWeights(START, padded(5, 6, dtype), padded(11, 7, dtype))


def circulant(dtype: torch.dtype) -> CirculantWeights:
    return CirculantWeights(START, padded(15, 14, dtype).unflatten(0, (5, 3))[:4])


def top_k(dtype: torch.dtype) -> TopKWeights:
    return TopKWeights(START, 3, padded(8, IN, dtype), torch.randn(8), padded(8, 50, dtype))


def scale(dtype: torch.dtype) -> ScaleWeights:
    return ScaleWeights(START, torch.randn(50))


def rotate(dtype: torch.dtype) -> RotateWeights:
    return RotateWeights(START, torch.randn(50), torch.randn(50), torch.randperm(50).int())


ADDS = (sparse, columns, rows_weights, one_bit, kronecker, circulant, top_k)
CHANGES = (scale, rotate)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["compiled", "plain torch"])
def library(request: pytest.FixtureRequest) -> native.NativeLibrary | None:
    if request.param == "plain torch":
        return None
    if (library := native.load()) is None:
        pytest.skip("there is no C compiler")
    return library


def widened(weights: Any) -> Any:
    """The same numbers in float64."""
    values = {f.name: getattr(weights, f.name) for f in fields(weights)}
    wide = {
        name: value.double()
        for name, value in values.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return replace(weights, **wide)


def separable(x: Tensor, weights: AddWeights) -> Tensor:
    """Rows whose choice of the top entries rounding cannot change."""
    if not isinstance(weights, TopKWeights):
        return x
    scores = (x.double() @ weights.a.double().T + weights.bias.double()).abs().sort(1).values
    gaps = scores[:, -weights.keep] - scores[:, -weights.keep - 1]
    return x[gaps > 0.1 * scores.max()]


@DTYPES
@ROWS
@pytest.mark.parametrize("make", ADDS)
def test_what_is_added_agrees_with_the_reference(
    make: Callable[[torch.dtype], AddWeights],
    rows: int,
    dtype: torch.dtype,
    library: native.NativeLibrary | None,
    near: Near,
) -> None:
    weights = make(dtype)
    many = torch.randn(400, IN + 3).to(dtype)[:, :IN]
    x = separable(many, weights)[:rows]
    assert len(x) == rows
    y = torch.randn(rows, OUT + 6).to(dtype)[:, :OUT]
    expected = y.double()
    add_delta(widened(weights), expected, x.double())
    deltas.add_delta(weights, library)(y, x)
    near(y, expected, dtype)


@DTYPES
@ROWS
@pytest.mark.parametrize("make", CHANGES)
def test_what_is_changed_agrees_with_the_reference(
    make: Callable[[torch.dtype], ChangeWeights],
    rows: int,
    dtype: torch.dtype,
    library: native.NativeLibrary | None,
    near: Near,
) -> None:
    weights = make(dtype)
    y = torch.randn(rows, OUT + 6).to(dtype)[:, :OUT]
    expected = y.double()
    change_output(widened(weights), expected)
    deltas.change(weights, library)(y)
    near(y, expected, dtype)


@pytest.mark.parametrize(("down", "across"), [(3, 1), (1, 3), (1, 1), (3, 2)])
@DTYPES
def test_circulant_blocks_beside_and_above_each_other(
    down: int, across: int, dtype: torch.dtype, library: native.NativeLibrary | None, near: Near
) -> None:
    kernel = padded(down * across, 14, dtype).unflatten(0, (-1, across))
    weights = CirculantWeights(2, kernel)
    y, x = torch.randn(2, 60).to(dtype), torch.randn(2, 14 * across).to(dtype)
    expected = y.double()
    add_delta(widened(weights), expected, x.double())
    deltas.add_delta(weights, library)(y, x)
    near(y, expected, dtype)


def test_of_a_top_k_only_the_largest_biased_entries_are_kept() -> None:
    a, b_t = torch.eye(4), torch.eye(4) * 10
    weights = TopKWeights(0, 2, a, torch.tensor([0.0, 0.0, 5.0, 0.0]), b_t)
    y, x = torch.zeros(2, 4), torch.tensor([[1.0, -3.0, 0.5, 2.0], [0.1, 0.2, -9.0, -0.3]])
    add_delta(weights, y, x)
    assert y.tolist() == [[0.0, -30.0, 5.0, 0.0], [0.0, 0.0, -90.0, pytest.approx(-3.0)]]


@pytest.mark.parametrize("in_features", [1, 7, 8, 9, 31, 33, 64])
def test_signs_are_unpacked_bit_by_bit(in_features: int) -> None:
    bits = torch.randint(0, 256, (5, -(-in_features // 8)), dtype=torch.uint8)
    expected = [
        [1.0 if bits[row, i // 8].item() >> (i % 8) & 1 else -1.0 for i in range(in_features)]
        for row in range(5)
    ]
    assert unpacked_signs(bits, in_features, torch.float32).tolist() == expected
    if (library := native.load()) is not None:
        assert library.unpack_signs(bits, in_features).tolist() == expected
