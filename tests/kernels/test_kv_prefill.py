"""Prompts that read blocks of their context: the choice and the attention, against their definition
in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_prefill import block_mask
from polydelta.kernels.kv_selection import FULL, Selection, XAttention
from polydelta.kernels.ops import SequenceSlice

Trial = Callable[..., Any]
Near = Callable[[Tensor, Tensor, torch.dtype], None]

BLOCK = 128


def scores_of(queries: Tensor, keys: Tensor, stride: int) -> Tensor:
    """The definition, of one head: what each block of keys gets from each block of queries.
    queries, keys: `[n, head_dim]` -> `[blocks, blocks]`."""
    count, missing = len(queries), -len(queries) % stride
    products = torch.nn.functional.pad(queries @ keys.T, (0, missing, 0, missing))
    scores = torch.zeros(-(-count // BLOCK), -(-count // BLOCK), dtype=torch.float64)
    for first in range(0, count, stride):
        rows = products[first : first + stride].flip(0)
        others = range(0, first + 1, stride)
        sums = [float(rows[:, other : other + stride].trace()) for other in others]
        means = torch.tensor(sums, dtype=torch.float64) / min(stride, count - first)
        shares = (means / math.sqrt(queries.shape[1])).softmax(0)
        for other, share in zip(others, shares, strict=True):
            scores[first // BLOCK, other // BLOCK] += share
    return scores


def chosen(scores: Tensor, threshold: float) -> Tensor:
    """Which blocks of keys each block of queries reads, by the definition."""
    wanted = torch.zeros_like(scores, dtype=torch.bool)
    for own, row in enumerate(scores.tolist()):
        reached = {0, own}
        rest = sorted(set(range(own + 1)) - reached, key=lambda block: (-row[block], block))
        for block in rest:
            if sum(row[each] for each in reached) >= threshold * sum(row):
                break
            reached.add(block)
        wanted[own, list(reached)] = True
    return wanted


def wanted_blocks(trial: Any, number: int, selection: XAttention) -> Tensor:
    """`[heads, blocks, blocks]`"""
    queries = trial.queries[number].double()
    keys, _ = trial.stored(number, len(queries) - 1)
    shape = trial.kind.shape
    group = shape.num_heads // shape.num_kv_heads
    return torch.stack(
        [
            chosen(
                scores_of(queries[:, head], keys[:, head // group], selection.stride),
                selection.threshold,
            )
            for head in range(shape.num_heads)
        ]
    )


def attended(trial: Any, number: int, wanted: Tensor) -> Tensor:
    """`[length, heads, head_dim]`, of queries that read these blocks."""
    queries = trial.queries[number].double()
    length = len(queries)
    keys, values = trial.stored(number, length - 1)
    group = trial.kind.shape.num_heads // trial.kind.shape.num_kv_heads
    reads = wanted.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :length, :length]
    reads = reads & torch.ones(length, length, dtype=torch.bool).tril()
    keys, values = (each.repeat_interleave(group, 1).transpose(0, 1) for each in (keys, values))
    scores = queries.transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(queries.shape[2])
    return (scores.masked_fill(~reads, -math.inf).softmax(-1) @ values).transpose(0, 1)


def run(trial: Any, number: int, selection: Selection, ends: Sequence[int]) -> Tensor:
    outs, first = [], 0
    for last in ends:
        outs += trial.step([(number, first, last, selection)])
        first = last
    return torch.cat(outs)


def mask_of(trial: Any, number: int, selection: XAttention, first: int, last: int) -> Tensor:
    part = SequenceSlice(0, last - first, last, trial.pages[number], selection)
    load = partial(trial.attention.load, trial.memory, part)
    queries = trial.queries[number][first:last]
    return block_mask(selection, trial.kind.shape, part, queries, load)


@pytest.mark.parametrize("format", ["native", "int8"])
@pytest.mark.parametrize(
    ("stride", "threshold", "length"),
    [(8, 0.9, 1300), (16, 0.5, 640), (128, 0.7, 1027), (4, 0.01, 520)],
)
def test_queries_read_the_fewest_blocks_that_reach_the_threshold(
    kv_trial: Trial, near: Near, format: str, stride: int, threshold: float, length: int
) -> None:
    selection = XAttention(stride, threshold)
    trial = sharp(kv_trial(format, [length], heads=3, kv_heads=1, head_dim=8, page_tokens=7))
    out = run(trial, 0, selection, [length])
    wanted = wanted_blocks(trial, 0, selection)
    causal = torch.ones_like(wanted[0]).tril().expand_as(wanted)
    assert threshold == 0.01 or not torch.equal(wanted, wanted[:1].expand_as(wanted))
    assert not torch.equal(wanted, causal)
    assert torch.equal(mask_of(trial, 0, selection, 0, length), wanted)
    near(out, attended(trial, 0, wanted), torch.float64)


def sharp(trial: Any, factor: float = 2.0) -> Any:
    """Queries that look for something: the attention of random ones is everywhere alike."""
    for queries in trial.queries:
        queries *= factor
    return trial


@pytest.mark.parametrize("length", [1, 5, 127, 128, 129, 255, 387, 513, 516, 520])
def test_prompts_may_end_anywhere_in_a_block(kv_trial: Trial, near: Near, length: int) -> None:
    selection = XAttention(8, 0.6)
    trial = sharp(kv_trial("native", [length], heads=4, kv_heads=2, head_dim=8))
    out = run(trial, 0, selection, [length])
    wanted = wanted_blocks(trial, 0, selection)
    assert torch.equal(mask_of(trial, 0, selection, 0, length), wanted)
    near(out, attended(trial, 0, wanted), torch.float64)


@pytest.mark.parametrize("ends", [[128, 256, 512, 700], [384, 700], [640, 700]], ids=str)
@pytest.mark.parametrize("format", ["native", "int8"])
def test_how_a_prompt_is_cut_does_not_matter(
    kv_trial: Trial, near: Near, format: str, ends: list[int]
) -> None:
    selection = XAttention(16, 0.7)
    trial = sharp(kv_trial(format, [700], heads=2, kv_heads=2, head_dim=8))
    whole = run(trial, 0, selection, [700])
    mask = mask_of(trial, 0, selection, 0, 700)
    near(run(trial, 0, selection, ends), whole, torch.float64)
    for first, last in zip([0, *ends], ends, strict=False):
        rows = mask[:, first // BLOCK : -(-last // BLOCK), : -(-last // BLOCK)]
        assert torch.equal(mask_of(trial, 0, selection, first, last), rows)


@pytest.mark.parametrize("format", ["native", "int8"])
def test_a_threshold_of_one_is_full_attention(kv_trial: Trial, near: Near, format: str) -> None:
    trial = kv_trial(format, [450], heads=4, kv_heads=2, head_dim=16)
    # So sharp that most blocks get nothing that can be told from 0.
    sharp(trial, 300.0)
    full = run(trial, 0, FULL, [128, 450])
    near(run(trial, 0, XAttention(8, 1.0), [128, 450]), full, torch.float64)
    assert mask_of(trial, 0, XAttention(8, 1.0), 128, 450).sum() == 4 * (2 + 3 + 4)


def test_block_zero_and_the_queries_own_are_read_in_any_case(kv_trial: Trial) -> None:
    trial = sharp(kv_trial("native", [900], heads=2, kv_heads=1, head_dim=8), 50.0)
    run(trial, 0, FULL, [900])
    mask = mask_of(trial, 0, XAttention(8, 1e-9), 256, 900)
    only = torch.zeros(6, 8, dtype=torch.bool)
    only[:, 0] = True
    only[range(6), range(2, 8)] = True
    assert torch.equal(mask, only.expand(2, -1, -1))


def test_other_slices_of_a_step_read_as_they_say(kv_trial: Trial, near: Near) -> None:
    selection = XAttention(32, 0.5)
    lengths = [300, 40, 260]
    trial = sharp(kv_trial("native", lengths, heads=4, kv_heads=2, head_dim=8))
    trial.step([(number, 0, first, FULL) for number, first in ((1, 39), (0, 256), (2, 128))])
    outs = trial.step([(0, 256, 300, selection), (1, 39, 40, FULL), (2, 128, 260, selection)])
    for number, first, out in ((0, 256, outs[0]), (2, 128, outs[2])):
        wanted = wanted_blocks(trial, number, selection)
        near(out, attended(trial, number, wanted)[first:], torch.float64)
    full = torch.ones(4, 1, 1, dtype=torch.bool)
    near(outs[1], attended(trial, 1, full)[39:], torch.float64)


def test_a_layer_with_a_window_reads_its_window(kv_trial: Trial, near: Near) -> None:
    trial = kv_trial("native", [300], window=50)
    full = run(trial, 0, FULL, [300])
    near(run(trial, 0, XAttention(8, 0.1), [300]), full, torch.float64)


def test_a_prompt_that_goes_on_inside_of_a_block_is_refused(kv_trial: Trial) -> None:
    trial = kv_trial("native", [300])
    trial.step([(0, 0, 130, FULL)])
    with pytest.raises(ValueError, match="cannot begin at position 130"):
        trial.step([(0, 130, 300, XAttention())])
