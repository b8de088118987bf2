"""Sends a workload to a server, and keeps what became of each request.

The load generator shares the machine's cores with the server, so that bodies are made before the
clock starts, and answers are parsed when it has stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.http_client import Answer, Endpoint
from benchmarks.http_work import BAD_ANSWER, COMPLETIONS, TOKEN_IDS
from load_tests.workload import Request

SHOWN_CHARACTERS = 300
# The server with each tenant's key; "": with that of all other requests.
Endpoints = Mapping[str, Endpoint]


@dataclass(frozen=True)
class Record:
    """What became of one request; times in seconds after the run's start."""

    # None: the base model.
    adapter: int | None
    # What was asked for.
    prompt_tokens: int
    max_tokens: int
    # When it was due, and when it was sent. Latencies count from the former: a load generator that
    # is late must not flatter the server.
    scheduled: float
    sent: float
    # When the last byte came, or when the attempt failed.
    ended: float
    # 0: no answer came.
    status: int
    # Output tokens, by the server's usage.
    tokens: int = 0
    # When each piece of text came; of a served request never empty.
    token_times: tuple[float, ...] = ()
    # Why it was not served.
    error: str | None = None
    tenant: str = ""

    @property
    def served(self) -> bool:
        return self.error is None

    @property
    def first_token(self) -> float:
        """Seconds from when a served request was due."""
        return self.token_times[0] - self.scheduled

    @property
    def seconds(self) -> float:
        return self.ended - self.scheduled

    @property
    def per_token(self) -> float | None:
        """Seconds for each output token after the first; None if there is none."""
        if self.tokens < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.tokens - 1)


@dataclass(frozen=True)
class Planned:
    """A request and its body."""

    request: Request
    body: Mapping[str, Any]


def plan(
    requests: Sequence[Request], base: str, adapters: Sequence[str], seed: int
) -> list[Planned]:
    """Greedy streams that do not end before their length. adapters: names, by number. Prompts are
    random tokens: equal ones would find their KV in a prefix cache."""
    random = np.random.RandomState(seed)
    return [
        Planned(
            one,
            {
                "model": base if one.adapter is None else adapters[one.adapter],
                "prompt": random.randint(
                    TOKEN_IDS.start, TOKEN_IDS.stop, size=one.prompt_tokens
                ).tolist(),
                "max_tokens": one.max_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
        for one in requests
    ]


async def drive(
    endpoints: Endpoints, planned: Sequence[Planned], advance: Callable[[], None] = lambda: None
) -> list[Record]:
    """Open loop: each request is sent when it is due, however many are in flight. advance: called
    when one ends."""
    clock, sending = Clock(), []
    async with asyncio.TaskGroup() as group:
        for one in planned:
            await asyncio.sleep(one.request.at - clock.now())
            sending.append(group.create_task(_send(endpoints, one, clock, one.request.at, advance)))
    return [task.result().record() for task in sending]


async def drive_closed(
    endpoints: Endpoints,
    planned: Sequence[Planned],
    in_flight: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Closed loop: so many are in flight, and whenever one ends, the next one is sent. When the
    workload would have sent them does not matter."""
    clock, ended, waiting = Clock(), list[Sent](), iter(planned)

    async def client() -> None:
        for one in waiting:
            ended.append(await _send(endpoints, one, clock, clock.now(), advance))

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(client())
    return [one.record() for one in ended]


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.began


@dataclass(frozen=True)
class Sent:
    """A request that has ended, its answer still unread."""

    planned: Planned
    clock: Clock
    scheduled: float
    sent: float
    ended: float
    # Or why there is none.
    answer: Answer | str

    def record(self) -> Record:
        """Reads the answer; one that makes no sense is an error, as is one that says so."""
        if isinstance(self.answer, str):
            return self._record(0, error=self.answer)
        answer = self.answer
        if answer.status != 200:
            text = answer.body.decode(errors="replace")
            return self._record(answer.status, error=text[:SHOWN_CHARACTERS] or "an empty body")
        try:
            tokens, times = self._read(answer)
        except BAD_ANSWER as problem:
            return self._record(answer.status, error=repr(problem)[:SHOWN_CHARACTERS])
        return self._record(answer.status, tokens=tokens, token_times=times)

    def _read(self, answer: Answer) -> tuple[int, tuple[float, ...]]:
        """Output tokens, and when each piece of text came."""
        tokens, times = None, []
        for came, event in answer.events():
            if "choices" not in event:
                raise ValueError(event)
            if any(choice.get("text") for choice in event["choices"]):
                times.append(came - self.clock.began)
            if usage := event.get("usage"):
                tokens = usage["completion_tokens"]
        if tokens is None:
            raise ValueError("the stream ends without the usage that was asked for")
        # Tokens without a text, half a character for example, have come when the stream ends.
        return tokens, tuple(times or [self.ended])

    def _record(self, status: int, **fields: Any) -> Record:
        request = self.planned.request
        return Record(
            request.adapter,
            request.prompt_tokens,
            request.max_tokens,
            self.scheduled,
            self.sent,
            self.ended,
            status,
            tenant=request.tenant,
            **fields,
        )


async def _send(
    endpoints: Endpoints,
    one: Planned,
    clock: Clock,
    scheduled: float,
    advance: Callable[[], None],
) -> Sent:
    sent = clock.now()
    answer: Answer | str
    try:
        endpoint = endpoints.get(one.request.tenant) or endpoints[""]
        answer = await endpoint.post(COMPLETIONS, one.body)
        ended = answer.began - clock.began + answer.seconds
    except OSError as problem:
        answer, ended = f"{type(problem).__name__}: {problem}", clock.now()
    advance()
    return Sent(one, clock, scheduled, sent, ended, answer)


def failures(records: Sequence[Record]) -> Iterator[str]:
    """Why requests were not served, the status first."""
    for one in records:
        if one.error is not None:
            yield f"{one.status or 'no answer'}: {one.error}"
