"""Paged attention against float64, each sequence alone against itself among others, and plans that
take each other's place."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.ops import AttentionShape, SequenceSlice
from polydelta.kernels.reference import ReferenceKernels
from polydelta.kernels.triton import attention_chunks
from polydelta.kernels.triton.attention import attend
from polydelta.kernels.triton.attention_plan import AttentionPlan, plan
from polydelta.kernels.triton.tuning import INTERPRETED

Steps = Callable[..., Any]
Near = Callable[[Tensor, Tensor, torch.dtype], None]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Weights and results are rounded to the dtype: their errors, as shares of what is summed. Triton's
# interpreter cuts off what bfloat16 does not hold.
ROUNDING = {BF16: 2.0**-7 if INTERPRETED else 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-18}


def plan_for(step: Any, device: torch.device, max_pages: int = 0) -> AttentionPlan:
    widest = max(len(sequence.pages) for sequence in step.sequences)
    dtype = step.queries.dtype
    return plan(step.shape, step.sequences, dtype, device, max(widest, max_pages, 1))


def computed(step: Any, device: torch.device, max_pages: int = 0) -> Tensor:
    made = plan_for(step, device, max_pages)
    return attend(made, step.queries.to(device), step.kv.to(device)).cpu()


def truth(step: Any) -> tuple[Tensor, Tensor]:
    """In float32, of a step without junk, and the same of the values' magnitudes."""
    reference = ReferenceKernels()
    made = reference.plan_attention(step.shape, step.sequences, FP32)
    kv = step.kv.float()
    sizes = kv.clone()
    sizes[:, 1].abs_()
    queries = step.queries.float()
    return reference.attention(made, queries, kv), reference.attention(made, queries, sizes)


def check(step: Any, device: torch.device, max_pages: int = 0) -> None:
    expected, magnitude = truth(type(step)(step.shape, step.sequences, step.queries, _tidy(step)))
    got = computed(step, device, max_pages)
    assert got.dtype == step.queries.dtype
    error = (got.float() - expected).abs()
    bound = ROUNDING[got.dtype] * (expected.abs() + magnitude) + 1e-6
    # Not `error > bound`: a NaN is an error too.
    wrong = (~(error <= bound)).flatten(1).any(1).nonzero().flatten().tolist()
    assert not wrong, f"rows {wrong} are off by up to {float((error - bound).max()):.3g}"


def _tidy(step: Any) -> Tensor:
    return step.kv.nan_to_num(0.0)


@pytest.mark.parametrize("head_dim", [10, 60, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_head_sizes_and_dtypes_one_token_and_many(
    device: torch.device, paged_step: Steps, head_dim: int, dtype: torch.dtype
) -> None:
    """What lies where no token is would be seen: it is not a number."""
    shape = AttentionShape(4, 2, head_dim, 16)
    lengths = [(1, 1), (1, 70), (7, 7), (9, 40)]
    check(paged_step(shape, lengths, dtype, junk=math.nan), device)


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(2, 2), (9, 3), (71, 1), (24, 1), (40, 2)], ids=str
)
def test_groups_of_any_size(
    device: torch.device, paged_step: Steps, heads: int, kv_heads: int
) -> None:
    shape = AttentionShape(heads, kv_heads, 32, 7, window=37)
    lengths = [(1, 5), (3, 3), (1, 40), (5, 37)]
    check(paged_step(shape, lengths, BF16, junk=math.nan), device)


@pytest.mark.parametrize("block_size", [1, 7, 16, 48])
@pytest.mark.parametrize("window", [None, 1, 63, 64, 65, 100])
def test_contexts_and_windows_at_the_borders_of_tiles_and_pages(
    device: torch.device, paged_step: Steps, block_size: int, window: int | None
) -> None:
    shape = AttentionShape(2, 1, 16, block_size, window)
    lengths = [(1, context) for context in (1, 16, 63, 64, 65, 128, 129)]
    lengths += [(min(context, 30), context) for context in (64, 65, 129)]
    check(paged_step(shape, lengths, BF16, junk=math.nan), device)


