"""Adapters with ready-made KV before the sequence. That sequences read it, and that nobody writes
it, is checked by every `world.step` (see `conftest.py`)."""

from __future__ import annotations

from typing import Any

import pytest

from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.batch import build_batch
from polydelta.engine.sequence import Sequence

# The class `World` of conftest.py.
Worlds = Any

BLOCK = 4


def prefix_world(world: Worlds, num_virtual: int, weights: int = 0, **changes: Any) -> Any:
    return world(
        block_size=BLOCK,
        adapters={"p": weights, "q": 0, "a": 2},
        traits={"p": AdapterTraits(num_virtual), "q": AdapterTraits(num_virtual + 1)},
        **changes,
    )


def start(w: Any, prompt: range, adapter: str = "p", max_tokens: int = 1) -> Sequence:
    """Submits a request, and steps until its first tokens are computed."""
    sequence: Sequence = w.submit(prompt, adapter, max_tokens)
    w.step()
    w.host.finish()
    w.step()
    return sequence


@pytest.mark.parametrize(
    ("num_virtual", "full", "rest"),
    [(1, 0, 1), (3, 0, 1), (4, 1, 0), (5, 1, 1), (8, 2, 0), (11, 2, 1)],
)
def test_full_pages_are_the_adapters_and_the_rest_is_copied_into_the_first_own_page(
    world: Worlds, num_virtual: int, full: int, rest: int
) -> None:
    w = prefix_world(world, num_virtual, weights=2)
    sequence = start(w, range(9), max_tokens=3)
    pages = w.residency.prefix_pages(sequence.adapter_refs[0])
    assert len(pages) == full + rest
    assert sequence.prefix_pages == pages[:full]
    assert [sequence.prefix_rest] == (pages[full:] or [None])
    assert len(sequence.block_table) == -(-(num_virtual % BLOCK + 9) // BLOCK)
    assert w.pool.num_available == 16 - 2 - full - rest - len(sequence.block_table)
    w.drain()
    assert w.finished == [sequence]


def test_all_sequences_of_an_adapter_read_the_same_pages(world: Worlds) -> None:
    w = prefix_world(world, 10)
    one, two = start(w, range(5), max_tokens=5), start(w, range(20, 26), max_tokens=5)
    assert len(one.prefix_pages) == 2
    assert one.prefix_pages == two.prefix_pages
    assert not set(one.block_table) & set(two.block_table)
    w.drain()


def test_its_pages_are_gone_from_a_sequence_that_has_left(world: Worlds) -> None:
    w = prefix_world(world, 6)
    sequence = start(w, range(5))
    assert w.finished == [sequence]
    assert (sequence.prefix_pages, sequence.prefix_rest) == ([], None)


def test_copies_are_made_when_a_sequence_begins_and_not_again(world: Worlds) -> None:
    w = prefix_world(world, 6, max_batch_tokens=4, prefix_caching=False)
    start(w, range(9), max_tokens=3)
    seen = []
    compute = w._compute

    def watch(schedule: Any) -> None:
        seen.append(len(build_batch(schedule, BLOCK).page_copies))
        compute(schedule)

    w._compute = watch
    w.submit(range(20, 23), "p", max_tokens=2)
    w.drain()
    assert sum(seen) == 1


def test_a_first_block_from_the_cache_needs_no_copy(world: Worlds) -> None:
    w = prefix_world(world, 6)
    start(w, range(9))
    again = w.submit(range(9), "p")
    schedule = w.scheduler.schedule()
    # Two of the first block's places are the virtual tokens', and two blocks are full.
    assert [(item.start, item.num_tokens) for item in schedule] == [(6, 3)]
    batch = build_batch(schedule, BLOCK)
    assert batch.page_copies == []
    assert batch.positions.tolist() == [12, 13, 14]
    assert again.num_cached == 6


def test_virtual_tokens_are_neither_prompt_tokens_nor_cached_ones(world: Worlds) -> None:
    w = prefix_world(world, 7)
    for _ in range(2):
        w.submit(range(10), "p")
        w.drain()
    now = w.stats()
    # The second finds 1 + 2 * 4 of its tokens.
    assert (now.prompt_tokens, now.prefix_queries, now.prefix_hits) == (20, 20, 9)
    assert now.steps.computed["prefill"] == 11
    assert [s.num_cached for s in w.submitted] == [0, 9]


@pytest.mark.parametrize("num_virtual", [2, 4])
def test_its_blocks_are_neither_the_bases_nor_another_adapters(
    world: Worlds, num_virtual: int
) -> None:
    w = prefix_world(world, num_virtual, num_pages=40)
    for adapter in ("p", None, "q", "p", None, "q"):
        w.submit(range(9), adapter)
        w.drain()
    assert all(s.num_cached == 0 for s in w.submitted[:3])
    assert all(s.num_cached for s in w.submitted[3:])


def test_a_preempted_sequence_reads_its_prefix_again_where_it_lies_then(world: Worlds) -> None:
    w = prefix_world(world, 6, num_pages=7, prefix_caching=False)
    old = w.submit(range(8), max_tokens=14)
    young = w.submit([1, 2], "p", max_tokens=12)
    w.step()
    w.host.finish()
    w.drain()
    assert set(w.finished) == {old, young}
    assert young.num_preemptions > 0
    assert young.num_output_tokens == 12


def test_it_leaves_the_pool_as_one_with_its_weights(world: Worlds) -> None:
    w = prefix_world(world, 6, weights=3, num_pages=8)
    start(w, range(5))
    assert w.residency.num_idle_pages() == 5
    w.submit(range(20), max_tokens=9)
    w.drain()
    assert w.residency.resident() == []
    again = start(w, range(5))
    assert w.finished[-1] is again


def test_a_prefix_that_needs_more_than_the_pool_is_refused_with_all_pages_counted(
    world: Worlds,
) -> None:
    # 2 pages of weights, 3 of KV; 10 % 4 + 9 places of its own take 3 more, 1 + 9 take 4.
    fits, too_long = range(8), range(9)
    for prompt, pages, error in ((fits, 8, False), (too_long, 8, False), (too_long, 7, True)):
        w = prefix_world(world, 10, weights=2, num_pages=pages)
        sequence = w.submit(prompt, "p")
        w.drain()
        assert (sequence in w.failed) == error
        if error:
            assert "needs 8 pages of the pool (5 of them for its adapters)" in w.failed[sequence]


def test_the_context_window_counts_virtual_tokens(world: Worlds) -> None:
    w = prefix_world(world, 6, max_positions=16)
    one_token = w.submit(range(9), "p", max_tokens=5)
    too_long = w.submit(range(10), "p", max_tokens=5)
    base = w.submit(range(10), max_tokens=5)
    w.drain()
    assert (one_token.num_output_tokens, base.num_output_tokens) == (1, 5)
    assert list(w.failed) == [too_long]
    reason = w.failed[too_long]
    assert "6 virtual tokens before the prompt's 10" in reason
    assert "context window is 16 tokens" in reason
    assert "shorten the prompt" in reason


def test_pages_beyond_the_context_window_are_not_asked_for(world: Worlds) -> None:
    w = prefix_world(world, 6, num_pages=5, max_positions=12)
    sequence = w.submit(range(4), "p", max_tokens=100)
    w.drain()
    assert w.finished == [sequence]
    assert sequence.num_output_tokens == 2


def test_adapters_with_weights_alone_are_scheduled_beside_it_as_ever(world: Worlds) -> None:
    w = prefix_world(world, 5, num_pages=30)
    for adapter in ("p", None, "a", "q", "a", "p"):
        w.submit(range(6), adapter, max_tokens=4)
    w.drain()
    assert len(w.finished) == 6
