"""What the records of a run come to."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.http_work import percentiles
from load_tests.driver import Record

# Statuses of a server that says no because it is busy.
REFUSALS = (429, 503)


@dataclass(frozen=True)
class Throughput:
    """What was served in a stretch of time."""

    seconds: float
    requests: int
    output_tokens: int

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, float]:
        return {
            "seconds": round(self.seconds, 3),
            "requests": self.requests,
            "requests_per_second": round(self.requests_per_second, 3),
            "output_tokens_per_second": round(self.tokens_per_second, 1),
        }


def throughput(records: Sequence[Record], edge: float = 0.0) -> Throughput:
    """Of the requests that were served, from the run's start to the last one's end; or of those
    that ended at least `edge` seconds after the one and before the other."""
    end = max((one.ended for one in records), default=0.0)
    served = [one for one in records if one.served and edge <= one.ended <= end - edge]
    return Throughput(max(0.0, end - 2 * edge), len(served), sum(one.tokens for one in served))


def attainment(records: Sequence[Record], bound: float) -> float:
    """Share of all requests whose first token came in less than `bound` seconds. One that was not
    served has missed it."""
    met = sum(one.served and one.first_token < bound for one in records)
    return met / len(records) if records else 0.0


def satisfaction(records: Sequence[Record], bound: float) -> float:
    """S-LoRA's: the mean over all requests of 1 - (t / bound)^2, where t is the time to the first
    token, and of 0 where that is over the bound or never came. S-LoRA's bound is 6 s."""
    if not records:
        return 0.0
    return statistics.fmean(
        max(0.0, 1 - (one.first_token / bound) ** 2) if one.served else 0.0 for one in records
    )


@dataclass(frozen=True)
class AdapterService:
    """How one adapter's requests were served."""

    # None: the base model.
    adapter: int | None
    requests: int
    # Output tokens that a request got for each second of its stay; the mean over its requests, of
    # which one that was not served counts 0.
    service: float


def services(records: Iterable[Record]) -> list[AdapterService]:
    """Of every adapter that was asked for, in order, the base model first."""
    by_adapter = defaultdict(list)
    for one in records:
        by_adapter[one.adapter].append(one.tokens / one.seconds if one.served else 0.0)
    return [
        AdapterService(adapter, len(by_adapter[adapter]), statistics.fmean(by_adapter[adapter]))
        for adapter in sorted(by_adapter, key=lambda number: -1 if number is None else number)
    ]


def jain(values: Sequence[float]) -> float | None:
    """Jain's index (sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def max_over_min(values: Sequence[float]) -> float | None:
    """None when there is none, or one got nothing."""
    least = min(values, default=0.0)
    return max(values) / least if least else None


def outcomes(records: Iterable[Record]) -> dict[str, int]:
    """Requests by what became of them: "served", a status, "broken" for an answer that began well,
    or "no answer"."""
    return dict(Counter(map(_outcome, records)).most_common())


def _outcome(one: Record) -> str:
    if one.served:
        return "served"
    if one.status == 200:
        return "broken"
    return str(one.status) if one.status else "no answer"


def figures(records: Sequence[Record], bound: float, edge: float) -> dict[str, Any]:
    """All of it, as it stands in a result file. bound: of the first token, in seconds; edge:
    seconds at both ends that the second throughput leaves out."""
    served = [one for one in records if one.served]
    found = [one.service for one in services(records)]
    per_token = [one.per_token for one in served if one.per_token is not None]
    late = [one.sent - one.scheduled for one in records]
    fairness = jain(found)
    spread = max_over_min(found)
    return {
        "requests": len(records),
        "outcomes": outcomes(records),
        "refused": sum(one.status in REFUSALS for one in records),
        "failed": sum(not one.served and one.status not in REFUSALS for one in records),
        "throughput": throughput(records).to_json(),
        "throughput_without_ends": throughput(records, edge).to_json(),
        "first_token_ms": percentiles([one.first_token for one in served]),
        "per_token_ms": percentiles(per_token),
        "request_ms": percentiles([one.seconds for one in served]),
        "slo_attainment": round(attainment(records, bound), 4),
        "satisfaction": round(satisfaction(records, bound), 4),
        "jain_fairness": None if fairness is None else round(fairness, 4),
        "max_over_min_service": None if spread is None else round(spread, 3),
        "lateness_ms": percentiles(late),
        "tenants": tenants(records, bound),
    }


def tenants(records: Iterable[Record], bound: float) -> dict[str, Any]:
    """By tenant, where there are any."""
    by_tenant = defaultdict(list)
    for one in records:
        if one.tenant:
            by_tenant[one.tenant].append(one)
    return {
        tenant: {
            "requests": len(asked),
            "outcomes": outcomes(asked),
            "first_token_ms": percentiles([one.first_token for one in asked if one.served]),
            "slo_attainment": round(attainment(asked, bound), 4),
        }
        for tenant, asked in by_tenant.items()
    }
