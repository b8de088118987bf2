"""Adapters on their way into the pool and out of it."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import pytest

from polydelta.adapters_store.errors import InvalidAdapterError, StoreError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.adapter_entry import ResidencyState, ResidentAdapter
from polydelta.engine.adapter_usage import AdapterUsage
from polydelta.engine.eviction import CostModel
from polydelta.engine.host_adapter import AdapterPages, HostAdapter, count_pages
from polydelta.engine.pool import PagePool
from polydelta.engine.residency import Residency

PAGE_BYTES = 10
BLOCK = 4
ONE, TWO = (AdapterRef(name, 1, Path("unused")) for name in ("one", "two"))


class Packed(NamedTuple):
    """A packed adapter without bytes."""

    digest: str
    bytes_per_layer: int
    traits: AdapterTraits = AdapterTraits()

    @property
    def nbytes(self) -> int:
        return self.bytes_per_layer


class Setting:
    """A residency whose host tier is the test itself."""

    def __init__(self, num_pages: int = 8) -> None:
        self.pool = PagePool(num_pages)
        self.loads: list[Future[HostAdapter]] = []
        self.bound: list[list[int]] = []
        self.wakes = 0
        # What it takes to have each on the host once more.
        self.reload: dict[AdapterRef, float] = {}
        self.costs = CostModel()
        self.residency = Residency(
            self.pool,
            PAGE_BYTES,
            BLOCK,
            self,
            self._bind,
            self.costs,
            self._wake,
            AdapterUsage(most_named=1),
        )

    def load(self, ref: AdapterRef) -> Future[HostAdapter]:
        self.loads.append(Future())
        return self.loads[-1]

    def forget(self, ref: AdapterRef) -> None:
        """It keeps none."""

    def reload_seconds(self, ref: AdapterRef) -> float:
        return self.reload.get(ref, 0.0)

    def bring(self, ref: AdapterRef, size: int) -> None:
        """An adapter of `size` bytes a layer, all the way into the pool, in use."""
        self.residency.prefetch(ref)
        self.loads[-1].set_result(Packed(f"digest of {ref.id}", size))
        assert self.residency.state(ref) is ResidencyState.ON_HOST
        self.residency.acquire(ref)

    def _bind(self, packed: HostAdapter, pages: Seq[int]) -> object:
        self.bound.append(list(pages))
        return object()

    def _wake(self) -> None:
        self.wakes += 1


def test_an_adapter_goes_from_disk_to_the_pool_and_back() -> None:
    setting = Setting()
    residency = setting.residency
    assert residency.state(ONE) is ResidencyState.ON_DISK
    residency.prefetch(ONE)
    assert residency.state(ONE) is ResidencyState.LOADING_TO_HOST
    setting.loads[0].set_result(Packed("d", 25))
    assert residency.state(ONE) is ResidencyState.ON_HOST
    assert residency.digest(ONE) == "d"
    bound = residency.acquire(ONE)
    assert residency.state(ONE) is ResidencyState.RESIDENT
    assert residency.bound(ONE) is bound
    residency.release(ONE)
    assert residency.state(ONE) is ResidencyState.RESIDENT
    setting.pool.allocate(8)
    assert residency.state(ONE) is ResidencyState.ON_DISK
    assert residency.usage.snapshot().total().swap_ins == 1
    assert residency.evictions == {"room": 1, "ordered": 0, "deleted": 0}


def test_a_load_that_ends_wakes_the_engine() -> None:
    setting = Setting()
    setting.residency.prefetch(ONE)
    assert setting.wakes == 0
    setting.loads[0].set_result(Packed("d", 5))
    assert setting.wakes == 1
    setting.residency.prefetch(TWO)
    setting.loads[1].set_exception(OSError("gone"))
    assert setting.wakes == 2


def test_an_adapter_is_loaded_once_however_often_it_is_asked_for() -> None:
    setting = Setting()
    for _ in range(3):
        setting.residency.prefetch(ONE)
    setting.loads[0].set_result(Packed("d", 5))
    setting.residency.prefetch(ONE)
    setting.residency.acquire(ONE)
    setting.residency.prefetch(ONE)
    assert len(setting.loads) == 1


@pytest.mark.parametrize(("size", "pages"), [(0, 1), (1, 1), (10, 1), (11, 2), (35, 4)])
def test_an_adapter_takes_whole_pages_and_at_least_one(size: int, pages: int) -> None:
    setting = Setting()
    setting.residency.prefetch(ONE)
    setting.loads[0].set_result(Packed("d", size))
    assert setting.residency.state(ONE) is ResidencyState.ON_HOST
    assert setting.residency.pages_needed(ONE) == pages
    setting.residency.acquire(ONE)
    assert setting.residency.pages_needed(ONE) == pages
    assert len(setting.bound[0]) == pages


@pytest.mark.parametrize(
    ("size", "virtual", "weights", "prefix"),
    [(0, 1, 0, 1), (0, 4, 0, 1), (1, 5, 1, 2), (25, 8, 3, 2), (25, 9, 3, 3)],
)
def test_virtual_tokens_take_whole_pages_after_those_of_the_weights(
    size: int, virtual: int, weights: int, prefix: int
) -> None:
    setting = Setting()
    residency, traits = setting.residency, AdapterTraits(virtual)
    residency.prefetch(ONE)
    setting.loads[0].set_result(Packed("d", size, traits))
    assert residency.state(ONE) is ResidencyState.ON_HOST
    assert residency.traits(ONE) == traits
    assert residency.pages_needed(ONE) == weights + prefix
    residency.acquire(ONE)
    (bound,) = setting.bound
    assert residency.prefix_pages(ONE) == bound[weights:]
    assert len(bound) == weights + prefix == residency.pages_needed(ONE)
    assert count_pages(Packed("d", size, traits), PAGE_BYTES, BLOCK) == (
        AdapterPages(weights, prefix)
    )
    residency.release(ONE)
    assert setting.pool.num_idle == weights + prefix
    assert residency.traits(ONE) == traits


def test_the_weights_of_an_adapter_lie_in_one_piece_where_its_prefix_does_not() -> None:
    setting = Setting(num_pages=8)
    taken = setting.pool.allocate(4)
    setting.pool.free([taken[0], taken[2]])
    setting.residency.prefetch(ONE)
    setting.loads[0].set_result(Packed("d", 35, AdapterTraits(6)))
    setting.residency.state(ONE)
    setting.residency.acquire(ONE)
    assert setting.bound == [[4, 5, 6, 7, 0, 2]]


def test_the_time_to_compute_virtual_tokens_is_the_cost_of_their_adapter_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Taken for a slow copy of few bytes, it made every other adapter dearer than all KV."""
    setting = Setting(num_pages=8)
    residency, pool, costs = setting.residency, setting.pool, setting.costs
    before = costs.load_seconds(1000)
    clock = iter((0.0, 5.0))
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        residency.prefetch(ONE)
        setting.loads[-1].set_result(Packed("d", 0, AdapterTraits(8)))
        residency.state(ONE)
        residency.acquire(ONE)
    assert costs.load_seconds(1000) == before
    residency.release(ONE)
    # Cheaper for each page than the prompt, however many bytes it has.
    pool.retire("cached", pool.allocate(2), cost=4.0, uses=1, forget=lambda _: None)
    pool.allocate(6)
    assert residency.is_resident(ONE)
    pool.allocate(1)
    assert not residency.is_resident(ONE)


