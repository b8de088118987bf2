"""One pool, or two that keep their shares."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from polydelta.engine.pools import Pools


def test_one_pool_is_both() -> None:
    pools = Pools.of(10)
    assert pools.are_one
    pools.kv.allocate(7)
    assert pools.can_allocate(2, 1)
    assert not pools.can_allocate(2, 2)
    assert (pools.num_pages, pools.num_free) == (10, 3)


@given(st.integers(2, 60), st.floats(0.05, 0.95), st.data())
def test_a_split_pool_has_every_page_once_and_neither_takes_the_others(
    num_pages: int, share: float, data: st.DataObject
) -> None:
    pools = Pools.of(num_pages, share)
    assert not pools.are_one
    assert pools.num_pages == pools.num_free == num_pages
    assert pools.adapters.num_pages == pytest.approx(num_pages * share, abs=0.51)
    kv = pools.kv.allocate(data.draw(st.integers(0, pools.kv.num_pages)))
    adapters = pools.adapters.allocate_run(data.draw(st.integers(0, pools.adapters.num_pages)))
    assert set(kv) | set(adapters) <= set(range(num_pages))
    assert not set(kv) & set(adapters)
    pools.check_integrity(kv, adapters)
    assert pools.can_allocate(pools.kv.num_free, pools.adapters.num_free)
    assert not pools.can_allocate(pools.kv.num_free + 1, 0)
    assert not pools.can_allocate(0, pools.adapters.num_free + 1)
    with pytest.raises(RuntimeError, match="do not balance"):
        pools.check_integrity([*kv, num_pages], adapters)


def test_what_fits_is_told_for_each_of_two() -> None:
    pools = Pools.of(10, 0.3)
    assert pools.fit(7, 3)
    assert not pools.fit(8, 0)
    assert not pools.fit(0, 4)
    assert Pools.of(10).fit(8, 2)
