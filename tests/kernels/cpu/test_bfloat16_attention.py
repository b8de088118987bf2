"""Our own paged attention against float64, and each query alone against itself among others."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels, NativePlan
from polydelta.kernels.ops import AttentionShape, SequenceSlice
from polydelta.kernels.reference import visible

Steps = Callable[..., Any]
WithThreads = Callable[[int], Bfloat16Kernels]

BF16 = torch.bfloat16
# Around the borders of tiles of 32 keys, and of four of them.
CONTEXTS = (1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 161)


def attend(kernels: Bfloat16Kernels, step: Any) -> Tensor:
    plan = kernels.plan_attention(step.shape, step.sequences, BF16)
    assert isinstance(plan, NativePlan)
    return kernels.attention(plan, step.queries, step.kv).clone()


def truth(step: Any) -> tuple[Tensor, Tensor]:
    """In float64, and the same of the values' magnitudes."""
    shape: AttentionShape = step.shape
    group = shape.num_heads // shape.num_kv_heads
    parts = []
    for s in step.sequences:
        pages = torch.tensor(s.pages)
        # [2, kv_heads, context, head_dim]
        kv = step.kv[pages].permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, : s.context].double()
        keys, values = kv.repeat_interleave(group, 1)
        queries = step.queries[s.start : s.start + s.length].double().transpose(0, 1)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(shape.head_dim)
        seen = visible(s, shape.window, torch.device("cpu"))
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        parts.append(torch.stack((weights @ values, weights @ values.abs())).transpose(1, 2))
    expected, magnitude = torch.cat(parts, 1)
    return expected, magnitude


def check(kernels: Bfloat16Kernels, step: Any) -> None:
    """Weights are rounded to bfloat16, and so is the result; scores and sums are float32."""
    expected, magnitude = truth(step)
    error = (attend(kernels, step).double() - expected).abs()
    bound = 2.0**-8 * (expected.abs() + magnitude) + 1e-6
    # Not `error > bound`: a NaN is an error too.
    wrong = (~(error <= bound)).flatten(1).any(1).nonzero().flatten().tolist()
    assert not wrong, f"rows {wrong} are off by up to {float((error - bound).max()):.3g}"


@pytest.mark.parametrize("head_dim", [2, 16, 30, 64, 80, 96, 128, 256])
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(2, 2), (9, 3), (70, 1), (6, 1)], ids=["1", "3", "70", "6"]
)
@pytest.mark.parametrize(("block_size", "window"), [(16, None), (7, 37)])
def test_head_dims_and_groups(
    ours: Bfloat16Kernels,
    paged_step: Steps,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    window: int | None,
) -> None:
    """What lies where no token is would be seen: it is not a number."""
    shape = AttentionShape(heads, kv_heads, head_dim, block_size, window)
    lengths = [(1, 1), (7, 7), (1, 40), (5, 37), (33, 33), (1, 16), (2, 130), (1, 131), (16, 48)]
    check(ours, paged_step(shape, lengths, BF16, junk=math.nan))


@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 48])
@pytest.mark.parametrize("window", [None, 1, 5, 32, 33, 100])
def test_contexts_at_the_borders_of_tiles_and_pages(
    ours: Bfloat16Kernels, paged_step: Steps, block_size: int, window: int | None
) -> None:
    shape = AttentionShape(4, 2, 16, block_size, window)
    lengths = [(1, context) for context in CONTEXTS]
    lengths += [(min(context, 30), context) for context in CONTEXTS]
    lengths += [(c, c) for page in (1, 2, 5) for c in (page * block_size, page * block_size + 1)]
    check(ours, paged_step(shape, lengths, BF16, junk=math.nan))


@pytest.mark.parametrize("seed", range(20))
def test_random_steps(with_threads: WithThreads, paged_step: Steps, seed: int) -> None:
    chance = random.Random(seed)
    kv_heads, group = chance.choice([1, 2, 5]), chance.choice([1, 2, 7, 20])
    shape = AttentionShape(
        kv_heads * group,
        kv_heads,
        head_dim=2 * chance.randint(1, 70),
        block_size=chance.choice([1, 3, 16, 32]),
        window=chance.choice([None, None, chance.randint(1, 200)]),
    )
    lengths = []
    for _ in range(chance.randint(1, 12)):
        context = chance.randint(1, 300)
        lengths.append((chance.choice([1, 1, context, chance.randint(1, context)]), context))
    step = paged_step(shape, lengths, BF16, seed, junk=math.nan)
    check(with_threads(chance.randint(1, 3)), step)