def test_pages_to_acquire_counts_what_would_leave_the_available_ones() -> None:
    setting = Setting()
    residency, pool = setting.residency, setting.pool
    residency.prefetch(ONE)
    setting.loads[0].set_result(Packed("d", 25))
    residency.state(ONE)
    for _ in range(2):  # from the host, then from idle
        available, asked = pool.num_available, residency.pages_to_acquire(ONE)
        assert asked == 3
        residency.acquire(ONE)
        assert pool.num_available == available - asked
        assert residency.pages_to_acquire(ONE) == 0
        residency.release(ONE)


def test_only_the_last_user_leaves_an_adapter_idle() -> None:
    setting = Setting()
    setting.bring(ONE, 25)
    setting.residency.acquire(ONE)
    setting.residency.release(ONE)
    assert setting.pool.num_idle == 0
    assert sorted(setting.residency.used_pages()) == sorted(setting.bound[0])
    setting.residency.release(ONE)
    assert setting.pool.num_idle == 3
    assert setting.residency.used_pages() == []
    assert setting.residency.num_idle_pages() == 3


def test_an_idle_adapter_is_taken_back_without_being_loaded_again() -> None:
    setting = Setting()
    setting.bring(ONE, 25)
    setting.residency.release(ONE)
    setting.residency.acquire(ONE)
    assert len(setting.bound) == 1
    assert setting.pool.num_idle == 0


def test_an_adapter_in_use_is_never_evicted() -> None:
    setting = Setting(num_pages=4)
    setting.bring(ONE, 25)
    assert not setting.pool.can_allocate(2)


