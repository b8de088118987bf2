"""`dense()` of each kind against what its docstring says, entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import get_args

import pytest
import torch

from polydelta.adapters_store.delta import (
    Circulant,
    Columns,
    Delta,
    Dense,
    Kronecker,
    LowRank,
    Matrix,
    OneBit,
    Rows,
    Sparse,
    TopK,
)

Makers = Mapping[str, Callable[[tuple[int, int]], Delta]]
KINDS = ("low rank", "sparse", "columns", "rows", "one bit", "kronecker", "circulant")
# Of no tensor core's liking: 1, primes, just beyond a byte's bits, and some with many divisors.
SHAPES = [(1, 1), (1, 7), (13, 1), (11, 17), (9, 8), (8, 9), (24, 36), (30, 15)]


def entry(delta: Matrix, row: int, column: int) -> float:
    """Of `dW`, by definition."""
    match delta:
        case LowRank(a, b):
            return sum(float(b[row, r] * a[r, column]) for r in range(len(a)))
        case Sparse(_, row_pointers, columns, values):
            places = range(int(row_pointers[row]), int(row_pointers[row + 1]))
            return sum(float(values[place]) for place in places if columns[place] == column)
        case Columns(_, indices, block):
            return sum(float(block[row, k]) for k, index in enumerate(indices) if index == column)
        case Rows(_, indices, block):
            return sum(float(block[k, column]) for k, index in enumerate(indices) if index == row)
        case OneBit(_, bits, scale):
            is_one = int(bits[row, column // 8]) // 2 ** (column % 8) % 2
            return scale if is_one else -scale
        case Kronecker(left, right):
            (c, d) = right.shape
            return float(left[row // c, column // d] * right[row % c, column % d])
        case Circulant(kernel):
            size = kernel.shape[2]
            i, j, n, q = row // size, row % size, column // size, column % size
            return float(kernel[i, n, (q - j) % size])
        case Dense(weight):
            return float(weight[row, column])
    raise TypeError(type(delta))


def check(delta: Matrix, shape: tuple[int, int]) -> None:
    assert delta.shape == shape
    want = [[entry(delta, row, column) for column in range(shape[1])] for row in range(shape[0])]
    dense = delta.dense()
    assert dense.dtype is torch.float32
    torch.testing.assert_close(dense, torch.tensor(want, dtype=torch.float32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_is_as_defined(delta_makers: Makers, kind: str, shape: tuple[int, int]) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        delta = delta_makers[kind](shape)
        assert isinstance(delta, Matrix)
        check(delta, shape)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_circulant_blocks_of_every_size(size: int) -> None:
    torch.manual_seed(size)
    check(Circulant(torch.randn(24 // size, 36 // size, size)), (24, 36))


def test_a_circulant_block_correlates_in_a_circle() -> None:
    """`y[j]` is the sum over m of `kernel[m] * x[(j + m) % size]`."""
    kernel, x = torch.randn(7), torch.randn(7)
    want = [sum(float(kernel[m] * x[(j + m) % 7]) for m in range(7)) for j in range(7)]
    got = Circulant(kernel.view(1, 1, 7)).dense() @ x
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (1, 36), (24, 1), (24, 36), (8, 3), (3, 4)])
def test_kronecker_factors_of_every_size(a: int, b: int) -> None:
    torch.manual_seed(a)
    # Neither factor contiguous, as where one was transposed.
    left, right = torch.randn(b, a).T, torch.randn(36 // b, 24 // a).T
    check(Kronecker(left, right), (24, 36))


def test_signs_are_read_from_the_lowest_bit_on_and_what_fills_the_last_byte_is_left_out() -> None:
    bits = torch.tensor([[0b00000001, 0b11111110], [0b10000000, 0b00000011]], dtype=torch.uint8)
    dense = OneBit(10, bits, 0.5).dense()
    assert dense.sign().tolist() == [
        [1, -1, -1, -1, -1, -1, -1, -1, -1, 1],
        [-1, -1, -1, -1, -1, -1, -1, 1, 1, 1],
    ]
    assert dense.abs().unique().tolist() == [0.5]


def test_nothing_changed_is_zero() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    for delta in (
        Sparse((5, 3), torch.zeros(6, dtype=torch.int32), none, torch.zeros(0)),
        Columns(3, none, torch.zeros(5, 0)),
        Rows(5, none, torch.zeros(0, 3)),
        LowRank(torch.zeros(0, 3), torch.zeros(5, 0)),
    ):
        assert torch.equal(delta.dense(), torch.zeros(5, 3))


def test_any_change_is_itself() -> None:
    check(Dense(torch.randn(5, 3)), (5, 3))


def test_what_has_a_rank_has_a_shape_too(delta_makers: Makers) -> None:
    for kind in ("low rank", "top k"):
        delta = delta_makers[kind]((13, 7))
        assert isinstance(delta, LowRank | TopK)
        assert delta.shape == (13, 7)
        assert delta.rank == len(delta.a) == delta.b.shape[1]


def test_each_kind_with_a_matrix_is_tested_here(delta_makers: Makers) -> None:
    made = {type(delta_makers[kind]((6, 4))) for kind in KINDS}
    assert made | {Dense} == set(get_args(Matrix))
