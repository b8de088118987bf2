"""What the kernels' tests share: random steps over paged KV, and how near is near enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from polydelta.kernels.ops import AttentionShape, SequenceSlice

# Largest error allowed, as a share of the largest value. A wrong row is wrong by about 1.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, eq=False)
class PagedStep:
    """One step's attention: what each sequence asks, and the pool that it reads."""

    shape: AttentionShape
    sequences: Sequence[SequenceSlice]
    # [tokens, heads, head_dim]
    queries: Tensor
    # [pages, 2, block_size, kv_heads, head_dim]
    kv: Tensor


def make_paged_step(
    shape: AttentionShape,
    lengths: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    seed: int = 0,
    junk: float | None = None,
) -> PagedStep:
    """lengths: (queries, context) of each sequence. Their pages are scattered over a pool that has
    more; where no sequence has a token there is `junk`, or something as plausible as the rest."""
    generator = torch.Generator().manual_seed(seed)
    size = shape.block_size
    counts = [-(-context // size) for _, context in lengths]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=generator).tolist()
    kv = torch.randn(
        num_pages, 2, size, shape.num_kv_heads, shape.head_dim, generator=generator
    ).to(dtype)
    held = torch.zeros(num_pages, size, dtype=torch.bool)
    sequences, start = [], 0
    for (length, context), count in zip(lengths, counts, strict=True):
        pages, order = order[:count], order[count:]
        sequences.append(SequenceSlice(start, length, context, pages))
        start += length
        for position in range(context):
            held[pages[position // size], position % size] = True
    if junk is not None:
        kv.transpose(1, 2)[~held] = junk
    queries = torch.randn(start, shape.num_heads, shape.head_dim, generator=generator).to(dtype)
    return PagedStep(shape, sequences, queries, kv)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Same shape, and no value off by more than the dtype's share of the largest one."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs()
    # Not `max() <= ...`: a NaN is an error too.
    wrong = ~(error <= TOLERANCE[dtype] * max(1e-3, float(expected.double().abs().max())))
    rows = wrong.flatten(1).any(1).nonzero().flatten().tolist() if wrong.dim() > 1 else []
    assert not wrong.any(), f"rows {rows} are off by up to {float(error.max()):.3g}"


@pytest.fixture(scope="session")
def paged_step() -> Callable[..., PagedStep]:
    return make_paged_step


@pytest.fixture(scope="session")
def near() -> Callable[[Tensor, Tensor, torch.dtype], None]:
    return assert_near
