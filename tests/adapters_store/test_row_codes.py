from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.row_codes import GROUP, balanced, quantize_rows

BITS = pytest.mark.parametrize("bits", [8, 4])
# Of normal numbers: the root of the mean square of what is off, as a share of theirs.
MOST_OFF = {8: 0.006, 4: 0.085}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def undone(codes: Tensor, scales: Tensor, bits: int, columns: int) -> Tensor:
    """`[rows, columns]` float32, number by number."""
    values = torch.empty(len(codes), columns)
    for row in range(len(codes)):
        for column in range(columns):
            if bits == 8:
                code = int(codes[row, column])
            else:
                code = (int(codes[row, column // 2]) >> 4 * (column % 2) & 15) - 8
            values[row, column] = code * float(scales[row, column // GROUP])
    return values


@BITS
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (2, 32), (5, 33), (7, 450)])
def test_numbers_come_back_as_near_as_the_bits_allow(bits: int, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    codes, scales = quantize_rows(matrix, bits)
    rows, columns = shape
    assert codes.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert codes.shape == (rows, columns if bits == 8 else -(-columns // 2))
    assert (scales.dtype, scales.shape) == (torch.float16, (rows, -(-columns // GROUP)))
    off = undone(codes, scales, bits, columns) - matrix
    # A few groups may be less lucky than many.
    luck = 1.3 if rows < 7 else 1.0
    assert off.norm() <= luck * MOST_OFF[bits] * matrix.norm()


@BITS
def test_each_group_has_the_precision_of_its_own_numbers(bits: int) -> None:
    """Next to numbers a thousand times as large, in the same row and in the next one."""
    matrix = torch.randn(2, 3 * GROUP)
    matrix[0, GROUP : 2 * GROUP] *= 1000
    matrix[1] *= 1000
    codes, scales = quantize_rows(matrix, bits)
    off = (undone(codes, scales, bits, 3 * GROUP) - matrix).unflatten(1, (3, GROUP)).norm(dim=-1)
    assert (off <= 2 * MOST_OFF[bits] * matrix.unflatten(1, (3, GROUP)).norm(dim=-1)).all()


@BITS
def test_zeros_stay_zeros_and_rows_of_one_number_are_kept(bits: int) -> None:
    matrix = torch.tensor([[0.0], [0.75], [-0.75], [1e-9]]).expand(-1, 40).contiguous()
    matrix[:, 5] = 0
    values = undone(*quantize_rows(matrix, bits), bits, 40)
    assert (values[:, 5] == 0).all()
    assert (values[0] == 0).all()
    torch.testing.assert_close(values, matrix, rtol=1e-3, atol=1e-8)


@BITS
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e6])
def test_numbers_that_no_scale_holds_are_refused(bits: int, wrong: float) -> None:
    matrix = torch.zeros(2, 70)
    matrix[1, 66] = wrong
    with pytest.raises(InvalidAdapterError, match=f"{bits} bits do not hold: .*--adapter-bits"):
        quantize_rows(matrix, bits)


@BITS
@pytest.mark.parametrize(("of_a", "of_b"), [(1.0, 1e-7), (1e-9, 30.0), (1e8, 1e-6)])
def test_a_and_b_that_are_far_apart_lose_no_more_than_others(
    bits: int, of_a: float, of_b: float
) -> None:
    """As they are, scales of the smaller one would be 0, and of the larger one infinite."""
    a, b_t = torch.randn(6, 90) * of_a, torch.randn(6, 50) * of_b
    product = b_t.T.double() @ a.double()
    even_a, even_b = balanced(a, b_t)
    assert torch.equal(even_b.T.double() @ even_a.double(), product)
    values = [undone(*quantize_rows(m, bits), bits, m.shape[1]) for m in (even_a, even_b)]
    off = values[1].T.double() @ values[0].double() - product
    assert off.norm() <= 1.6 * MOST_OFF[bits] * product.norm()


def test_ranks_without_numbers_are_left_as_they_are() -> None:
    a, b_t = torch.randn(3, 9), torch.randn(3, 7)
    a[1], b_t[2] = 0, 0
    even_a, even_b = balanced(a, b_t)
    assert torch.equal(even_a[1:], a[1:])
    assert torch.equal(even_b[1:], b_t[1:])
