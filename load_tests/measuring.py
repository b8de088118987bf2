"""One run of a suite, against a server that is ready."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.http_client import Endpoint
from load_tests.driver import Record, drive, drive_closed, failures, plan
from load_tests.run import Run
from load_tests.scrape import Scraper, Series
from load_tests.workload import Request

# Before the clock starts: requests to the base model, and how many are in flight.
WARMING = [Request(0.0, None, 16, 16)] * 8
IN_FLIGHT = 8


@dataclass(frozen=True)
class Models:
    """What a server lists."""

    base: str
    adapters: list[str]


@dataclass(frozen=True)
class Outcome:
    """What one run came to."""

    models: Models
    records: list[Record]
    series: Series
    # Of this process, which the server may have wanted.
    client_cpu_seconds: float
    # Of the prompts.
    prompt_seed: int


async def learn_models(endpoint: Endpoint) -> Models:
    """Raises RuntimeError for a server that lists no base model. Adapters are the models that have
    a parent, as they have with us and with vLLM."""
    answer = await endpoint.get("/v1/models")
    if answer.status != 200:
        raise RuntimeError(f"{endpoint.url}/v1/models answers {answer.status}.")
    cards = json.loads(answer.body)["data"]
    bases = [card["id"] for card in cards if not card.get("parent")]
    if not bases:
        raise RuntimeError(f"{endpoint.url}/v1/models lists no base model.")
    return Models(bases[0], [card["id"] for card in cards if card.get("parent")])


async def measure(
    endpoint: Endpoint, run: Run, advance: Callable[[], None] = lambda: None
) -> Outcome:
    """Warms up, then runs. A server with fewer adapters than the run asks for stands in with those
    that it has, in turn. advance: called when a request of the run ends.

    Raises RuntimeError for a server that answers none of the requests that warm it up, or that has
    no adapters where some are asked for."""
    models = await learn_models(endpoint)
    wanted = max(run.workload.adapters, run.registered)
    if wanted and not models.adapters:
        raise RuntimeError(f"{endpoint.url} lists no adapters, of which {run.name!r} needs some.")
    names = models.adapters[:wanted]
    # The same prompts once more would find their KV in the prefix cache of a server at a URL.
    seed = time.time_ns() % 2**32
    requests = [_for_one_of(len(names), request) for request in run.workload.requests()]
    endpoints = {"": endpoint} | {
        tenant: Endpoint(endpoint.url, key) for tenant, key in run.tenant_keys
    }
    warming = [*WARMING, *(Request(0.0, one, 8, 1) for one in _visited(run, requests, len(names)))]
    warmed = await drive_closed(endpoints, plan(warming, models.base, names, seed), IN_FLIGHT)
    if not any(one.served for one in warmed):
        raise RuntimeError(f"{endpoint.url} serves nothing: {next(failures(warmed))}")
    planned = plan(requests, models.base, names, seed + 1)
    scraper, cpu = Scraper(endpoint), time.process_time()
    async with scraper.scraping():
        if run.in_flight is None:
            records = await drive(endpoints, planned, advance)
        else:
            records = await drive_closed(endpoints, planned, run.in_flight, advance)
    cpu = time.process_time() - cpu
    return Outcome(models, records, scraper.series(), cpu, seed)


def _for_one_of(adapters: int, request: Request) -> Request:
    """The request, for an adapter that there is."""
    if request.adapter is None:
        return request
    return replace(request, adapter=request.adapter % adapters)


def _visited(run: Run, requests: Sequence[Request], adapters: int) -> Iterable[int]:
    """The numbers of the adapters that one token is asked of before the clock starts. Those that
    are asked for come in that order: few that are left in the pool are soon asked for once more."""
    if run.visits == "asked":
        return dict.fromkeys(one.adapter for one in requests if one.adapter is not None)
    return range(min(run.visits, adapters))
