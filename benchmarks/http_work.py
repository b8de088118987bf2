"""A load of completion requests, and what comes back: the half of `http_bench` without a face."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise
from random import Random
from typing import Any

from benchmarks.http_client import Answer, Endpoint

COMPLETIONS = "/v1/completions"
# Ordinary tokens in every vocabulary of today.
TOKEN_IDS = range(1000, 30000)
# One token each in most vocabularies.
WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word"
)
PERCENTILES = (50, 90, 99)
SHOWN_ERRORS = 3
# What `Result.add` raises, and what a body of another shape runs into.
BAD_ANSWER = (ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Work:
    """What is asked for."""

    models: Sequence[str]
    requests: int
    concurrency: int
    prompt_tokens: int
    max_tokens: int
    stream: bool
    # Of the prompts.
    seed: int


@dataclass(frozen=True)
class Dialect:
    """What a server takes beside the fields that all of them take."""

    token_ids: bool = True
    ignore_eos: bool = True
    # Words in a prompt for each token that is wanted, where prompts are text.
    words: float = 1.0


@dataclass
class Result:
    """What came back; times in seconds, one for each request, token gaps one for each gap."""

    seconds: float = 0.0
    # Of this process, which the server may have wanted.
    client_cpu_seconds: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    latency: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    token_gaps: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        return len(self.latency) / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "output_tokens_per_second": round(self.tokens_per_second, 1),
            "requests_per_second": round(self.requests_per_second, 2),
            "seconds": round(self.seconds, 3),
            "client_cpu_seconds": round(self.client_cpu_seconds, 3),
            "answered": len(self.latency),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "latency_ms": percentiles(self.latency),
            "first_token_ms": percentiles(self.first_token),
            "token_gap_ms": percentiles(self.token_gaps),
            "errors": len(self.errors),
            "first_errors": self.errors[:SHOWN_ERRORS],
        }

    def add(self, answer: Answer, stream: bool) -> None:
        """Raises ValueError for an answer that is none."""
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {answer.body.decode(errors='replace')[:300]}")
        usage, times = _read_stream(answer) if stream else (json.loads(answer.body)["usage"], [])
        self.prompt_tokens += usage["prompt_tokens"]
        self.output_tokens += usage["completion_tokens"]
        self.latency.append(answer.seconds)
        if times:
            self.first_token.append(times[0] - answer.began)
            self.token_gaps += [later - sooner for sooner, later in pairwise(times)]


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds, by nearest rank; None when there are none."""
    if not seconds:
        return None
    ranked = sorted(seconds)
    found = {f"p{p}": ranked[math.ceil(len(ranked) * p / 100) - 1] for p in PERCENTILES}
    return {
        name: round(value * 1e3, 2)
        for name, value in {"mean": statistics.fmean(ranked), **found}.items()
    }


def _read_stream(answer: Answer) -> tuple[dict[str, int], list[float]]:
    """The usage, and when each piece of text came."""
    usage: dict[str, int] | None = None
    times = []
    for came, event in answer.events():
        if "choices" not in event:
            raise ValueError(json.dumps(event)[:300])
        if any(choice.get("text") for choice in event["choices"]):
            times.append(came)
        usage = event.get("usage") or usage
    if usage is None:
        raise ValueError("the stream ends without the usage that was asked for")
    return usage, times


class Prompts:
    """Bodies of requests, of which no two have the same prompt."""

    def __init__(self, work: Work, dialect: Dialect, random: Random) -> None:
        self._work = work
        self._dialect = dialect
        self._random = random

    def body(self, model: str) -> dict[str, Any]:
        work = self._work
        body: dict[str, Any] = {
            "model": model,
            "prompt": self._prompt(),
            "max_tokens": work.max_tokens,
            "temperature": 0.0,
        }
        if self._dialect.ignore_eos:
            body["ignore_eos"] = True
        if work.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return body

    def _prompt(self) -> list[int] | str:
        wanted = self._work.prompt_tokens
        if self._dialect.token_ids:
            return self._random.choices(TOKEN_IDS, k=wanted)
        count = max(1, round(wanted * self._dialect.words))
        return " ".join(self._random.choices(WORDS.split(), k=count))


async def run(endpoint: Endpoint, work: Work, dialect: Dialect, random: Random) -> Result:
    """All requests of the work, from the first one's start to the last one's end."""
    prompts, result = Prompts(work, dialect, random), Result()
    # Made beforehand, so that the clock runs for the server alone.
    bodies = [prompts.body(model) for model in islice(cycle(work.models), work.requests)]
    answers: list[Answer] = []
    waiting = iter(bodies)

    async def client() -> None:
        for body in waiting:
            try:
                answers.append(await endpoint.post(COMPLETIONS, body))
            except OSError as problem:
                result.errors.append(f"{type(problem).__name__}: {problem}")

    began, cpu_began = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(work.concurrency)))
    result.seconds = time.perf_counter() - began
    result.client_cpu_seconds = time.process_time() - cpu_began
    for answer in answers:
        try:
            result.add(answer, work.stream)
        except BAD_ANSWER as problem:
            result.errors.append(str(problem))
    return result
