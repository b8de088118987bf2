"""Sequences of the base model decode while somebody asks for an adapter that lies on disk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.stored_adapters import ALL, StoredAdapters, drop_from_page_cache
from benchmarks.timed_answer import Client, Deadline, TimedAnswer
from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.packed_file import in_memory
from polydelta.adapters_store.reference import AdapterRef

SEQUENCES, PROMPT_TOKENS, RANK = 8, 32, 64
# Tokens of each sequence before the adapter is asked for, and again before it is asked for anew.
QUIET_TOKENS = 32


@dataclass(frozen=True)
class Arrival:
    """What the others felt of one request; gaps between their tokens, in seconds."""

    # Until the step in which the request's own prompt is computed.
    waiting: list[float]
    # Of that step: the prompt's work, and the copy into the pool.
    entry: float
    first_token: float


@dataclass
class Disturbance:
    """Gaps in seconds, from all turns."""

    before: list[float] = field(default_factory=list)
    # The adapter lies on disk, packed.
    cold: list[Arrival] = field(default_factory=list)
    # It is in the pool.
    resident: list[Arrival] = field(default_factory=list)
    # What a load takes by itself: file to host RAM, the engine idle.
    load: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        median, load = statistics.median(self.before), statistics.median(self.load)
        waiting = [gap for arrival in self.cold for gap in arrival.waiting]
        entry = statistics.median(arrival.entry for arrival in self.cold)
        entry_resident = statistics.median(arrival.entry for arrival in self.resident)
        return {
            "turns": len(self.cold),
            "before_median_ms": _ms(median),
            "before_largest_ms": _ms(max(self.before)),
            "loading_median_ms": _ms(statistics.median(waiting)),
            "loading_largest_ms": _ms(max(waiting)),
            "loading_largest_typical_ms": _ms(
                statistics.median(max(arrival.waiting) for arrival in self.cold)
            ),
            "loading_largest_ratio": round(max(waiting) / median, 2),
            "entry_ms": _ms(entry),
            "entry_resident_ms": _ms(entry_resident),
            "load_ms": _ms(load),
            "loaded_in_the_loop_ms": _ms(median + load),
            "loaded_in_the_loop_ratio": round((median + load) / median, 2),
            "first_token_cold_ms": _ms(statistics.median(a.first_token for a in self.cold)),
            "first_token_resident_ms": _ms(statistics.median(a.first_token for a in self.resident)),
        }


def measure_disturbance(
    stored: StoredAdapters, turns: int, deadline: Deadline, advance: Callable[[], None]
) -> Disturbance:
    """advance: called after each turn."""
    ref = stored.publish("disturbing", RANK, ALL, seed=2000)
    engine = stored.make_engine(pages=1024, host_bytes=1 << 30, batch_size=SEQUENCES + 1)
    client, result = Client(engine, PROMPT_TOKENS), Disturbance()
    try:
        for turn in range(-1, turns):  # the first warms up
            if turn > 0 and deadline.passed:
                break
            load = _load_alone(stored, ref)
            before, cold, resident = _turn(stored, client, ref)
            advance()
            if turn >= 0:
                result.load.append(load)
                result.before += before
                result.cold.append(cold)
                result.resident.append(resident)
    finally:
        engine.shutdown()
    return result


def _load_alone(stored: StoredAdapters, ref: AdapterRef) -> float:
    drop_from_page_cache([stored.packed_file(ref)])
    began = time.perf_counter()
    in_memory(stored.tier.load(ref))
    return time.perf_counter() - began


def _turn(
    stored: StoredAdapters, client: Client, ref: AdapterRef
) -> tuple[list[float], Arrival, Arrival]:
    """Gaps of an undisturbed stretch; then the adapter comes from disk; then it is there."""
    client.engine.evict_adapter(ref).result()
    drop_from_page_cache([stored.packed_file(ref)])
    others = [client.ask(6 * QUIET_TOKENS) for _ in range(SEQUENCES)]
    _wait_for(others, QUIET_TOKENS // 2)
    began = time.perf_counter()
    _wait_for(others, 2 * QUIET_TOKENS)
    ended = time.perf_counter()
    before = [gap for other in others for gap in _gaps(other, began, ended)]
    cold = _arrive(client, ref, others)
    _wait_for(others, len(others[0].times) + QUIET_TOKENS // 2)
    resident = _arrive(client, ref, others)
    for other in others:
        other.wait()
    return before, cold, resident


def _arrive(client: Client, ref: AdapterRef, others: list[TimedAnswer]) -> Arrival:
    answer = client.ask(1, (Share(ref),)).wait()
    # The first token comes at the end of the step in which the prompt was computed, after the
    # others' tokens of that step.
    gaps = [_gaps(other, answer.began, answer.times[0]) for other in others]
    return Arrival(
        [gap for some in gaps for gap in some[:-1]],
        max(some[-1] for some in gaps),
        answer.first_token,
    )


def _gaps(other: TimedAnswer, began: float, ended: float) -> list[float]:
    """Those that end in a stretch of time."""
    return [end - start for start, end in pairwise(other.times) if began < end <= ended]


def _wait_for(answers: list[TimedAnswer], tokens: int) -> None:
    while any(len(answer.times) < tokens for answer in answers):
        time.sleep(0.002)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)
