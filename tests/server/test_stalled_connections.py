"""When a connection counts as stalled."""

from __future__ import annotations

import pytest

from polydelta.server.stalled_connections import StalledConnections


class Connection:
    """As much of uvicorn's as is looked at."""

    def __init__(self, cycle: object = None, written: int = 0) -> None:
        self.cycle = cycle
        self.client = ("127.0.0.1", 5)
        self.written = written
        self.aborted = False
        self.transport = self

    def get_write_buffer_size(self) -> int:
        return self.written

    def abort(self) -> None:
        self.aborted = True


class Cycle:
    """One request, and what is answered."""

    def __init__(self, complete: bool) -> None:
        self.response_complete = complete


@pytest.fixture
def aborted_after():
    """Seconds until it is aborted; None if it is not in 30."""
    stalled = StalledConnections(head_seconds=5, reader_seconds=9)

    def look(connection, change=lambda second: None):
        for second in range(30):
            change(second)
            stalled.end([connection, Connection()], now=100.0 + second)
            if connection.aborted:
                return second
        return None

    return look


def test_the_head_of_a_request_must_come_in_time(aborted_after):
    assert aborted_after(Connection()) == 5
    assert aborted_after(Connection(Cycle(complete=True))) == 5


def test_what_was_written_must_be_taken_in_time(aborted_after):
    assert aborted_after(Connection(Cycle(complete=False), written=7)) == 9
    assert aborted_after(Connection(Cycle(complete=True), written=7)) == 9


def test_an_answer_may_be_made_for_as_long_as_it_takes(aborted_after):
    assert aborted_after(Connection(Cycle(complete=False))) is None


def test_a_client_that_takes_something_now_and_then_is_only_slow(aborted_after):
    connection = Connection(Cycle(complete=False), written=1000)

    def take(second):
        if second % 8 == 0:
            connection.written -= 10

    assert aborted_after(connection, take) is None


def test_a_new_request_begins_the_time_anew(aborted_after):
    connection = Connection(Cycle(complete=True))

    def ask(second):
        if second == 3:
            connection.cycle = Cycle(complete=True)

    assert aborted_after(connection, ask) == 8


def test_what_has_gone_is_forgotten():
    stalled, gone = StalledConnections(head_seconds=5), Connection()
    stalled.end([gone], now=0.0)
    stalled.end([], now=1.0)
    stalled.end([gone], now=6.0)
    assert not gone.aborted
