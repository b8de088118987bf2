"""Block tables and the prefix cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.reference import AdapterRef
from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.block_hashes import BASE_NAMESPACE
from polydelta.engine.eviction import CostModel, EvictionReason
from polydelta.engine.kv_cache import KVCache
from polydelta.engine.pool import PagePool
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.sequence import Sequence

BLOCK = 4


def sequence_of(*tokens: int, adapter: AdapterRef | None = None) -> Sequence:
    shares = () if adapter is None else (Share(adapter),)
    request = GenerationRequest("r", tokens, SamplingParams(), shares)
    sequence = Sequence(request, lambda output: None)
    sequence.learn([AdapterTraits()] * len(shares))
    return sequence


def sequence_behind(num_virtual: int, *tokens: int) -> Sequence:
    request = GenerationRequest("r", tokens, SamplingParams())
    sequence = Sequence(request, lambda output: None)
    sequence.learn([AdapterTraits(num_virtual)])
    return sequence


@pytest.fixture
def pool() -> PagePool:
    return PagePool(8)


@pytest.fixture
def kv(pool: PagePool) -> KVCache:
    return KVCache(pool, BLOCK, CostModel())


def compute(kv: KVCache, sequence: Sequence, namespace: str = BASE_NAMESPACE) -> list[int]:
    """Admits a sequence and computes all of it. Returns the prefix that it was given."""
    prefix = kv.find_prefix(sequence, namespace)
    kv.admit(sequence, prefix)
    kv.grow(sequence, sequence.num_tokens)
    sequence.num_computed = sequence.num_tokens
    kv.publish(sequence, namespace)
    return prefix


def compute_together(kv: KVCache, *sequences: Sequence) -> None:
    """All in the same steps, so that none finds what another computes."""
    for sequence in sequences:
        kv.admit(sequence, [])
        kv.grow(sequence, sequence.num_tokens)
        sequence.num_computed = sequence.num_tokens
    for sequence in sequences:
        kv.publish(sequence, BASE_NAMESPACE)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_tokens_take_whole_pages(kv: KVCache, tokens: int, pages: int) -> None:
    assert kv.pages_for(sequence_of(), tokens) == pages


@pytest.mark.parametrize(
    ("virtual", "tokens", "pages"),
    [(3, 1, 1), (3, 2, 2), (4, 4, 1), (6, 2, 1), (6, 3, 2), (13, 8, 3)],
)
def test_virtual_tokens_that_fill_no_page_take_room_in_the_first_one(
    kv: KVCache, virtual: int, tokens: int, pages: int
) -> None:
    assert kv.pages_for(sequence_behind(virtual, *range(tokens)), tokens) == pages


def test_growing_allocates_only_what_is_missing(kv: KVCache, pool: PagePool) -> None:
    sequence = sequence_of(*range(9))
    kv.grow(sequence, 5)
    assert len(sequence.block_table) == 2
    assert kv.pages_missing(sequence, 8) == 0
    kv.grow(sequence, 8)
    assert len(sequence.block_table) == 2
    kv.grow(sequence, 9)
    assert len(sequence.block_table) == 3
    assert pool.num_free == 5


def test_full_blocks_are_found_again_and_partial_ones_are_not(kv: KVCache) -> None:
    first = sequence_of(*range(10))
    compute(kv, first)
    assert kv.find_prefix(sequence_of(*range(12)), BASE_NAMESPACE) == first.block_table[:2]


def test_the_last_token_is_always_left_to_compute(kv: KVCache) -> None:
    first = sequence_of(*range(8))
    compute(kv, first)
    again = sequence_of(*range(8))
    assert compute(kv, again) == first.block_table[:1]
    assert again.num_cached == BLOCK


def test_looking_for_a_prefix_changes_nothing(kv: KVCache, pool: PagePool) -> None:
    first = sequence_of(*range(9))
    compute(kv, first)
    kv.release(first)
    before = (pool.num_free, pool.num_idle, kv.used_pages(), kv.stats.queries)
    assert len(kv.find_prefix(sequence_of(*range(9)), BASE_NAMESPACE)) == 2
    assert (pool.num_free, pool.num_idle, kv.used_pages(), kv.stats.queries) == before


def test_a_block_is_known_by_all_tokens_before_it(kv: KVCache) -> None:
    compute(kv, sequence_of(0, 1, 2, 3, 9, 9, 9, 9))
    assert kv.find_prefix(sequence_of(7, 1, 2, 3, 9, 9, 9, 9, 9), BASE_NAMESPACE) == []


def test_the_same_tokens_under_another_namespace_are_not_found(kv: KVCache) -> None:
    first = sequence_of(*range(9))
    compute(kv, first, "digest one")
    for namespace in (BASE_NAMESPACE, "digest two"):
        assert kv.find_prefix(sequence_of(*range(9)), namespace) == []
    assert kv.find_prefix(sequence_of(*range(9)), "digest one") == first.block_table[:2]


@pytest.mark.parametrize(("virtual", "found"), [(4, 8), (5, 7), (7, 9), (8, 8)])
def test_behind_virtual_tokens_the_first_block_holds_fewer_tokens(
    kv: KVCache, virtual: int, found: int
) -> None:
    first, second = (sequence_behind(virtual, *range(10)) for _ in range(2))
    compute(kv, first, "digest")
    prefix = compute(kv, second, "digest")
    assert prefix == first.block_table[: len(prefix)]
    assert second.num_cached == found
    assert kv.stats.hits == found


def test_behind_virtual_tokens_the_last_token_is_left_to_compute_too(kv: KVCache) -> None:
    compute(kv, sequence_behind(3, *range(5)), "digest")
    for tokens, found in ((5, 1), (2, 1), (1, 0)):
        sequence = sequence_behind(3, *range(tokens))
        compute(kv, sequence, "digest")
        assert sequence.num_cached == found


def test_released_pages_are_kept_where_published_and_free_where_not(
    kv: KVCache, pool: PagePool
) -> None:
    sequence = sequence_of(*range(10))
    compute(kv, sequence)
    kv.release(sequence)
    assert (pool.num_idle, pool.num_free) == (2, 6)
    assert kv.used_pages() == []
    assert (sequence.block_table, sequence.num_computed) == ([], 0)


def test_a_shared_page_stays_in_use_until_its_last_user_leaves(kv: KVCache, pool: PagePool) -> None:
    one, two = sequence_of(*range(9)), sequence_of(*range(9))
    compute(kv, one)
    compute(kv, two)
    assert one.block_table[:2] == two.block_table[:2]
    assert kv.num_used_pages == 4
    kv.release(one)
    assert pool.num_idle == 0
    kv.release(two)
    assert pool.num_idle == 2


def test_of_two_with_the_same_block_one_page_stays(kv: KVCache, pool: PagePool) -> None:
    one, two = sequence_of(*range(5)), sequence_of(*range(9))
    compute_together(kv, one, two)
    assert two.block_table[0] == one.block_table[0]
    assert (pool.num_free, kv.num_used_pages) == (4, 4)
    assert [kv.num_own_pages(s) for s in (one, two)] == [1, 2]
    # Nobody found anything: the prompt may have been sent once, for two choices.
    assert [block.hits for block in kv._known.by_page.values()] == [0, 0]
    kv.release(one)
    kv.release(two)
    assert (pool.num_idle, pool.num_free) == (2, 6)


def test_the_beginning_of_a_prefix_stays_while_somebody_uses_its_end(
    kv: KVCache, pool: PagePool
) -> None:
    """Whoever made the beginning has left, and its end was made by another."""
    one, two = sequence_of(*range(5)), sequence_of(*range(9))
    compute_together(kv, one, two)
    kv.release(one)
    kv.grow(sequence_of(), BLOCK * pool.num_available)
    assert kv.find_prefix(sequence_of(*range(9)), BASE_NAMESPACE) == two.block_table[:2]


def test_a_block_that_another_has_left_idle_is_taken_back_for_ones_own(
    kv: KVCache, pool: PagePool
) -> None:
    one, two = sequence_of(*range(5)), sequence_of(*range(9))
    for sequence in (one, two):
        kv.admit(sequence, [])
        kv.grow(sequence, sequence.num_tokens)
        sequence.num_computed = sequence.num_tokens
    kv.publish(one, BASE_NAMESPACE)
    kv.release(one)
    assert (pool.num_idle, pool.num_free) == (1, 4)
    kv.publish(two, BASE_NAMESPACE)
    assert (pool.num_idle, pool.num_free) == (0, 5)
    pool.check_integrity(kv.used_pages())


def test_the_end_of_a_prefix_is_evicted_before_its_beginning(kv: KVCache, pool: PagePool) -> None:
    sequence = sequence_of(*range(17))
    compute(kv, sequence)
    first = sequence.block_table[:4]
    kv.release(sequence)
    for kept in (3, 2, 1, 0):
        kv.grow(sequence_of(), BLOCK * (pool.num_free + 1))
        assert kv.find_prefix(sequence_of(*range(17)), BASE_NAMESPACE) == first[:kept]


def test_a_block_that_leaves_takes_those_behind_it_along(kv: KVCache, pool: PagePool) -> None:
    """Here the end was dearer than the beginning: it was retired before prefills got cheap."""
    kv.costs.observe_prefill(tokens=1, seconds=1000.0)
    for _ in range(2):
        sequence = sequence_of(*range(13))
        compute(kv, sequence)
        kv.release(sequence)
    for _ in range(100):
        kv.costs.observe_prefill(tokens=1, seconds=1e-6)
    beginning = sequence_of(*range(5))
    compute(kv, beginning)
    kv.release(beginning)
    assert (pool.num_idle, pool.num_free) == (3, 5)
    kv.grow(sequence_of(), BLOCK * 6)
    assert (pool.num_idle, pool.num_free) == (0, 2)
    assert kv.stats.evictions[EvictionReason.ROOM] == 3
    assert kv._known.by_hash == kv._known.by_page == {}


def test_the_longest_chain_may_leave_by_its_beginning() -> None:
    """A context of 100,000 tokens is deeper than Python's stack."""
    pool = PagePool(6000)
    kv = KVCache(pool, BLOCK, CostModel())
    sequence = sequence_of(*range(BLOCK * 5000 + 1))
    compute(kv, sequence)
    kv.release(sequence)
    pool.evict(sequence.block_hashes[0], EvictionReason.ORDERED)
    assert pool.num_free == 6000


