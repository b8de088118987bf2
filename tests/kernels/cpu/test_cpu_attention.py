"""Paged attention on a CPU against the reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu import attention
from polydelta.kernels.cpu.choice import cpu_kernels
from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.ops import AttentionShape
from polydelta.kernels.reference import ReferenceKernels

Steps = Callable[..., Any]
Near = Callable[[Tensor, Tensor, torch.dtype], None]

# The last are our own where the machine has what they need.
KERNELS = pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        (CpuKernels(), torch.float32),
        (CpuKernels(), torch.bfloat16),
        (cpu_kernels(torch.bfloat16), torch.bfloat16),
    ],
    ids=["float32", "bfloat16", "chosen"],
)


def attend(step: Any, kernels: CpuKernels) -> Tensor:
    plan = kernels.plan_attention(step.shape, step.sequences, step.queries.dtype)
    return kernels.attention(plan, step.queries, step.kv)


def truth(step: Any) -> Tensor:
    """The reference in float32 on the same, possibly rounded, numbers."""
    kernels = ReferenceKernels()
    plan = kernels.plan_attention(step.shape, step.sequences, torch.float32)
    return kernels.attention(plan, step.queries.float(), step.kv.float())


@KERNELS
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 5, 16])
def test_mixed_steps_agree_with_the_reference(
    paged_step: Steps,
    near: Near,
    kernels: CpuKernels,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    window: int | None,
) -> None:
    """Decodes, whole prompts, chunks with and without context, in any order."""
    shape = AttentionShape(heads, kv_heads, head_dim=16, block_size=16, window=window)
    lengths = [(1, 1), (7, 7), (1, 40), (5, 37), (33, 33), (1, 16), (2, 17), (1, 131), (16, 48)]
    step = paged_step(shape, lengths, dtype)
    near(attend(step, kernels), truth(step), dtype)


@KERNELS
@pytest.mark.parametrize("seed", range(12))
def test_random_odd_shapes_agree_with_the_reference(
    paged_step: Steps, near: Near, kernels: CpuKernels, dtype: torch.dtype, seed: int
) -> None:
    chance = random.Random(seed)
    kv_heads, group = chance.choice([1, 2, 3]), chance.choice([1, 3, 4])
    shape = AttentionShape(
        kv_heads * group,
        kv_heads,
        head_dim=chance.choice([8, 10, 64]),
        block_size=chance.choice([1, 3, 16]),
        window=chance.choice([None, 1, 7, 50]),
    )
    lengths = []
    for _ in range(chance.randint(1, 9)):
        context = chance.randint(1, 90)
        lengths.append((chance.choice([1, 1, context, chance.randint(1, context)]), context))
    step = paged_step(shape, lengths, dtype, seed)
    near(attend(step, kernels), truth(step), dtype)


@KERNELS
@pytest.mark.parametrize("window", [None, 20])
def test_decodes_of_very_different_lengths_agree_with_the_reference(
    paged_step: Steps, near: Near, kernels: CpuKernels, dtype: torch.dtype, window: int | None
) -> None:
    shape = AttentionShape(6, 2, head_dim=8, block_size=16, window=window)
    contexts = [700, 1, 129, 64, 3, 128, 300, 65, 16, 17]
    step = paged_step(shape, [(1, context) for context in contexts], dtype)
    near(attend(step, kernels), truth(step), dtype)


def test_decodes_are_grouped_so_that_padding_never_doubles_the_work(paged_step: Steps) -> None:
    shape = AttentionShape(2, 1, head_dim=8, block_size=16)
    step = paged_step(shape, [(1, c) for c in (700, 1, 129, 64, 3, 128, 300, 65)], torch.float32)
    plan = attention.plan(shape, step.sequences, torch.float32)
    contexts = [s.context for s in step.sequences]
    groups = [sorted(contexts[row] for row in group.rows.tolist()) for group in plan.decode]
    assert sorted(c for group in groups for c in group) == sorted(contexts)
    for group in groups:
        assert group[-1] <= 2 * max(group[0], 64)


@KERNELS
def test_one_sequence_alone_agrees_with_the_reference(
    paged_step: Steps, near: Near, kernels: CpuKernels, dtype: torch.dtype
) -> None:
    shape = AttentionShape(3, 3, head_dim=8, block_size=4)
    for lengths in [(1, 1)], [(1, 9)], [(9, 9)], [(4, 9)]:
        step = paged_step(shape, lengths, dtype)
        near(attend(step, kernels), truth(step), dtype)


@KERNELS
def test_a_row_does_not_depend_on_who_shares_the_step(
    paged_step: Steps, near: Near, kernels: CpuKernels, dtype: torch.dtype
) -> None:
    shape = AttentionShape(6, 2, head_dim=8, block_size=4)
    step = paged_step(shape, [(1, 5), (6, 20), (1, 70), (1, 30), (9, 9)], dtype)
    together = attend(step, kernels)
    for one in step.sequences:
        rows = slice(one.start, one.start + one.length)
        alone = type(step)(
            shape, [type(one)(0, one.length, one.context, one.pages)], step.queries[rows], step.kv
        )
        near(together[rows], attend(alone, kernels), dtype)


@KERNELS
@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("window", [None, 6])
def test_whatever_lies_where_no_token_is_changes_nothing(
    paged_step: Steps,
    near: Near,
    kernels: CpuKernels,
    dtype: torch.dtype,
    junk: float,
    window: int | None,
) -> None:
    """Pages come from adapters too: their bytes, read as numbers, may be NaN or infinite."""
    shape = AttentionShape(6, 2, head_dim=8, block_size=4, window=window)
    lengths = [(1, 5), (6, 21), (1, 70), (1, 30), (9, 9), (1, 1)]
    step = paged_step(shape, lengths, dtype, junk=junk)
    near(attend(step, kernels), truth(step), dtype)


@KERNELS
def test_keys_and_values_beyond_the_context_of_a_table_that_has_grown_are_not_read(
    paged_step: Steps, near: Near, kernels: CpuKernels, dtype: torch.dtype
) -> None:
    shape = AttentionShape(4, 2, head_dim=8, block_size=4)
    step = paged_step(shape, [(1, 5), (3, 7), (4, 4)], dtype)
    spare = len(step.kv) - 1
    longer = [type(s)(s.start, s.length, s.context, [*s.pages, spare]) for s in step.sequences]
    grown = type(step)(shape, longer, step.queries, step.kv)
    near(attend(grown, kernels), truth(step), dtype)