@pytest.mark.parametrize("size", [20.0, 300.0, 3000.0])
def test_large_scores_leave_one_key_and_no_infinities(
    ours: Bfloat16Kernels, paged_step: Steps, size: float
) -> None:
    shape = AttentionShape(4, 2, 64, 16)
    step = paged_step(shape, [(1, 700), (40, 90), (1, 33)], BF16)
    step.queries.mul_(size)
    expected, magnitude = truth(step)
    error = (attend(ours, step).double() - expected).abs()
    # A score of some thousands is off by some 1e-4 in float32, and so is the logarithm of a weight.
    assert bool((error <= 2.0**-8 * (expected.abs() + magnitude) + 1e-6 * size).all())


def test_a_sequence_of_many_pages(ours: Bfloat16Kernels, paged_step: Steps) -> None:
    shape = AttentionShape(6, 2, 64, 16)
    check(ours, paged_step(shape, [(1, 3000), (3, 2501)], BF16, junk=math.nan))


def test_queries_are_read_from_a_fused_projection(ours: Bfloat16Kernels, paged_step: Steps) -> None:
    step = paged_step(AttentionShape(6, 2, 16, 16), [(1, 40), (7, 20)], BF16)
    fused = torch.randn(8, 10, 16).bfloat16()
    fused[:, 1:7] = step.queries
    check(ours, type(step)(step.shape, step.sequences, fused[:, 1:7], step.kv))


@pytest.mark.parametrize(("head_dim", "dtype"), [(15, BF16), (258, BF16), (16, torch.float32)])
def test_what_ours_do_not_take_is_left_to_torch(
    ours: Bfloat16Kernels, paged_step: Steps, head_dim: int, dtype: torch.dtype
) -> None:
    step = paged_step(AttentionShape(4, 2, head_dim, 16), [(1, 40), (7, 20)], dtype)
    plan = ours.plan_attention(step.shape, step.sequences, dtype)
    assert not isinstance(plan, NativePlan)
    got = ours.attention(plan, step.queries, step.kv)
    torch.testing.assert_close(got.double(), truth(step)[0], rtol=2e-2, atol=2e-2)


def one_by_one(kernels: Bfloat16Kernels, step: Any, lengths: Sequence[int]) -> Tensor:
    """Of a step with one sequence: as many queries at a time, the last ones of the context."""
    (whole,) = step.sequences
    parts, start = [], 0
    for length in lengths:
        context = whole.context - whole.length + start + length
        chunk = SequenceSlice(0, length, context, whole.pages)
        queries = step.queries[start : start + length]
        parts.append(attend(kernels, type(step)(step.shape, [chunk], queries, step.kv)))
        start += length
    assert start == whole.length
    return torch.cat(parts)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 30), (70, 1, 16)])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("block_size", [7, 16])
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(
    ours: Bfloat16Kernels,
    paged_step: Steps,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    block_size: int,
) -> None:
    shape = AttentionShape(heads, kv_heads, head_dim, block_size, window)
    step = paged_step(shape, [(100, 150)], BF16, junk=math.nan)
    whole = attend(ours, step)
    for lengths in [1] * 100, [5, 17, 3, 70, 5], [64, 36], [31, 32, 33, 4]:
        assert torch.equal(one_by_one(ours, step, lengths), whole)


@pytest.mark.parametrize("window", [None, 20])
def test_a_query_has_the_same_bits_alone_and_among_others(
    with_threads: WithThreads, paged_step: Steps, window: int | None
) -> None:
    """Alone, an item is one key head; with few threads and many sequences it is all of them."""
    shape = AttentionShape(12, 4, 32, 16, window)
    lengths = [(1, 5), (6, 20), (1, 70), (1, 300), (40, 99), (1, 64), (1, 33), (1, 1), (2, 150)]
    step = paged_step(shape, lengths, BF16, junk=math.nan)
    together = [attend(with_threads(threads), step) for threads in (1, 2, 3, 5)]
    for other in together[1:]:
        assert torch.equal(other, together[0])
    for one in step.sequences:
        rows = slice(one.start, one.start + one.length)
        moved = SequenceSlice(0, one.length, one.context, one.pages)
        alone = type(step)(shape, [moved], step.queries[rows], step.kv)
        assert torch.equal(attend(with_threads(2), alone), together[0][rows])


def test_the_order_of_the_sequences_changes_no_bit(
    ours: Bfloat16Kernels, paged_step: Steps
) -> None:
    step = paged_step(AttentionShape(6, 2, 32, 16), [(1, c) for c in CONTEXTS], BF16)
    got = attend(ours, step)
    backwards = type(step)(step.shape, step.sequences[::-1], step.queries, step.kv)
    assert torch.equal(attend(ours, backwards), got)
