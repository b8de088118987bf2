"""A recorded step gives what computing it anew gives, bit for bit, whatever happens in between."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.delta_groups import DeltaSegment, SiteDeltas
from polydelta.kernels.delta_weights import (
    KroneckerWeights,
    LowRankBlock,
    LowRankWeights,
    ScaleWeights,
)
from polydelta.kernels.ops import AttentionShape, SequenceSlice

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, PAGES = 60, 6, 2, 10, 4, 40
VOCABULARY, QKV = 50, (HEADS + 2 * KV_HEADS) * HEAD_DIM
SHAPE = AttentionShape(HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, 9)


def bf(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


class Model:
    """Every operation of a decoder layer."""

    def __init__(self, kernels: Bfloat16Kernels) -> None:
        self.kernels = kernels
        self.table, self.cos, self.sin = bf(VOCABULARY, HIDDEN), bf(99, HEAD_DIM), bf(99, HEAD_DIM)
        self.gain, self.head_gain = bf(HIDDEN), bf(HEAD_DIM)
        self.qkv = kernels.linear(bf(QKV, HIDDEN) / 8, bf(QKV))
        self.out = kernels.linear(bf(HIDDEN, HEADS * HEAD_DIM) / 8, None)
        self.gate_up = kernels.linear(bf(2 * 46, HIDDEN) / 8, None)
        self.down = kernels.linear(bf(HIDDEN, 46) / 8, None)
        self.head = kernels.head(self.table)
        self.kv = bf(PAGES, 2, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        self.adapters = [
            kernels.bind_sites([_low_rank(kernels, rank, QKV), _low_rank(kernels, rank, HIDDEN)])
            for rank in (1, 3, 20)
        ]

    def step(self, inputs: Sequence[Any]) -> Tensor:
        """inputs: tokens, positions, slots, a plan, a group."""
        tokens, positions, slots, plan, group = inputs
        kernels, gather = self.kernels, self.kernels.gather
        hidden = gather(self.table, tokens)
        cos, sin = gather(self.cos, positions), gather(self.sin, positions)
        for _ in range(2):
            qkv = group.multiply(0, self.qkv, kernels.rms_norm(hidden, self.gain, 1e-5))
            heads = qkv.unflatten(-1, (-1, HEAD_DIM))
            queries, keys, values = heads.split((HEADS, KV_HEADS, KV_HEADS), 1)
            queries = kernels.rotate(kernels.rms_norm(queries, self.head_gain, 1e-5), cos, sin)
            keys = kernels.rotate(keys, cos, sin)
            kernels.store_kv(self.kv, keys, values, slots)
            mixed = kernels.attention(plan, queries, self.kv).view(len(tokens), -1)
            hidden = kernels.add(group.multiply(1, self.out, mixed), hidden)
            hidden = kernels.add(self.down(kernels.silu_mul(self.gate_up(hidden))), hidden)
        return self.head(hidden)

    def inputs(self, rows: int, adapters: Sequence[Any] | None = None) -> list[Any]:
        """Random ones; adapters: of one row each, the first rows."""
        contexts = torch.randint(1, 14, (rows,)).tolist()
        pages = torch.randperm(PAGES).tolist()
        slices, slots = [], []
        for row, context in enumerate(contexts):
            own, pages = pages[: -(-context // BLOCK_SIZE)], pages[-(-context // BLOCK_SIZE) :]
            slices.append(SequenceSlice(row, 1, context, own))
            slots.append(own[-1] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE)
        if adapters is None:
            adapters = [self.adapters[int(n)] for n in torch.randint(0, 3, (max(1, rows - 1),))]
        segments = [DeltaSegment(row, row + 1, sites) for row, sites in enumerate(adapters)]
        return [
            torch.randint(0, VOCABULARY, (rows,)),
            torch.tensor(contexts),
            torch.tensor(slots),
            self.kernels.plan_attention(SHAPE, slices, torch.bfloat16),
            self.kernels.group_deltas(segments),
        ]

    def record(self, inputs: Sequence[Any]) -> tuple[Tensor, Any]:
        return self.kernels.record(inputs, lambda: self.step(inputs))


def _low_rank(kernels: Bfloat16Kernels, rank: int, out: int) -> SiteDeltas:
    weights = LowRankWeights(bf(rank, HIDDEN) / 8, (LowRankBlock(0, 0, bf(rank, out) / rank),))
    return SiteDeltas(adds=[kernels.add_delta(weights)])


@pytest.fixture
def model(ours: Bfloat16Kernels) -> Model:
    torch.manual_seed(0)
    return Model(ours)


@pytest.mark.parametrize("rows", [1, 2, 7, 9])
def test_a_replay_gives_what_computing_it_gives(model: Model, rows: int) -> None:
    """With other tokens, other lengths on other pages, and other adapters on other rows; what is
    stored is the same, too."""
    first = model.inputs(rows)
    expected = model.step(first).clone()
    got, recorded = model.record(first)
    assert recorded is not None
    assert torch.equal(got, expected)
    for _ in range(12):
        inputs, before = model.inputs(rows), model.kv.clone()
        expected = model.step(inputs).clone()
        stored = model.kv.clone()
        model.kv.copy_(before)
        assert torch.equal(recorded.replay(inputs), expected)
        assert torch.equal(model.kv, stored)


def test_many_rows_whose_deltas_are_added_within_the_product(ours: Bfloat16Kernels) -> None:
    torch.manual_seed(0)
    linear, group_of = ours.linear(bf(200, 40), None), []
    for rank in 3, 11:
        weights = LowRankWeights(bf(rank, 40), (LowRankBlock(3, 0, bf(rank, 150)),))
        sites = ours.bind_sites([SiteDeltas(adds=[ours.add_delta(weights)])])
        group_of.append(ours.group_deltas([DeltaSegment(rank, 60, sites, 0.5)]))
    x = bf(60, 40)
    held = [x, group_of[0]]
    _, recorded = ours.record(held, lambda: held[1].multiply(0, linear, held[0]))
    assert recorded is not None
    for number in 1, 0, 1:
        fresh = bf(60, 40)
        expected = group_of[number].multiply(0, linear, fresh).clone()
        # What is taken over stays whole: it may be an input once more.
        inputs = [fresh, ours.group_deltas(group_of[number]._fast)]
        assert torch.equal(recorded.replay(inputs), expected)


def test_eager_work_and_other_recordings_between_replays(model: Model) -> None:
    recorded = {}
    for rows in 3, 8, 5:
        recorded[rows] = model.record(model.inputs(rows))[1]
    for turn in range(15):
        rows = (3, 8, 5, 8)[turn % 4]
        inputs = model.inputs(rows)
        expected = model.step(inputs).clone()
        # Results of all sizes take the memory of what the recordings left.
        sizes = torch.randint(1, 100, (20,)).tolist()
        others = [model.kernels.silu_mul(bf(size, 2 * size)) for size in sizes]
        del others[::2]
        assert torch.equal(recorded[rows].replay(inputs), expected)


def test_what_is_held_only_by_the_recording_lives_as_long(ours: Bfloat16Kernels) -> None:
    """Weights, tables, and the pool of a model that is gone."""
    torch.manual_seed(0)
    model = Model(ours)
    inputs = model.inputs(4)
    expected = model.step(inputs).clone()
    _, recorded = model.record(model.inputs(4))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    # What was free is something else now.
    junk = [torch.full((size,), torch.nan) for size in (30, 500, 3000) for _ in range(100)]
    for _ in range(3):
        assert torch.equal(recorded.replay(inputs), expected)
    assert all(bool(each.isnan().all()) for each in junk)


@pytest.mark.parametrize(
    "compute",
    [lambda x: x * 2, lambda x: x.add_(1), lambda x: x.float().bfloat16(), torch.clone],
    ids=["product", "in place", "dtype", "copy"],
)
def test_what_torch_computes_makes_a_step_that_cannot_be_recorded(
    ours: Bfloat16Kernels, compute: Callable[[Tensor], Tensor]
) -> None:
    """The result is right all the same."""
    x, weight = bf(3, 8), bf(8)

    def run() -> Tensor:
        return ours.rms_norm(compute(ours.rms_norm(x, weight, 1e-5)), weight, 1e-5)

    expected = run().clone()
    got, recorded = ours.record([x], run)
    assert recorded is None
    assert torch.equal(got, expected)
    # Nothing of it is left: what comes then can be recorded.
    _, recorded = ours.record([x], lambda: ours.silu_mul(x))
    assert recorded is not None
    fresh = bf(3, 8)
    assert torch.equal(recorded.replay([fresh]), ours.silu_mul(fresh))


def test_views_are_not_computed_again_and_do_no_harm(ours: Bfloat16Kernels) -> None:
    x, weight = bf(6, 2 * 8), bf(4)

    def run() -> Tensor:
        heads = ours.silu_mul(x).view(6, 2, 4)[1:5].unflatten(0, (2, 2)).select(0, 1)
        return ours.rms_norm(heads.narrow(0, 1, 1), weight, 1e-5)

    expected = run().clone()
    got, recorded = ours.record([x], run)
    assert torch.equal(got, expected)
    assert recorded is not None
    fresh = bf(6, 2 * 8)
    again = recorded.replay([fresh]).clone()
    x.copy_(fresh)
    assert torch.equal(again, run())


def test_a_group_that_takes_the_long_way_is_not_recorded(ours: Bfloat16Kernels) -> None:
    """Neither is one that does nothing: it has no call for others to take the place of."""
    weights = KroneckerWeights(0, bf(5, 4), bf(6, 10))
    sites = ours.bind_sites([SiteDeltas(adds=[ours.add_delta(weights)])])
    linear, x = ours.linear(bf(30, 40), None), bf(9, 40)
    for group in ours.group_deltas([DeltaSegment(0, 9, sites)]), ours.group_deltas([]):
        expected = group.multiply(0, linear, x).clone()
        got, recorded = ours.record([x, group], lambda g=group: g.multiply(0, linear, x))
        assert recorded is None
        assert torch.equal(got, expected)


def test_other_kinds_of_deltas_are_replayed(ours: Bfloat16Kernels) -> None:
    linear, adapters = ours.linear(bf(30, 40), None), []
    for _ in range(3):
        adds = [ours.add_delta(KroneckerWeights(0, bf(5, 4), bf(6, 10)))]
        changes = [ours.change_output(ScaleWeights(3, torch.randn(20)))]
        adapters.append(ours.bind_sites([SiteDeltas(changes, adds)]))

    def group(first: int, second: int) -> Any:
        each = DeltaSegment(0, 2, adapters[first]), DeltaSegment(3, 6, adapters[second])
        return ours.group_deltas(each)

    held = [bf(6, 40), group(0, 1)]
    _, recorded = ours.record(held, lambda: held[1].multiply(0, linear, held[0]))
    assert recorded is not None
    for first, second in (2, 1), (0, 0), (1, 2):
        x = bf(6, 40)
        expected = group(first, second).multiply(0, linear, x).clone()
        assert torch.equal(recorded.replay([x, group(first, second)]), expected)


def test_a_plan_of_torchs_is_not_recorded(ours: Bfloat16Kernels) -> None:
    shape = AttentionShape(2, 2, 5, 4)
    plan = ours.plan_attention(shape, [SequenceSlice(0, 1, 3, [1])], torch.bfloat16)
    queries, kv = bf(1, 2, 5), bf(3, 2, 4, 2, 5)
    got, recorded = ours.record([queries, plan], lambda: ours.attention(plan, queries, kv))
    assert recorded is None
    assert torch.equal(got, ours.attention(plan, queries, kv))


def test_an_error_ends_the_recording(ours: Bfloat16Kernels) -> None:
    x = bf(3, 8)

    def fail() -> Tensor:
        ours.silu_mul(x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ours.record([x], fail)
    assert ours.silu_mul(x).shape == (3, 4)
    assert torch.equal(ours.record([x], lambda: ours.silu_mul(x))[0], ours.silu_mul(x))


def test_what_another_thread_calls_meanwhile_is_not_recorded(ours: Bfloat16Kernels) -> None:
    """Fused mode packs weights on a thread of its own."""
    x, weight = bf(3, 8), bf(70, 8)
    packed = []

    def run() -> Tensor:
        thread = threading.Thread(target=lambda: packed.append(ours.linear(weight, None)))
        thread.start()
        thread.join()
        return ours.silu_mul(x)

    _, recorded = ours.record([x], run)
    assert recorded is not None
    (linear,) = packed
    linear.weight.zero_()
    recorded.replay([x])
    assert not linear.weight.any(), "the replay packed once more"