def test_a_version_takes_along_what_another_of_the_same_content_made_behind_its_blocks(
    kv: KVCache, pool: PagePool
) -> None:
    """As after a rollback: both are served under one name and digest."""
    first, rolled_back = (AdapterRef("a", version, Path("unused")) for version in (1, 3))
    for ref, length in ((first, 5), (rolled_back, 13)):
        sequence = sequence_of(*range(length), adapter=ref)
        compute(kv, sequence, "a digest")
        kv.release(sequence)
    assert pool.num_idle == 3
    kv.drop(rolled_back)
    assert pool.num_idle == 1
    sequence = sequence_of(*range(13), adapter=rolled_back)
    compute(kv, sequence, "a digest")
    kv.release(sequence)
    kv.drop(first)
    assert (pool.num_idle, pool.num_free) == (0, 8)


def test_prefixes_that_are_used_often_outlive_those_that_are_not(
    kv: KVCache, pool: PagePool
) -> None:
    for tokens, times in ((range(4), 3), (range(10, 14), 1)):
        for _ in range(times):
            sequence = sequence_of(*tokens, 99)
            compute(kv, sequence)
            kv.release(sequence)
    assert pool.num_idle == 2
    kv.grow(sequence_of(), BLOCK * 7)
    assert len(kv.find_prefix(sequence_of(*range(4), 99), BASE_NAMESPACE)) == 1
    assert kv.find_prefix(sequence_of(*range(10, 14), 99), BASE_NAMESPACE) == []


def test_only_the_first_admission_counts_as_a_query(kv: KVCache) -> None:
    first = sequence_of(*range(9))
    compute(kv, first)
    assert (kv.stats.queries, kv.stats.hits, first.num_cached) == (9, 0, 0)
    kv.release(first)
    assert len(compute(kv, first)) == 2
    assert (kv.stats.queries, kv.stats.hits, first.num_cached) == (9, 0, 0)
    second = sequence_of(*range(9))
    compute(kv, second)
    assert (kv.stats.queries, kv.stats.hits, second.num_cached) == (18, 8, 8)


def test_without_prefix_caching_nothing_is_found_or_kept(pool: PagePool) -> None:
    kv = KVCache(pool, BLOCK, CostModel(), prefix_caching=False)
    first = sequence_of(*range(9))
    compute(kv, first)
    assert kv.find_prefix(sequence_of(*range(9)), BASE_NAMESPACE) == []
    kv.release(first)
    assert (pool.num_idle, pool.num_free) == (0, 8)
