"""`/metrics` of a server, looked at once in a while, as a time series.

A scrape costs the server a millisecond or so; the text is kept, and parsed when the run is over.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.http_client import Endpoint

# Seconds from one scrape to the next.
EVERY = 0.5
# Sample -> what the series is called. Samples that differ in other labels are added up.
SUMS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:generation_tokens_total": "output_tokens",
    "polydelta_requests_waiting_for_adapter": "waiting_for_adapter",
    "polydelta_pool_size_pages": "pool_pages",
    "polydelta_cold_starts_total": "cold_starts",
}
# Sample -> what its series are called, and the label whose value is added to that.
BY_LABEL = {
    "polydelta_pool_pages": ("pages", "owner"),
    "polydelta_adapter_loads_total": ("adapter_loads", "tier"),
    "polydelta_adapter_load_seconds_total": ("adapter_load_seconds", "tier"),
    "polydelta_evictions_total": ("evictions", "kind"),
}


@dataclass
class Series:
    """What was seen, at the same times for all. Servers that lack a metric have no series of it."""

    # Seconds after the run's start.
    times: list[float] = field(default_factory=list)
    # Name, such as "running" or "pages_kv" -> a value for each time.
    values: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "seconds": [round(at, 3) for at in self.times],
            **{name: [round(one, 6) for one in found] for name, found in self.values.items()},
        }


def read_exposition(text: str) -> dict[str, float]:
    """The values of one scrape, by the names of their series."""
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if name := SUMS.get(sample.name):
                found[name] += sample.value
            elif sample.name in BY_LABEL:
                name, label = BY_LABEL[sample.name]
                found[f"{name}_{sample.labels.get(label, 'all')}"] += sample.value
    return dict(found)


def make_series(scrapes: Sequence[tuple[float, str]]) -> Series:
    """scrapes: seconds after the run's start, and the text. What is in some of them only, such as
    the evictions of a kind that comes late, is 0 before."""
    series, seen = Series(), [read_exposition(text) for _, text in scrapes]
    series.times = [at for at, _ in scrapes]
    for name in sorted({name for one in seen for name in one}):
        series.values[name] = [one.get(name, 0.0) for one in seen]
    return series


class Scraper:
    """Scrapes as long as its context is open."""

    def __init__(self, endpoint: Endpoint, every: float = EVERY) -> None:
        self._endpoint = endpoint
        self._every = every
        self._scrapes: list[tuple[float, str]] = []

    def series(self) -> Series:
        return make_series(self._scrapes)

    @asynccontextmanager
    async def scraping(self) -> AsyncIterator[None]:
        """Looks once more when what it watches is over: counters have their last value then."""
        began = time.perf_counter()
        watching = asyncio.create_task(self._watch(began))
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        await self._scrape(began)

    async def _watch(self, began: float) -> None:
        while True:
            await self._scrape(began)
            await asyncio.sleep(self._every)

    async def _scrape(self, began: float) -> None:
        """A scrape that fails is left out: the requests themselves tell of a server in trouble."""
        at = time.perf_counter() - began
        try:
            answer = await self._endpoint.get("/metrics")
        except OSError:
            return
        if answer.status == 200:
            self._scrapes.append((at, answer.body.decode()))
