"""From no adapter to 2,000."""

from __future__ import annotations

from dataclasses import replace

from load_tests.run import Run
from load_tests.suites.suite import LENGTHS, Suite
from load_tests.workload import Power, Synthetic


def suite() -> Suite:
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
            visits="asked",
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
