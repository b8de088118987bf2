"""S-LoRA's experiments (arXiv 2311.03285)."""

from __future__ import annotations

from dataclasses import replace

from load_tests.run import Run
from load_tests.suites.suite import LENGTHS, Suite
from load_tests.workload import Power, Synthetic


def suite() -> Suite:
    """S-LoRA's settings S1 (rank 8) and S2 (ranks 64 to 8) as on an A10G, and its sweeps."""
    base = Synthetic(8.0, 120.0, 200, Power(1.0), 1.0, LENGTHS, LENGTHS)
    s1, s2 = (1,), (8, 4, 2, 1)

    def run(name: str, workload: Synthetic, ranks: tuple[int, ...]) -> Run:
        # 110 pages, 1,760 tokens; 14,000 in the paper.
        return Run(name, workload, ranks, server=("--pool", "38800KiB"), visits="asked")

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
