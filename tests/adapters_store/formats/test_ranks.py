from __future__ import annotations

import pytest
import torch

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.ranks import MOST, check_rank, low_rank_of, reduced


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (1, 9), (5, 5)])
def test_any_change_is_a_low_rank_one_of_its_smaller_side(shape: tuple[int, int]) -> None:
    change = torch.randn(shape)
    delta = low_rank_of(change)
    assert (delta.shape, delta.rank) == (shape, min(shape))
    assert torch.equal(delta.dense(), change)


@pytest.mark.parametrize("rank", [1, 7, 8, 40])
def test_a_rank_above_the_smaller_side_comes_down_to_it(rank: int) -> None:
    delta = LowRank(torch.randn(rank, 12), torch.randn(7, rank))
    smaller = reduced(delta)
    assert smaller.rank == min(rank, 7)
    assert (smaller is delta) == (rank <= 7)
    torch.testing.assert_close(smaller.dense(), delta.dense(), rtol=0, atol=0)


def test_a_rank_far_above_the_smaller_side_is_refused() -> None:
    check_rank("q_proj", MOST * 7, (7, 12))
    with pytest.raises(InvalidAdapterError, match=r"'q_proj' would have rank 57, .* more than 7"):
        check_rank("q_proj", MOST * 7 + 1, (7, 12))
