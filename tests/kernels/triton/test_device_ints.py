from __future__ import annotations

import pytest
import torch

from polydelta.kernels.triton.device_ints import StaticInts


def test_a_buffer_takes_anothers_content_and_stays_where_it_is(device: torch.device) -> None:
    held = StaticInts([1, 2, 3, 4], 6, device)
    place = held.tensor.data_ptr()
    held.assume(StaticInts([9], 6, device))
    assert held.tensor.tolist() == [9, 0, 0, 0, 0, 0]
    held.assume(StaticInts([5, 6, 7, 8, -1, 2**31 - 1], 6, device))
    assert held.tensor.tolist() == [5, 6, 7, 8, -1, 2**31 - 1]
    held.assume(StaticInts([], 6, device))
    assert held.tensor.tolist() == [0] * 6
    assert held.tensor.data_ptr() == place


def test_more_than_the_capacity_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="3 integers do not fit a buffer of 2"):
        StaticInts([1, 2, 3], 2, device)
