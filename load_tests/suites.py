"""The table of suites: what `python -m load_tests.report NAME` runs.

Rates, lengths and pools are for two cores and the default model, which is about an eighth as wide
as S-LoRA's Llama-7B. What S-LoRA (arXiv 2311.03285) publishes is divided by eight: lengths, uniform
in [8, 64) where it has [8, 512), ranks, and the tokens that the pool has room for. Its rates are
times four: 8 a second is a little more than two cores do with the 200 adapters of setting S2 (7.4),
as 2 a second was there (1.6).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from load_tests.made_adapters import AdapterSet
from load_tests.replay import Replay
from load_tests.workload import Bursts, Power, Synthetic, Workload, Zipf

LENGTHS = (8, 64)


@dataclass(frozen=True)
class Run:
    """One server and one workload."""

    name: str
    workload: Workload
    # Of the adapters, in turn, and which linear layers they change: a key of
    # `made_adapters.MODULES`.
    ranks: tuple[int, ...] = (8,)
    modules: str = "attention"
    # Options of `polydelta serve`, one after the other.
    server: tuple[str, ...] = ()
    # Closed loop: requests in flight, whenever the workload would have sent them; None: open loop.
    in_flight: int | None = None
    # One token is asked of each adapter before the clock starts, so that all are in host memory, as
    # S-LoRA has them from the start. Takes some 70 ms for each.
    visit_adapters: bool = False
    # The first token's bound, and what the second throughput leaves out at both ends; seconds.
    slo_seconds: float = 6.0
    edge_seconds: float = 10.0

    @property
    def adapter_set(self) -> AdapterSet | None:
        """Adapters that the server is started with."""
        if not self.workload.adapters:
            return None
        return AdapterSet(self.workload.adapters, self.ranks, self.modules)


@dataclass(frozen=True)
class Suite:
    """Runs that belong together."""

    about: str
    runs: tuple[Run, ...]

    def only(self, text: str) -> Suite:
        """The runs whose names have it in them."""
        return replace(self, runs=tuple(run for run in self.runs if text in run.name))

    def replaying(self, trace: Path) -> Suite:
        """The same runs with as many requests, which come from a trace file."""
        return replace(self, runs=tuple(_replaying(trace, self.runs)))


def _replaying(trace: Path, runs: Iterable[Run]) -> Iterable[Run]:
    for run in runs:
        old = run.workload
        workload = Replay(trace, old.duration, old.adapters, count=len(old.requests()))
        yield replace(run, workload=workload)


def _short() -> Suite:
    load = Synthetic(4.0, 20.0, 5, Power(1.0), 1.0, LENGTHS, LENGTHS)
    pool, edge = ("--pool", "256MiB"), 2.0
    # Room for a dozen sequences and some thirty adapters.
    small_pool = ("--pool", "56MiB")
    return Suite(
        "The same load on more and more adapters, in bursts, and more than the machine can do;"
        " three to five minutes.",
        (
            Run("base only", replace(load, adapters=0), server=pool, edge_seconds=edge),
            Run("5 adapters", load, server=pool, edge_seconds=edge),
            Run(
                "200 adapters, small pool",
                replace(load, adapters=200, popularity=Zipf(1.0)),
                ranks=(1, 2, 4, 8),
                server=small_pool,
                edge_seconds=edge,
            ),
            Run(
                "20 adapters, bursts",
                Bursts(replace(load, adapters=20)),
                server=pool,
                edge_seconds=edge,
            ),
            Run(
                "5 adapters, overload",
                replace(load, rate=50.0, duration=12.0),
                server=pool,
                edge_seconds=edge,
            ),
        ),
    )


def _slora() -> Suite:
    """S-LoRA's settings S1 (rank 8) and S2 (ranks 64 to 8) as on an A10G, and its sweeps."""
    base = Synthetic(8.0, 120.0, 200, Power(1.0), 1.0, LENGTHS, LENGTHS)
    s1, s2 = (1,), (8, 4, 2, 1)

    def run(name: str, workload: Synthetic, ranks: tuple[int, ...]) -> Run:
        # 110 pages, 1,760 tokens; 14,000 in the paper.
        return Run(name, workload, ranks, server=("--pool", "38800KiB"), visit_adapters=True)

    counts = (1, 20, 200)
    return Suite(
        "S-LoRA's settings and sweeps at one eighth; 40 to 60 minutes.",
        (
            run("no adapters", replace(base, adapters=0), s1),
            *(run(f"S1, n {count}", replace(base, adapters=count), s1) for count in counts),
            *(run(f"S2, n {count}", replace(base, adapters=count), s2) for count in counts),
            *(run(f"S1, rate {rate:g}", replace(base, rate=rate), s1) for rate in (4.0, 6.0, 10.0)),
            *(
                run(f"S2, alpha {alpha:g}", replace(base, popularity=Power(alpha)), s2)
                for alpha in (0.1, 0.3, 0.6)
            ),
            *(run(f"S2, cv {cv:g}", replace(base, cv=cv), s2) for cv in (2.0, 4.0, 6.0, 8.0)),
        ),
    )


def _scale() -> Suite:
    """As fast as the server can at 16 in flight, so that throughputs compare; then first tokens
    at a rate that it can follow."""
    base = Synthetic(8.0, 60.0, 5, Power(1.0), 1.0, LENGTHS, LENGTHS)

    def run(name: str, workload: Synthetic, in_flight: int | None) -> Run:
        # 227 pages: 138 for 50 adapters, 5 for each of 16 sequences.
        return Run(
            name,
            workload,
            ranks=(1, 2, 4, 8),
            server=("--pool", "80MiB"),
            in_flight=in_flight,
            visit_adapters=True,
        )

    return Suite(
        "0 to 2,000 adapters of ranks 1 to 8, where the pool has room for 50; 20 to 30 minutes.",
        (
            *(
                run(f"{count:,} adapters", replace(base, adapters=count), in_flight=16)
                for count in (0, 1, 5, 50, 100, 500, 2000)
            ),
            *(
                run(f"{count:,} adapters, rate 4", replace(base, adapters=count, rate=4.0), None)
                for count in (5, 50, 100, 2000)
            ),
        ),
    )


def _smoke() -> Suite:
    load = Synthetic(4.0, 3.0, 3, Power(0.5), 1.0, (8, 16), (2, 8))
    return Suite(
        "Whether it works at all; 20 seconds.",
        (
            Run("base only", replace(load, adapters=0), edge_seconds=0.5),
            Run("3 adapters", load, ranks=(1, 2), modules="qv", edge_seconds=0.5),
        ),
    )


SUITES = {"short": _short(), "slora": _slora(), "scale": _scale(), "smoke": _smoke()}
