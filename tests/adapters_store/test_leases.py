from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.leases import Leases
from polydelta.adapters_store.reference import AdapterRef


def ref(name: str, version: int = 1) -> AdapterRef:
    return AdapterRef(name, version, Path(name))


A, B = ref("a"), ref("b")


@pytest.fixture
def idle() -> list[AdapterRef]:
    """Versions whose last user has gone, as they were told."""
    return []


@pytest.fixture
def leases(idle: list[AdapterRef]) -> Leases:
    return Leases(idle.append)


def test_a_lease_has_what_it_was_taken_for(leases: Leases) -> None:
    shares = (Share(A), Share(B, 0.5))
    lease = leases.take("a@1 + 0.5 b@1", shares, [A, B])
    assert (lease.name, lease.shares, lease.held) == ("a@1 + 0.5 b@1", shares, (A, B))


def test_users_are_counted_by_version(leases: Leases) -> None:
    leases.take("a@1", (), [A])
    leases.take("a@1 + b@1", (), [A, B])
    assert [leases.users(r) for r in (A, B, ref("a", 2))] == [2, 1, 0]


def test_a_version_is_told_idle_once_when_its_last_user_has_gone(
    leases: Leases, idle: list[AdapterRef]
) -> None:
    first, second = leases.take("", (), [A, B]), leases.take("", (), [A])
    first.release()
    assert idle == [B]
    second.release()
    assert idle == [B, A]
    assert leases.users(A) == leases.users(B) == 0


def test_a_second_release_does_nothing(leases: Leases, idle: list[AdapterRef]) -> None:
    leases.take("", (), [A])
    lease = leases.take("", (), [A])
    lease.release()
    lease.release()
    assert leases.users(A) == 1
    assert idle == []


def test_a_lease_is_released_by_the_end_of_a_block_however_it_ends(leases: Leases) -> None:
    def fail() -> None:
        with leases.take("", (), [A]):
            assert leases.users(A) == 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert leases.users(A) == 0


def test_who_is_told_may_ask_and_lease_again(leases: Leases) -> None:
    told: list[int] = []
    again = Leases(lambda r: told.append(again.users(r)))
    again.take("", (), [A]).release()
    assert told == [0]


def test_uses_are_taken_once(leases: Leases) -> None:
    before = time.time()
    leases.take("", (), [A]).release()
    leases.take("", (), [A, B])
    uses = {r: (count, when) for r, count, when in leases.take_uses()}
    assert {r: count for r, (count, _) in uses.items()} == {A: 2, B: 1}
    assert all(before <= when <= time.time() for _, when in uses.values())
    assert leases.take_uses() == []
    assert leases.users(A) == 1


def test_uses_that_are_put_back_are_added_to_later_ones(leases: Leases) -> None:
    leases.take("", (), [A, B]).release()
    taken = leases.take_uses()
    after = time.time()
    leases.take("", (), [A]).release()
    leases.put_back(taken)
    uses = {r: (count, when) for r, count, when in leases.take_uses()}
    assert {r: count for r, (count, _) in uses.items()} == {A: 2, B: 1}
    assert uses[B][1] <= after <= uses[A][1]


def test_threads_that_come_and_go_leave_nobody_and_lose_no_use(
    leases: Leases, idle: list[AdapterRef]
) -> None:
    taken: list[int] = []
    keep = leases.take("", (), [B])

    def use() -> None:
        for _ in range(200):
            leases.take("", (), [A, B]).release()
        taken.extend(count for r, count, _ in leases.take_uses() if r == A)

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (leases.users(A), leases.users(B)) == (0, 1)
    assert sum(taken) + sum(count for r, count, _ in leases.take_uses() if r == A) == 1200
    assert B not in idle
    keep.release()
    assert idle[-1] == B