@pytest.mark.parametrize("window", [None, 255, 600])
def test_contexts_at_the_borders_of_chunks(
    device: torch.device, paged_step: Steps, window: int | None
) -> None:
    shape = AttentionShape(2, 1, 16, 16, window)
    lengths = [(1, context) for context in (255, 256, 257, 512, 513, 767, 1100)]
    check(paged_step(shape, lengths, FP32, junk=math.nan), device)


def test_more_context_than_the_most_of_the_shortest_chunks(
    device: torch.device, paged_step: Steps
) -> None:
    """32 chunks of 256 tokens would be 8192."""
    shape = AttentionShape(1, 1, 16, 16)
    check(paged_step(shape, [(1, 8192 + 65)], FP32, junk=math.nan), device)


@pytest.mark.parametrize("window", [None, 90])
def test_prefill_of_several_tiles_after_a_prefix(
    device: torch.device, paged_step: Steps, window: int | None
) -> None:
    """128 rows of a tile are 42 tokens of 3 heads, and two rows more."""
    shape = AttentionShape(6, 2, 16, 16, window)
    lengths = [(100, 100), (86, 170), (43, 43), (2, 230), (1, 99)]
    check(paged_step(shape, lengths, BF16, junk=math.nan), device)


@pytest.mark.parametrize("seed", range(6))
def test_random_steps(device: torch.device, paged_step: Steps, seed: int) -> None:
    chance = random.Random(seed)
    kv_heads, group = chance.choice([1, 2, 3]), chance.choice([1, 2, 7])
    shape = AttentionShape(
        kv_heads * group,
        kv_heads,
        head_dim=2 * chance.randint(1, 40),
        block_size=chance.choice([1, 3, 16, 32]),
        window=chance.choice([None, None, chance.randint(1, 200)]),
    )
    lengths = []
    for _ in range(chance.randint(1, 6)):
        context = chance.randint(1, 300)
        lengths.append((chance.choice([1, 1, min(60, context)]), context))
    dtype = chance.choice([BF16, FP16, FP32])
    step = paged_step(shape, lengths, dtype, seed, junk=math.nan)
    check(step, device, max_pages=chance.choice([0, 1000]))


def test_rows_without_context_are_zeros_and_touch_no_page(
    device: torch.device, paged_step: Steps
) -> None:
    step = paged_step(AttentionShape(4, 2, 16, 16), [(1, 40), (1, 300)], BF16)
    expected = computed(step, device)
    padded = [*step.sequences, SequenceSlice(2, 1, 0, ()), SequenceSlice(3, 1, 0, ())]
    queries = torch.cat((step.queries, torch.full_like(step.queries, math.nan)))
    got = computed(type(step)(step.shape, padded, queries, step.kv), device)
    assert torch.equal(got, torch.cat((expected, torch.zeros_like(expected))))


def test_queries_are_read_from_a_fused_projection(device: torch.device, paged_step: Steps) -> None:
    step = paged_step(AttentionShape(6, 2, 16, 16), [(1, 40), (7, 20)], BF16)
    fused = torch.randn(8, 10, 16).bfloat16()
    fused[:, 1:7] = step.queries
    check(type(step)(step.shape, step.sequences, fused[:, 1:7], step.kv), device)


def test_large_scores_leave_one_key_and_no_infinities(
    device: torch.device, paged_step: Steps, near: Near
) -> None:
    step = paged_step(AttentionShape(2, 1, 64, 16), [(1, 300), (40, 90)], BF16)
    step.queries.mul_(3000.0)
    near(computed(step, device), truth(step)[0], BF16)


def part(step: Any, chosen: Sequence[int]) -> Any:
    """The same step with some of its sequences, in that order."""
    sequences, rows, start = [], [], 0
    for index in chosen:
        s = step.sequences[index]
        sequences.append(SequenceSlice(start, s.length, s.context, s.pages))
        rows.append(step.queries[s.start : s.start + s.length])
        start += s.length
    return type(step)(step.shape, sequences, torch.cat(rows), step.kv)


