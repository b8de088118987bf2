"""Heads are rotated so that scores stay, and twice is not at all."""

from __future__ import annotations

import pytest
import torch

from polydelta.kernels.kv_rotation import hadamard, part, rotated


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_matrix_is_orthogonal_and_its_own_inverse(size: int) -> None:
    matrix = hadamard(size)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, size * torch.eye(size, dtype=torch.float64))
    assert matrix.abs().unique().tolist() == [1]


@pytest.mark.parametrize(("head_dim", "size"), [(64, 64), (80, 16), (10, 2), (7, 1), (96, 32)])
def test_heads_are_rotated_in_parts_of_a_power_of_two(head_dim: int, size: int) -> None:
    assert part(head_dim) == size
    queries, keys = torch.randn(2, 5, 3, head_dim)
    torch.testing.assert_close(rotated(rotated(keys)), keys)
    torch.testing.assert_close((rotated(queries) * rotated(keys)).sum(-1), (queries * keys).sum(-1))
    for start in range(0, head_dim, size):
        there = slice(start, start + size)
        expected = keys[..., there].double() @ hadamard(size) / size**0.5
        torch.testing.assert_close(rotated(keys)[..., there].double(), expected, atol=1e-6, rtol=0)


def test_a_row_is_rotated_alike_whoever_is_beside_it() -> None:
    heads = torch.randn(37, 2, 48)
    for row in range(len(heads)):
        assert torch.equal(rotated(heads[row : row + 1])[0], rotated(heads)[row])


@pytest.mark.parametrize("size", [2, 8, 64])
def test_what_cancels_is_zero(size: int) -> None:
    """And no rest of a rounding, which another order of the sum would not have."""
    heads = torch.full((1, 1, size), 0.3)
    (turned,) = rotated(heads)[0]
    assert turned[0] == pytest.approx(0.3 * size**0.5)
    assert not turned[1:].any()


def test_a_channel_that_is_large_everywhere_is_spread_over_all() -> None:
    keys = torch.randn(20, 1, 64)
    keys[..., 5] += 30
    assert rotated(keys).abs().max() < 0.3 * keys.abs().max()
