from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.foreign.truncated_svd import SvdOptions, left_singular_vectors

# Of weights of this shape, `TruncatedSVD(rank, n_iter=n_iter, random_state=42).fit(weight.T)
# .components_.T` of scikit-learn 1.4.2: its first rows, and the sums of its columns.
SCIKIT_LEARN = {
    "wide, unsettled": (
        (20, 31),
        SvdOptions(n_iter=1),
        [[-0.09016, 0.24679, 0.2017], [-0.30034, 0.15744, 0.0652], [0.48205, -0.06538, 0.06598]],
        [0.19748, -0.23213, -0.6214],
    ),
    "tall, unsettled": (
        (31, 20),
        SvdOptions(n_iter=1),
        [[0.42909, 0.06206, 0.02097], [-0.09578, 0.32285, 0.0018], [0.06018, 0.31306, 0.11306]],
        [-1.12946, 0.17203, 1.05344],
    ),
    "small": (
        (7, 5),
        SvdOptions(),
        [[0.43111, -0.27781], [0.31533, -0.54812], [-0.45569, -0.25813]],
        [0.95167, 0.23686],
    ),
}


def weight_of(shape: tuple[int, int]) -> Tensor:
    numbers = np.sin(np.arange(shape[0] * shape[1], dtype=np.float64) ** 1.5)
    return torch.from_numpy(numbers).reshape(shape).float()


@pytest.mark.parametrize(
    ("shape", "options", "rows", "sums"), SCIKIT_LEARN.values(), ids=SCIKIT_LEARN.keys()
)
def test_vectors_and_their_signs_are_those_of_scikit_learn(
    shape: tuple[int, int], options: SvdOptions, rows: list[list[float]], sums: list[float]
) -> None:
    vectors = left_singular_vectors(weight_of(shape), len(rows[0]), options)
    assert vectors.shape == (shape[0], len(rows[0]))
    torch.testing.assert_close(vectors[:3], torch.tensor(rows), atol=3e-5, rtol=0)
    torch.testing.assert_close(vectors.sum(0), torch.tensor(sums), atol=6e-5, rtol=0)


def test_an_unsettled_estimate_is_not_the_exact_decomposition() -> None:
    weight = weight_of((31, 20))
    exact = torch.linalg.svd(weight).U[:, :3].abs()
    estimate = left_singular_vectors(weight, 3, SvdOptions(n_iter=1)).abs()
    assert (exact - estimate).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_all_vectors_can_be_asked_for(shape: tuple[int, int]) -> None:
    weight = weight_of(shape)
    rank = min(shape)
    vectors = left_singular_vectors(weight, rank, SvdOptions())
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(vectors @ vectors.T @ weight, weight, atol=1e-5, rtol=1e-5)


def test_another_seed_gives_other_vectors_where_they_are_unsettled() -> None:
    weight = weight_of((31, 20))
    first, second = (
        left_singular_vectors(weight, 3, SvdOptions(n_iter=0, random_state=seed)) for seed in (1, 2)
    )
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize(
    "svd", [{"n_iter": -1}, {"n_iter": 10**9}, {"n_iter": 1.5}, {"n_iter": True},
            {"random_state": -1}, {"random_state": 1 << 32}, {"random_state": None}],
)  # fmt: skip
def test_options_that_are_no_whole_numbers_in_range_are_refused_by_name(
    svd: dict[str, Any],
) -> None:
    (field,) = svd
    with pytest.raises(InvalidAdapterError, match=f"{field} of svd is .* whole number from 0 to"):
        SvdOptions.of(svd)
