"""The driver against a server without a model."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from benchmarks.http_client import Answer, Endpoint
from load_tests.driver import Clock, Planned, Record, Sent, drive, drive_closed, failures, plan
from load_tests.workload import Request

NAMES = ["dates", "names"]


def requests(count: int, every: float = 0.02) -> list[Request]:
    """In turn to the base and to both adapters."""
    return [
        Request(number * every, (None, 0, 1)[number % 3], 5 + number, 3) for number in range(count)
    ]


def send(server: Any, planned: list[Planned]) -> list[Record]:
    return asyncio.run(drive({"": Endpoint(server.url)}, planned))


def test_a_plan_asks_the_right_models_for_the_right_lengths():
    planned = plan(requests(3), "base", NAMES, seed=1)
    bodies = [one.body for one in planned]
    assert [body["model"] for body in bodies] == ["base", "dates", "names"]
    assert [len(body["prompt"]) for body in bodies] == [5, 6, 7]
    assert all(body["max_tokens"] == 3 and body["ignore_eos"] for body in bodies)
    assert plan(requests(3), "base", NAMES, seed=1) == planned
    assert plan(requests(3), "base", NAMES, seed=2) != planned


def test_every_request_is_sent_at_its_time_however_many_are_in_flight(fake_server):
    planned = plan(requests(9), "base", NAMES, seed=0)
    ended = []
    records = asyncio.run(drive({"": Endpoint(fake_server.url)}, planned, lambda: ended.append(1)))
    assert len(ended) == 9
    assert Counter(body["model"] for body in fake_server.asked) == {
        "base": 3,
        "dates": 3,
        "names": 3,
    }
    assert [one.adapter for one in records] == [None, 0, 1] * 3
    assert [one.scheduled for one in records] == [one.request.at for one in planned]
    for one in records:
        assert one.served
        assert one.status == 200
        assert one.tokens == 3
        assert len(one.token_times) == 3
        assert one.scheduled <= one.sent < one.token_times[0] < one.token_times[2] <= one.ended
        assert one.per_token is not None
        assert 0 < one.first_token < one.seconds


def test_refusals_and_broken_answers_are_outcomes_of_their_requests(fake_server, stream_of):
    turns = iter(
        [
            (429, "slow down"),
            (503, ""),
            (200, ['data: {"error": {"message": "no room"}}\n\n', "data: [DONE]\n\n"]),
            (200, stream_of(2)[:2]),
            (200, "data: {\n\n"),
            (200, stream_of(3)),
        ]
    )
    fake_server.respond = lambda body: next(turns)
    records = send(fake_server, plan(requests(6), "base", NAMES, seed=0))
    assert [one.status for one in records] == [429, 503, 200, 200, 200, 200]
    assert [one.served for one in records] == [False] * 5 + [True]
    said = list(failures(records))
    assert said[:2] == ["429: slow down", "503: an empty body"]
    assert "no room" in said[2]
    assert "without the usage" in said[3]
    assert len(said) == 5


def test_a_server_that_is_not_there_is_an_outcome():
    planned = plan(requests(2), "base", NAMES, seed=0)
    records = asyncio.run(drive({"": Endpoint("http://127.0.0.1:9")}, planned))
    assert [(one.status, one.served, one.token_times) for one in records] == [(0, False, ())] * 2
    assert next(failures(records)).startswith("no answer: ConnectionRefusedError")


def test_a_closed_loop_keeps_so_many_in_flight(fake_server):
    planned = plan(requests(10, every=1000.0), "base", NAMES, seed=0)
    records = asyncio.run(drive_closed({"": Endpoint(fake_server.url)}, planned, 3))
    assert fake_server.most_in_flight == 3
    assert len(records) == 10
    assert all(one.served and one.sent >= one.scheduled for one in records)
    assert max(one.ended for one in records) < 100


def test_a_tenant_asks_with_its_own_key(fake_server):
    asked = [Request(0.0, None, 5, 2, tenant) for tenant in ("light", "", "keyless")]
    endpoints = {"": Endpoint(fake_server.url, "ours"), "light": Endpoint(fake_server.url, "its")}
    records = asyncio.run(drive_closed(endpoints, plan(asked, "base", NAMES, seed=0), 1))
    assert fake_server.keys == ["its", "ours", "ours"]
    assert [one.tenant for one in records] == ["light", "", "keyless"]


def test_a_late_sender_counts_against_the_request():
    clock = Clock()
    clock.began = 100.0
    one = Planned(Request(1.0, 4, 7, 2), {})
    pieces = [
        (103.0, b'data: {"choices": [{"text": "a"}]}\n\n'),
        (103.5, b'data: {"choices": [{"text": "b"}]}\n\n'),
        (104.0, b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'),
    ]
    record = Sent(one, clock, 1.0, 2.5, 4.0, Answer(102.5, 200, pieces)).record()
    assert record == Record(4, 7, 2, 1.0, 2.5, 4.0, 200, 2, (3.0, 3.5))
    assert (record.first_token, record.seconds, record.per_token) == (2.0, 3.0, 0.5)


def test_tokens_without_text_have_come_when_the_stream_ends():
    piece = b'data: {"choices": [{"text": ""}], "usage": {"completion_tokens": 1}}\n\n'
    clock = Clock()
    answer = Answer(clock.began, 200, [(clock.began + 2.0, piece)])
    record = Sent(Planned(Request(0.0, None, 1, 1), {}), clock, 0.0, 0.0, 2.0, answer).record()
    assert record.token_times == (2.0,)
    assert record.per_token is None


def test_the_clock_counts_from_its_start():
    clock = Clock()
    assert 0 <= clock.now() <= time.perf_counter() - clock.began + 1e-3