def test_a_new_adapter_takes_the_room_of_an_idle_one() -> None:
    setting = Setting(num_pages=4)
    setting.bring(ONE, 25)
    setting.residency.release(ONE)
    setting.bring(TWO, 35)
    assert setting.residency.resident() == [ResidentAdapter(TWO.id, TWO.version, 4)]
    assert setting.residency.state(ONE) is ResidencyState.ON_DISK


def test_a_failure_is_told_once_and_then_forgotten() -> None:
    setting = Setting()
    setting.residency.prefetch(ONE)
    setting.loads[0].set_exception(InvalidAdapterError("rank 0 is no rank"))
    assert setting.residency.state(ONE) is ResidencyState.FAILED
    setting.residency.prefetch(ONE)
    assert len(setting.loads) == 1
    assert str(setting.residency.take_error(ONE)) == "rank 0 is no rank"
    assert setting.residency.state(ONE) is ResidencyState.ON_DISK
    setting.residency.prefetch(ONE)
    assert len(setting.loads) == 2


def test_an_error_without_words_is_still_an_error() -> None:
    setting = Setting()
    setting.residency.prefetch(ONE)
    setting.loads[0].set_exception(MemoryError())
    assert setting.residency.state(ONE) is ResidencyState.FAILED
    assert setting.residency.take_error(ONE)


def test_a_load_that_was_cancelled_is_a_failed_one() -> None:
    setting = Setting()
    setting.residency.prefetch(ONE)
    assert setting.loads[0].cancel()
    assert setting.residency.state(ONE) is ResidencyState.FAILED
    assert setting.residency.take_error(ONE)


def test_what_was_loaded_for_nobody_is_let_go() -> None:
    setting = Setting()
    setting.residency.prefetch(ONE)
    setting.residency.drop_unused(ONE)
    assert setting.residency.state(ONE) is ResidencyState.ON_DISK
    setting.residency.prefetch(ONE)
    setting.loads[1].set_result(Packed("d", 5))
    assert setting.residency.state(ONE) is ResidencyState.ON_HOST
    setting.residency.drop_unused(ONE)
    assert setting.residency.state(ONE) is ResidencyState.ON_DISK


def test_a_resident_adapter_is_not_dropped() -> None:
    setting = Setting()
    setting.bring(ONE, 25)
    setting.residency.drop_unused(ONE)
    setting.residency.release(ONE)
    setting.residency.drop_unused(ONE)
    assert setting.residency.resident() == [ResidentAdapter(ONE.id, ONE.version, 3)]


def test_the_size_of_an_adapter_that_is_not_loaded_is_not_known() -> None:
    setting = Setting()
    setting.residency.prefetch(ONE)
    with pytest.raises(ValueError, match="one@1 is loading to host"):
        setting.residency.pages_needed(ONE)
    with pytest.raises(ValueError, match="one@1 is not resident"):
        setting.residency.bound(ONE)


def test_versions_of_one_adapter_are_strangers() -> None:
    setting = Setting()
    setting.bring(ONE, 5)
    assert setting.residency.state(AdapterRef("one", 2, Path("unused"))) is ResidencyState.ON_DISK
    same = AdapterRef("one", 1, Path("elsewhere"))
    assert setting.residency.state(same) is ResidencyState.RESIDENT


def test_a_loader_that_breaks_is_logged_and_its_words_stay_inside(
    caplog: pytest.LogCaptureFixture,
) -> None:
    setting = Setting()
    setting.residency.prefetch(ONE)
    setting.loads[0].set_exception(KeyError("/some/path"))
    assert setting.residency.state(ONE) is ResidencyState.FAILED
    error = setting.residency.take_error(ONE)
    assert isinstance(error, StoreError)
    assert str(error) == "it could not be loaded; see the server's log"
    assert "/some/path" in caplog.text


def test_of_two_adapters_the_one_that_host_ram_still_has_leaves_first() -> None:
    """However small: the other one would have to come from disk."""
    setting = Setting(num_pages=5)
    setting.reload = {ONE: 0.5}
    setting.bring(ONE, 3 * PAGE_BYTES)
    setting.bring(TWO, 2 * PAGE_BYTES)
    setting.residency.release(ONE)
    setting.residency.release(TWO)
    setting.pool.allocate(1)
    assert setting.residency.is_resident(ONE)
    assert not setting.residency.is_resident(TWO)


def test_a_deleted_version_is_doomed_only_as_long_as_somebody_uses_it() -> None:
    setting = Setting()
    setting.bring(ONE, PAGE_BYTES)
    assert not setting.residency.is_doomed(ONE)
    setting.residency.forget(ONE)
    assert setting.residency.is_doomed(ONE)
    setting.residency.release(ONE)
    assert not setting.residency.is_doomed(ONE)
    assert setting.pool.num_free == setting.pool.num_pages
