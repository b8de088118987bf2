from __future__ import annotations

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.coordinates import positions, whole_numbers


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_positions_are_sorted_with_the_order_that_does_it(dtype: torch.dtype) -> None:
    indices = torch.tensor([7, 0, 12, 3], dtype=dtype)
    ascending, order = positions("t", indices, 13)
    assert ascending.dtype == torch.int32
    assert ascending.tolist() == [0, 3, 7, 12]
    assert indices[order].tolist() == ascending.tolist()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 13]), r"'t' points outside of the 13 "),
        (torch.tensor([-1, 2]), r"'t' points outside of the 13 "),
        (torch.tensor([4, 2, 4]), r"'t' has an index twice"),
        (torch.tensor([], dtype=torch.int32), r"'t' is empty"),
        (torch.tensor([1.0, 2.0]), r"'t' is torch.float32: indices must be integers"),
    ],
)
def test_positions_that_are_not_certain_are_refused(indices: Tensor, message: str) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        positions("t", indices, 13)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.complex64])
def test_only_integers_are_whole_numbers(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidAdapterError, match="indices must be integers"):
        whole_numbers("t", torch.zeros(2, dtype=dtype))
