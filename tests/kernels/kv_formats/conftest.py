"""What the tests of formats share: keys and values, and the sections that are made of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_formats.format import KVFormat, KVShape

# Tokens, heads, head_dim: odd counts, and dims that bytes and groups of 32 do not divide.
SHAPES = [
    (1, 1, 8),
    (3, 5, 40),
    (31, 3, 64),
    (32, 1, 72),
    (33, 2, 16),
    (56, 3, 64),
    (70, 1, 128),
]


def make_rows(
    shape: tuple[int, int, int], pages: int = 2, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Keys and values, `[pages, *shape]`. As in a model, some channels of the keys are much larger
    than the others, and lie to one side; some rows are constant, one is 0."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, pages, *shape, generator=generator)
    keys[..., ::7] = keys[..., ::7] * 4 + 9
    values[:, ::5, -1] = 0.375
    keys[0, -1, 0] = 0
    return keys.to(dtype), values.to(dtype)


def make_parts(format: KVFormat, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
    """What is stored, in the order of the page; what it should look like is checked here, once for
    all tests."""
    tokens, heads, head_dim = keys.shape[1:]
    sections = format.sections(tokens, KVShape(heads, head_dim, keys.dtype))
    parts = format.encode(keys, values)
    assert set(parts) == {section.name for section in sections}
    for section in sections:
        part = parts[section.name]
        assert (part.dtype, part.shape) == (section.dtype, (len(keys), *section.shape))
    return {section.name: parts[section.name] for section in sections}


def assert_nearest(codes: Tensor, exact: Tensor, highest: int, lowest: int = 0) -> None:
    """codes: whole numbers; exact: what they stand for, float64, in steps. A share of a step is
    left to how float32 rounds."""
    assert codes.shape == exact.shape
    error = (codes.double() - exact.clamp(lowest, highest)).abs()
    # Not `max() <= ...`: a NaN is an error too.
    assert (error <= 0.5 + 1e-4).all(), f"off by up to {float(error.max()):.3g} steps"


@pytest.fixture(params=sorted(FORMATS))
def format(request: pytest.FixtureRequest) -> KVFormat:
    return FORMATS[request.param]()


@pytest.fixture(params=SHAPES, ids=str)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    sizes: tuple[int, int, int] = request.param
    return sizes


@pytest.fixture(scope="session")
def rows() -> Callable[..., tuple[Tensor, Tensor]]:
    return make_rows


@pytest.fixture(scope="session")
def parts_of() -> Callable[[KVFormat, Tensor, Tensor], dict[str, Tensor]]:
    return make_parts


@pytest.fixture(scope="session")
def nearest() -> Callable[..., None]:
    return assert_nearest
