from __future__ import annotations

import pytest
import torch

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.csr import sparse_from_entries, sparse_from_matrix


def test_entries_of_any_order_make_the_matrix_that_they_name() -> None:
    shape = (7, 5)
    rows, columns = torch.tensor([6, 0, 3, 3, 0]), torch.tensor([4, 2, 1, 0, 0])
    values = torch.randn(5)
    delta = sparse_from_entries("x", torch.stack((rows, columns)), values, shape)
    expected = torch.zeros(shape)
    expected[rows, columns] = values
    torch.testing.assert_close(delta.dense(), expected, rtol=0, atol=0)
    assert delta.row_pointers.tolist() == [0, 2, 2, 2, 4, 4, 4, 5]
    assert delta.columns.tolist() == [0, 2, 0, 1, 4]
    assert (delta.columns.dtype, delta.row_pointers.dtype) == (torch.int32, torch.int32)


def test_no_entries_make_a_matrix_of_zeros() -> None:
    delta = sparse_from_entries("x", torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0), (3, 2))
    assert (delta.nnz, delta.row_pointers.tolist()) == (0, [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ((7, 0), r"'x' points outside of .* \[7, 5\]"),
        ((0, 5), "outside of"),
        ((-1, 0), "outside of"),
        ((0, -1), "outside of"),
        ((2, 3), "'x' names an entry twice"),
    ],
)
def test_an_entry_outside_or_twice_is_refused(entry: tuple[int, int], message: str) -> None:
    indices = torch.tensor([(2, 3), entry]).T
    with pytest.raises(InvalidAdapterError, match=message):
        sparse_from_entries("x", indices, torch.ones(2), (7, 5))


@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (9, 1)])
def test_a_matrix_keeps_its_entries_that_are_not_zero(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape) * (torch.rand(shape) < 0.4)
    matrix[-1] = 0
    delta = sparse_from_matrix(matrix)
    assert (delta.shape, delta.nnz) == (shape, matrix.count_nonzero())
    assert torch.equal(delta.dense(), matrix)
    assert (delta.columns.dtype, delta.row_pointers.dtype) == (torch.int32, torch.int32)
    assert delta.row_pointers[-1] == delta.row_pointers[-2] == delta.nnz
