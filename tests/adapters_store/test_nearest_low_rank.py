"""Truncated singular value decompositions, against torch's own and PEFT's cut."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.conversion import _find_cutoff_index

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.nearest_low_rank import (
    Approximation,
    Truncation,
    nearest_low_rank,
    nearest_of_product,
    total_error,
)


def test_what_is_lost_is_what_the_factors_leave_out() -> None:
    matrix = torch.randn(13, 7)
    found = nearest_low_rank(matrix, Truncation(rank=3))
    assert found.delta.rank == 3
    lost = torch.linalg.matrix_norm(matrix - found.delta.dense())
    assert found.lost == pytest.approx(float(lost), rel=1e-4)
    assert found.error == pytest.approx(float(lost / torch.linalg.matrix_norm(matrix)), rel=1e-4)


@pytest.mark.parametrize("energy", [0.1, 0.5, 0.9, 0.999])
def test_energy_takes_as_many_singular_values_as_pefts_conversion(energy: float) -> None:
    matrix = torch.randn(21, 34)
    singular = torch.linalg.svdvals(matrix)
    found = nearest_low_rank(matrix, Truncation(energy=energy))
    assert found.delta.rank == _find_cutoff_index(singular, energy)
    assert found.error**2 <= 1 - energy


def test_whole_energy_and_a_rank_above_the_matrix_keep_everything() -> None:
    matrix = torch.randn(5, 9)
    for truncation in (Truncation(energy=1.0), Truncation(rank=100)):
        found = nearest_low_rank(matrix, truncation)
        assert found.delta.rank <= 5
        torch.testing.assert_close(found.delta.dense(), matrix, atol=1e-5, rtol=0)


def test_a_change_of_zeros_has_rank_1_and_no_error() -> None:
    found = nearest_low_rank(torch.zeros(4, 6), Truncation(energy=0.9))
    assert (found.delta.rank, found.error) == (1, 0.0)
    assert not found.delta.dense().any()


def test_a_product_is_truncated_as_its_dense_matrix_is() -> None:
    product = LowRank(torch.randn(6, 40), torch.randn(23, 6))
    for truncation in (Truncation(rank=2), Truncation(energy=0.8)):
        found, want = (
            nearest_of_product(product, truncation),
            nearest_low_rank(product.dense(), truncation),
        )
        assert found.delta.rank == want.delta.rank
        torch.testing.assert_close(found.delta.dense(), want.delta.dense(), atol=1e-4, rtol=1e-4)
        assert found.error == pytest.approx(want.error, rel=1e-4)


def test_errors_add_up_as_one_matrix_made_of_all() -> None:
    factors = LowRank(torch.ones(1, 1), torch.ones(1, 1))
    parts = [Approximation(factors, norm=3.0, lost=1.0), Approximation(factors, norm=4.0, lost=2.0)]
    assert total_error(parts) == pytest.approx(5**0.5 / 5)
    assert total_error([Approximation(factors)]) == total_error([]) == 0.0


@pytest.mark.parametrize(
    ("rank", "energy", "message"),
    [
        (None, None, "rank or an energy"),
        (3, 0.9, "and not both"),
        (0, None, "rank is 0"),
        (None, 0.0, r"energy is 0\.0"),
        (None, 1.1, r"energy is 1\.1"),
        (None, float("nan"), "energy is nan"),
    ],
)
def test_a_truncation_that_makes_no_sense_is_refused(
    rank: int | None, energy: float | None, message: str
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        Truncation(rank, energy)


def test_a_change_beyond_float32_is_told() -> None:
    with pytest.raises(FloatingPointError):
        nearest_low_rank(torch.tensor([[1.0, float("inf")]]), Truncation(rank=1))
    huge = LowRank(torch.full((1, 4), 3e38), torch.full((3, 1), 3e38))
    with pytest.raises(FloatingPointError):
        nearest_of_product(huge, Truncation(rank=1))
