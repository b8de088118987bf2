"""Orders whose client hangs up before the pool has room."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

import pytest

from polydelta.adapters_store.errors import AdapterError
from polydelta.adapters_store.listing import AdapterListing
from polydelta.server.adapters.changes import Changes
from polydelta.server.adapters.orders import Orders
from polydelta.server.service import Service
from polydelta.server.tenants.tenant import OPERATOR

# `World` of conftest.py.
Worlds = Any
Make = Callable[..., dict[str, bytes]]
Upload = Callable[..., dict[str, Any]]


@pytest.fixture
def orders(world: Worlds) -> Orders:
    world.engine.stuck = True
    service = Service(
        engine=world.engine,
        store=world.store,
        publisher=None,
        metrics=None,
        base_name="base",
        started=0,
    )
    return Orders(service, AdapterListing(world.store), Changes(world.store))


async def leave(world: Worlds, work: Coroutine[Any, Any, object]) -> None:
    """Hangs up as soon as the engine has the order, and waits until that is dealt with."""
    working = asyncio.ensure_future(work)
    async with asyncio.timeout(30):
        while not world.engine.orders:
            await asyncio.sleep(0.001)
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working


@pytest.mark.parametrize(("order", "of"), [("load", [OPERATOR, "a"]), ("pin", ["a"])])
def test_an_order_is_withdrawn_when_its_client_hangs_up(
    world: Worlds, orders: Orders, make_lora: Make, upload: Upload, order: str, of: list[Any]
) -> None:
    upload("a", make_lora())
    asyncio.run(leave(world, getattr(orders, order)(*of)))
    (given,) = world.engine.orders
    assert isinstance(given.exception(timeout=0), AdapterError)
    assert world.store.catalog.pinned() == []


def test_a_pin_that_came_before_its_withdrawal_is_noted(
    world: Worlds,
    orders: Orders,
    make_lora: Make,
    upload: Upload,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or the record would say that it is not pinned, and `evict` that it is."""

    def too_late(order: Future[None]) -> None:
        order.set_result(None)

    upload("a", make_lora())
    monkeypatch.setattr(world.engine, "withdraw", too_late)
    asyncio.run(leave(world, orders.pin("a")))
    assert [record.name for record in world.store.catalog.pinned()] == ["a@1"]


def test_an_order_that_fails_after_its_client_hung_up_is_told_to_nobody(
    world: Worlds, orders: Orders, make_lora: Make, upload: Upload, caplog: pytest.LogCaptureFixture
) -> None:
    upload("a", make_lora())
    asyncio.run(leave(world, orders.load(OPERATOR, "a")))
    assert caplog.records == []
