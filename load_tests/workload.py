"""Who asks for what, and when: requests drawn from a seed.

`Synthetic` is the generator of S-LoRA (arXiv 2311.03285) with its defaults, draw by draw: from
`numpy.random.RandomState(seed)` first all adapters, then all prompt lengths, all output lengths,
and all gaps between arrivals, so that a seed gives the requests that it gives there. `Bursts`
moves the arrivals of another workload; `replay.py` takes them from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Request:
    """One request of a workload."""

    # Seconds after the start.
    at: float
    # Which one, from 0; None asks the base model.
    adapter: int | None
    prompt_tokens: int
    max_tokens: int
    # Who asks; "" where the server knows no tenants.
    tenant: str = ""


class Workload(Protocol):
    """Requests of a stretch of time."""

    @property
    def adapters(self) -> int:
        """How many there are to choose from; 0: the base model alone."""

    @property
    def duration(self) -> float:
        """Seconds in which requests come; the last ones may come a little later."""

    def requests(self) -> list[Request]:
        """In the order in which they come; the same whenever it is called."""


class Popularity(Protocol):
    """How often each adapter is asked for."""

    def draw(self, random: np.random.RandomState, count: int, adapters: int) -> NDArray[np.integer]:
        """The adapters of so many requests, each below `adapters`; shape (count,)."""


@dataclass(frozen=True)
class Power:
    """S-LoRA's: a sample in [0, 1) with density alpha x^(alpha - 1), times the number of adapters.

    alpha 1 is uniform; the smaller it is, the more goes to the first adapters. It is no exponent of
    Zipf's law.
    """

    alpha: float = 1.0

    def draw(self, random: np.random.RandomState, count: int, adapters: int) -> NDArray[np.integer]:
        chosen = (random.power(self.alpha, count) * adapters).astype(np.int64)
        # A sample just below 1 is rounded to it.
        return np.minimum(chosen, adapters - 1)


@dataclass(frozen=True)
class Zipf:
    """Adapter i is asked for in proportion to (i + 1)^-exponent; 0 is uniform."""

    exponent: float = 1.0

    def draw(self, random: np.random.RandomState, count: int, adapters: int) -> NDArray[np.integer]:
        weights = np.arange(1, adapters + 1, dtype=np.float64) ** -self.exponent
        return random.choice(adapters, count, p=weights / weights.sum())


@dataclass(frozen=True)
class Synthetic:
    """int(rate x duration) requests; lengths are uniform in their ranges, each drawn by itself."""

    # Requests a second, on average.
    rate: float
    # Seconds.
    duration: float
    adapters: int
    popularity: Popularity = Power()
    # Of the gaps between arrivals, which are of a Gamma distribution: their standard deviation over
    # their mean. 1 makes arrivals those of a Poisson process, more makes them come in clumps.
    cv: float = 1.0
    # Shortest, and one more than the longest.
    prompt_tokens: tuple[int, int] = (8, 512)
    output_tokens: tuple[int, int] = (8, 512)
    seed: int = 42

    def requests(self) -> list[Request]:
        random = np.random.RandomState(self.seed)
        count = int(self.rate * self.duration)
        chosen = self.popularity.draw(random, count, max(1, self.adapters))
        prompts = random.randint(*self.prompt_tokens, size=count)
        outputs = random.randint(*self.output_tokens, size=count)
        gaps = random.gamma(1 / self.cv**2, self.cv**2 / self.rate, count)
        return [
            Request(float(at), int(adapter) if self.adapters else None, int(prompt), int(output))
            for at, adapter, prompt, output in zip(
                np.cumsum(gaps), chosen, prompts, outputs, strict=True
            )
        ]


@dataclass(frozen=True)
class Bursts:
    """Another workload's requests, more often for a while in every period, and less in the rest of
    it: as many in all, in the same order."""

    of: Workload
    # Seconds from one burst's start to the next one's.
    every: float = 10.0
    # Seconds that a burst lasts.
    lasting: float = 2.0
    # The rate in a burst, over that of the workload; at most every / lasting, when nothing comes
    # between bursts.
    factor: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.lasting < self.every or not 0 < self.factor <= self.every / self.lasting:
            raise ValueError(
                f"Bursts of {self.lasting:g} s every {self.every:g} s cannot have {self.factor:g}"
                " times the rate: all of a period's requests would not do."
            )

    @property
    def adapters(self) -> int:
        return self.of.adapters

    @property
    def duration(self) -> float:
        return self.of.duration

    def requests(self) -> list[Request]:
        requests = self.of.requests()
        moved = self._move([request.at for request in requests])
        return [replace(one, at=float(at)) for one, at in zip(requests, moved, strict=True)]

    def _move(self, times: Sequence[float]) -> NDArray[np.float64]:
        """A period's first `lasting x factor` seconds of the workload become its burst."""
        periods, within = np.divmod(np.asarray(times, dtype=np.float64), self.every)
        ends = [0.0, self.lasting * self.factor, self.every]
        moved = np.interp(within, ends, [0.0, self.lasting, self.every])
        return np.asarray(periods * self.every + moved)


@dataclass(frozen=True)
class Tenants:
    """Several tenants' workloads at the same time. The adapters of each follow those of the one
    before: none is asked for by two."""

    of: tuple[tuple[str, Workload], ...]

    @property
    def adapters(self) -> int:
        return sum(workload.adapters for _, workload in self.of)

    @property
    def duration(self) -> float:
        return max(workload.duration for _, workload in self.of)

    def requests(self) -> list[Request]:
        found, first = [], 0
        for tenant, workload in self.of:
            for one in workload.requests():
                adapter = None if one.adapter is None else first + one.adapter
                found.append(replace(one, adapter=adapter, tenant=tenant))
            first += workload.adapters
        return sorted(found, key=lambda one: one.at)


@dataclass(frozen=True)
class Shift:
    """One workload after the other, over the same adapters."""

    first: Workload
    then: Workload

    @property
    def adapters(self) -> int:
        return max(self.first.adapters, self.then.adapters)

    @property
    def duration(self) -> float:
        return self.first.duration + self.then.duration

    def requests(self) -> list[Request]:
        later = [replace(one, at=one.at + self.first.duration) for one in self.then.requests()]
        # The last of the first ones may come a little later than the first of these.
        return sorted([*self.first.requests(), *later], key=lambda one: one.at)
