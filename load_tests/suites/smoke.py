"""Whether load tests work."""

from __future__ import annotations

from dataclasses import replace

from load_tests.run import Run
from load_tests.suites.suite import Suite
from load_tests.workload import Power, Synthetic


def suite() -> Suite:
    load = Synthetic(4.0, 3.0, 3, Power(0.5), 1.0, (8, 16), (2, 8))
    return Suite(
        "Whether it works at all; 20 seconds.",
        (
            Run("base only", replace(load, adapters=0), edge_seconds=0.5),
            Run("3 adapters", load, ranks=(1, 2), modules="qv", edge_seconds=0.5),
        ),
    )
