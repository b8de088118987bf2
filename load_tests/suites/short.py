"""A few minutes of every kind of load."""

from __future__ import annotations

from dataclasses import replace

from load_tests.run import Run
from load_tests.suites.suite import LENGTHS, Suite
from load_tests.workload import Bursts, Power, Synthetic, Zipf


def suite() -> Suite:
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