def test_a_sequence_gets_the_same_bits_whoever_shares_its_batch(
    device: torch.device, paged_step: Steps
) -> None:
    step = paged_step(AttentionShape(2, 1, 16, 16), [(1, 700), (9, 60), (1, 3), (40, 40)], BF16)
    together = computed(step, device)
    for index, s in enumerate(step.sequences):
        alone = computed(part(step, [index]), device)
        assert torch.equal(alone, together[s.start : s.start + s.length])
    backwards = computed(part(step, [2, 0]), device)
    assert torch.equal(backwards, together[[10, 0]])


@pytest.mark.parametrize("window", [None, 800])
def test_however_many_programs_share_the_chunks_the_bits_are_the_same(
    device: torch.device,
    paged_step: Steps,
    monkeypatch: pytest.MonkeyPatch,
    window: int | None,
) -> None:
    """As many as chunks where rows are few, a single one where they are many."""
    shape = AttentionShape(4, 2, 16, 16, window)
    step = paged_step(shape, [(1, 1500), (1, 300), (1, 256)], BF16)
    expected = computed(step, device)
    for spare in (0, 2, 10):
        monkeypatch.setattr(attention_chunks, "SPARE_PROGRAMS", spare)
        assert torch.equal(computed(step, device), expected)


def test_a_prompt_gets_the_same_bits_in_pieces(device: torch.device, paged_step: Steps) -> None:
    """So a prefix from the cache changes nothing."""
    step = paged_step(AttentionShape(6, 2, 16, 16), [(150, 150)], BF16)
    (whole,) = step.sequences
    parts, start = [], 0
    for length in (100, 2, 48):
        sequence = SequenceSlice(0, length, start + length, whole.pages)
        queries = step.queries[start : start + length]
        parts.append(computed(type(step)(step.shape, [sequence], queries, step.kv), device))
        start += length
    assert torch.equal(torch.cat(parts), computed(step, device))


def test_a_plan_takes_the_place_of_another_for_as_many_sequences(
    device: torch.device, paged_step: Steps
) -> None:
    """With longer contexts, and with fewer sequences where the rest is padding."""
    shape = AttentionShape(4, 2, 16, 16, window=290)
    short = paged_step(shape, [(1, 1), (1, 17), (1, 30)], BF16)
    long = paged_step(shape, [(1, 600), (1, 2)], BF16, seed=1)
    sequences = [*long.sequences, SequenceSlice(2, 1, 0, ())]
    queries = torch.cat((long.queries, long.queries[:1]))
    long = type(long)(shape, sequences, queries, long.kv)
    recorded, fresh = plan_for(short, device, 50), plan_for(long, device, 50)
    assert recorded.recordable
    assert fresh.recordable
    recorded.assume(fresh)
    got = attend(recorded, long.queries.to(device), long.kv.to(device)).cpu()
    assert torch.equal(got, computed(long, device))


def test_a_plan_for_other_sequences_does_not_take_its_place(
    device: torch.device, paged_step: Steps
) -> None:
    shape = AttentionShape(4, 2, 16, 16)
    two, three, mixed = (
        plan_for(paged_step(shape, lengths, BF16), device, 10)
        for lengths in ([(1, 5)] * 2, [(1, 5)] * 3, [(1, 5), (2, 5)])
    )
    assert not mixed.recordable
    for other in (three, mixed):
        with pytest.raises(ValueError, match="as many sequences"):
            two.assume(other)


def test_more_pages_than_a_plan_has_room_for_are_refused(
    device: torch.device, paged_step: Steps
) -> None:
    step = paged_step(AttentionShape(4, 2, 16, 16), [(1, 3), (1, 33)], BF16)
    with pytest.raises(ValueError, match="33 tokens do not fit 2 pages"):
        plan(step.shape, step.sequences, BF16, device, 2)
