"""Uniform traffic over more and more adapters, with a pool that has room for a few of them."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from random import Random
from typing import Any

from benchmarks.stored_adapters import ATTENTION, BLOCK_TOKENS, StoredAdapters, drop_from_page_cache
from benchmarks.timed_answer import PATIENCE, Client, Deadline, TimedAnswer
from polydelta.adapters_store.reference import AdapterRef
from polydelta.adapters_store.store import AdapterStore

RANK, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 32
IN_FLIGHT, ROOM, HOST_ROOM = 16, 20, 100


@dataclass
class Round:
    """A stretch in which the number of requests in flight never changed."""

    seconds: float
    tokens: int
    first_token: list[float]
    loads: int
    evictions: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Case:
    """One number of adapters."""

    name: str
    adapters: int
    # One after the other, so that no two requests in flight share one; otherwise drawn at random.
    in_turn: bool = False
    rounds: list[Round] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(one.tokens_per_second for one in self.rounds)

    def first_token(self, percent: int) -> float:
        """A percentile over the requests of all rounds, in seconds."""
        times = sorted(time for one in self.rounds for time in one.first_token)
        return times[min(len(times) - 1, len(times) * percent // 100)]

    def names(self, seed: int) -> Iterator[str]:
        """The adapters of one request after the other."""
        random = Random(seed)
        for number in count():
            chosen = number % self.adapters if self.in_turn else random.randrange(self.adapters)
            yield adapter_name(chosen)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "adapters": self.adapters,
            "requests": sum(len(one.first_token) for one in self.rounds),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "first_token_p50_ms": round(self.first_token(50) * 1e3, 1),
            "first_token_p99_ms": round(self.first_token(99) * 1e3, 1),
            "loads": sum(one.loads for one in self.rounds),
            "evictions": sum(one.evictions for one in self.rounds),
            "rounds_tokens_per_second": [round(o.tokens_per_second, 1) for o in self.rounds],
        }


def make_cases(adapters: int) -> list[Case]:
    return [
        Case("5", 5),
        Case("20", ROOM),
        Case("40", 2 * ROOM),
        Case(f"{adapters:,}", adapters),
        Case("20 in turn", ROOM, in_turn=True),
    ]


def adapter_name(number: int) -> str:
    return f"customer-{number:05d}"


def register(
    stored: StoredAdapters, count: int, deadline: Deadline, advance: Callable[[], None]
) -> list[AdapterRef]:
    """Fewer than asked for when the deadline passes. advance: called after each."""
    refs = []
    for number in range(count):
        if number >= 2 * ROOM and deadline.passed:
            break
        refs.append(stored.publish(adapter_name(number), RANK, ATTENTION, seed=10000 + number))
        advance()
    return refs


def measure_cases(
    stored: StoredAdapters,
    refs: Sequence[AdapterRef],
    cases: Sequence[Case],
    rounds: int,
    requests: int,
    deadline: Deadline,
    advance: Callable[[], None],
) -> None:
    """requests: of each round. All cases take turns, so that a machine that drifts drifts for all.
    advance: called after each round of a case."""
    pages = stored.pages(refs[0])
    sequence_pages = -(-(PROMPT_TOKENS + NEW_TOKENS) // BLOCK_TOKENS)
    engine = stored.make_engine(
        ROOM * pages + IN_FLIGHT * sequence_pages,
        HOST_ROOM * stored.tier.load(refs[0]).nbytes,
        IN_FLIGHT,
    )
    client = Client(engine, PROMPT_TOKENS)
    try:
        for number in range(rounds):
            if number and deadline.passed:
                break
            for case in cases:
                # What an earlier case has read must not make this one's disk faster.
                drop_from_page_cache(map(stored.packed_file, refs[: case.adapters]))
                case.rounds.append(Traffic(stored.store, client, case.names(number)).run(requests))
                advance()
    finally:
        engine.shutdown()


class Traffic:
    """Keeps requests in flight: whenever one ends, the next one is sent."""

    def __init__(self, store: AdapterStore, client: Client, names: Iterator[str]) -> None:
        """names: the adapters of one request after the other."""
        self._store = store
        self._client = client
        self._names = names
        self._ended = threading.Semaphore(0)
        self._answers: list[TimedAnswer] = []

    def run(self, requests: int) -> Round:
        """Counts between some that warm up and those that are in flight at the end."""
        # Of different lengths, so that they do not all end, and enter, together.
        for number in range(IN_FLIGHT):
            self._ask(NEW_TOKENS * (number + 1) // IN_FLIGHT)
        self._follow(min(requests, 2 * ROOM))
        stats, first = self._client.engine.stats, len(self._answers)
        began, before = time.perf_counter(), stats()
        self._follow(requests)
        ended, after = time.perf_counter(), stats()
        for _ in range(IN_FLIGHT):
            self._wait()
        for answer in self._answers:
            answer.wait()
        tokens = sum(began < at <= ended for answer in self._answers for at in answer.times)
        return Round(
            ended - began,
            tokens,
            [answer.first_token for answer in islice(self._answers, first, first + requests)],
            after.adapter_loads - before.adapter_loads,
            after.adapter_evictions - before.adapter_evictions,
        )

    def _follow(self, requests: int) -> None:
        """Sends so many, each when another one has ended."""
        for _ in range(requests):
            self._wait()
            self._ask(NEW_TOKENS)

    def _wait(self) -> None:
        if not self._ended.acquire(timeout=PATIENCE):
            raise RuntimeError(f"No request has ended within {PATIENCE:.0f} s.")

    def _ask(self, max_tokens: int) -> None:
        answer = TimedAnswer(self._ended.release)
        self._answers.append(answer)
        # Looked up as for every request of a client; nothing is deleted here, so that the lease
        # may end before the answer does.
        with self._store.lease([(next(self._names), 1.0)]) as lease:
            self._client.ask(max_tokens, lease.shares, answer)
