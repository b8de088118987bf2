"""A step's rows: which tokens, at which positions, into which places, under which adapters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from polydelta.adapters_store.composition import Share, Shares
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.batch import AdapterRows, Batch, build_batch
from polydelta.engine.page_copies import PageCopy
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.sequence import NEVER, ScheduledSequence, Sequence

BLOCK = 4
ONE, TWO = ((Share(AdapterRef(name, 1, Path("unused"))),) for name in ("one", "two"))


def scheduled(
    num_tokens: int,
    adapters: Shares = (),
    computed: int = 0,
    count: int | None = None,
    virtual: int = 0,
    pages: Iterable[int] = range(100, 110),
    prefix: tuple[list[int], int | None] = ([], None),
    activation: int = 0,
) -> ScheduledSequence:
    """A sequence with tokens 0, 1, 2, ..., and its share of a step; all that is left by default."""
    request = GenerationRequest("r", range(num_tokens), SamplingParams(), adapters)
    sequence = Sequence(request, lambda output: None)
    sequence.num_computed = computed
    sequence.num_prefix_tokens, sequence.activation = virtual, activation
    sequence.block_table = list(pages)
    sequence.prefix_pages, sequence.prefix_rest = prefix
    return ScheduledSequence(sequence, num_tokens - computed if count is None else count)


def batch_of(*schedule: ScheduledSequence) -> Batch:
    return build_batch(schedule, BLOCK)


def test_a_sequence_without_virtual_tokens_begins_at_position_0_of_its_first_page() -> None:
    batch = batch_of(scheduled(6, pages=[7, 3]))
    assert batch.tokens.tolist() == batch.positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.slots.tolist() == [28, 29, 30, 31, 12, 13]
    (part,) = batch.slices
    assert (part.start, part.length, part.context, list(part.pages)) == (0, 6, 6, [7, 3])
    assert batch.page_copies == []


def test_virtual_tokens_shift_positions_and_places_but_no_tokens() -> None:
    # 6 virtual tokens: one full page, and two places of the first own one.
    batch = batch_of(scheduled(5, ONE, virtual=6, pages=[7, 3], prefix=([20], 21)))
    assert batch.tokens.tolist() == [0, 1, 2, 3, 4]
    assert batch.positions.tolist() == [6, 7, 8, 9, 10]
    assert batch.slots.tolist() == [30, 31, 12, 13, 14]
    (part,) = batch.slices
    assert (part.length, part.context, list(part.pages)) == (5, 11, [20, 7, 3])
    assert batch.page_copies == [PageCopy(21, 7, slot=-1, num_tokens=2)]


def test_virtual_tokens_that_fill_their_pages_are_read_in_place_only() -> None:
    batch = batch_of(scheduled(3, ONE, virtual=8, pages=[7], prefix=([20, 21], None)))
    assert batch.positions.tolist() == [8, 9, 10]
    assert batch.slots.tolist() == [28, 29, 30]
    assert list(batch.slices[0].pages) == [20, 21, 7]
    assert batch.page_copies == []


def test_only_who_begins_in_this_step_has_virtual_tokens_copied() -> None:
    prefix: tuple[list[int], int | None] = ([], 20)
    batch = batch_of(
        scheduled(9, ONE, computed=8, virtual=3, pages=[1, 2, 3], prefix=prefix),
        scheduled(9, ONE, count=1, virtual=3, pages=[4, 5, 6], prefix=prefix),
        scheduled(9, ONE, computed=1, virtual=3, pages=[7, 8, 9], prefix=prefix),
        scheduled(2, pages=[10]),
    )
    assert batch.page_copies == [PageCopy(20, 4, slot=-1, num_tokens=3)]


def test_rows_of_one_adapter_are_one_segment_and_the_bases_are_in_none() -> None:
    batch = batch_of(scheduled(3, TWO), scheduled(2, ONE), scheduled(4), scheduled(5, ONE))
    assert batch.adapter_rows == [AdapterRows(4, 11, ONE), AdapterRows(11, 14, TWO)]
    assert batch.sample_adapter_rows == [AdapterRows(1, 3, ONE), AdapterRows(3, 4, TWO)]
    assert batch.sample_rows.tolist() == [3, 5, 10, 13]


def test_rows_before_the_activation_are_in_no_segment() -> None:
    batch = batch_of(
        scheduled(6, ONE),
        scheduled(6, ONE, activation=2),  # acts on four of its rows
        scheduled(6, ONE, computed=3, activation=2),  # on all three
        scheduled(6, ONE, count=4, activation=4),  # not yet
        scheduled(6, ONE, activation=NEVER),
        scheduled(6, ONE, computed=5, activation=5),
    )
    assert batch.adapter_rows == [
        AdapterRows(0, 6, ONE),
        AdapterRows(8, 15, ONE),
        AdapterRows(25, 26, ONE),
    ]


def test_a_sampled_row_is_the_adapters_only_if_it_acts_on_it() -> None:
    batch = batch_of(
        scheduled(6, ONE, activation=5),
        scheduled(6, ONE, computed=5, activation=2),
        scheduled(6, ONE, activation=NEVER),
        scheduled(6, ONE, count=5),  # nothing is sampled for it
        scheduled(6, ONE),
    )
    assert batch.sample_rows.tolist() == [5, 6, 12, 23]
    assert batch.sample_adapter_rows == [AdapterRows(0, 2, ONE), AdapterRows(3, 4, ONE)]


def test_a_step_that_samples_nothing_has_no_sampled_segments() -> None:
    batch = batch_of(scheduled(6, ONE, count=2), scheduled(6, count=3))
    assert batch.sample_rows.tolist() == []
    assert batch.sample_adapter_rows == []


def test_rows_that_are_added_belong_to_nobody(world: type) -> None:
    w = world()
    w.submit(range(3), max_tokens=4)
    w.submit(range(5, 10), max_tokens=4)
    w.step()
    batch = build_batch(w.scheduler.schedule(), w.block_size)
    assert batch.decodes_only
    padded = batch.padded(5)
    assert padded.decodes_only
    assert padded.tokens.tolist() == [*batch.tokens.tolist(), 0, 0, 0]
    assert padded.slots.tolist() == [*batch.slots.tolist(), -1, -1, -1]
    assert [(s.start, s.length, s.context) for s in padded.slices[2:]] == [
        (2, 1, 0),
        (3, 1, 0),
        (4, 1, 0),
    ]
    assert torch.equal(padded.sample_rows, batch.sample_rows)
    assert batch.padded(2) is batch


def test_a_row_whose_token_is_under_way_is_named(world: type) -> None:
    w = world(lag=1)
    one = w.submit(range(3), max_tokens=4)
    two = w.submit(range(5, 10), max_tokens=4)
    w.step()
    batch = build_batch(w.scheduler.schedule(), w.block_size)
    assert batch.unknown == [(0, one), (1, two)]
    assert batch.tokens.tolist() == [-1, -1]
