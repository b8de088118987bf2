from __future__ import annotations

import pytest
import torch

from polydelta.kernels.kv_formats.low_rank import low_rank, product


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(1, 8), (2, 40), (49, 64), (82, 128), (300, 72)], ids=str)
def test_a_matrix_of_the_rank_comes_back(size: tuple[int, int]) -> None:
    # One part 50 times the other.
    given = product(random(3, size[0], 1), random(3, 1, size[1], seed=1)) + 50 * product(
        random(3, size[0], 1, seed=2), random(3, 1, size[1], seed=3)
    )
    left, right = low_rank(given, 2)
    assert left.dtype == right.dtype == torch.float16
    # float16's share of the largest; a part that was missed would be 0.02 of it.
    assert (product(left, right) - given).abs().max() <= 2e-3 * given.abs().max()


@pytest.mark.parametrize("size", [(49, 64), (30, 128), (70, 8)], ids=str)
@pytest.mark.parametrize("kind", ["even", "spiky"])
def test_what_is_left_is_near_the_least_there_can_be(size: tuple[int, int], kind: str) -> None:
    matrices = random(20, *size)
    if kind == "spiky":
        matrices[..., 3] *= 20
        matrices[:, 0] *= 5
    left, right = low_rank(matrices, 2)
    off = (matrices - product(left, right)).norm()
    singular = torch.linalg.svdvals(matrices.double())
    assert off <= 1.02 * singular[:, 2:].norm()
    assert off < matrices.norm()


@pytest.mark.parametrize("size", [(1, 8), (5, 5), (49, 64), (33, 128)], ids=str)
def test_factors_have_the_same_bits_alone_and_in_a_batch(size: tuple[int, int]) -> None:
    matrices = random(13, *size)
    together = low_rank(matrices, 2)
    for place in range(13):
        alone = low_rank(matrices[place : place + 1], 2)
        for mine, theirs in zip(alone, together, strict=True):
            assert torch.equal(mine[0], theirs[place])


def test_a_lower_rank_than_asked_for_adds_nothing() -> None:
    single = torch.zeros(2, 33, 16)
    single[0, 4] = random(16)
    left, right = low_rank(single, 2)
    assert (product(left, right) - single).abs().max() <= 2e-3
    # One row, whose second factor has nothing left.
    row = random(1, 1, 24)
    assert (product(*low_rank(row, 2)) - row).abs().max() <= 2e-3


def test_a_matrix_of_the_same_number_comes_back() -> None:
    same = torch.full((2, 32, 64), -0.5)
    assert (product(*low_rank(same, 2)) - same).abs().max() <= 1e-3


def test_what_float16_cannot_hold_is_cut_off() -> None:
    left, right = low_rank(torch.full((1, 9, 8), 3e38), 2)
    assert left.isfinite().all()
    assert right.abs().max() == 65504
