"""The same traffic on the same memory, which native KV does not fit: what a smaller format of the
KV cache is worth where requests wait for room.

A page is 368,640 bytes: 16 tokens of KV as `native`, 31 as `int8`, 56 as `int4`. The pool has 238
of them, 25 of which the five adapters take. A request grows from 480 tokens to 832 in the mean, so
there is room for 5 of the 12 in flight as native, and for 9 as int8. Of int4 each sequence's open
page is native, outside of the pages: 45 fewer are left, with room for 13. Prompts are random, so
nothing is shared.
"""

from __future__ import annotations

from load_tests.comparisons import Comparison
from load_tests.run import Run
from load_tests.suites.suite import Suite, comparing
from load_tests.workload import Power, Synthetic

TOKENS = "throughput.output_tokens_per_second"
PREEMPTIONS = "server_counts.preemptions"
# 36 requests, as fast as the server can.
LOAD = Synthetic(2.0, 18.0, 5, Power(1.0), 1.0, (320, 641), (256, 449))
IN_FLIGHT = 12
SERVER = ("--pool", "84MiB", "--max-batch-size", str(IN_FLIGHT))


def suite() -> Suite:
    comparisons = (
        *_over_native("int4", most=0.99, least=1.01),
        *_over_native("int8"),
    )
    return comparing(
        "KV formats in a pool too small for native KV, in turns, there and back; six minutes.",
        comparisons,
    )


def _over_native(
    kv_format: str, most: float | None = None, least: float | None = None
) -> tuple[Comparison, ...]:
    """most: bar of the preemptions; least: of the throughput."""
    one, native = _run(kv_format), _run("native")
    return (
        Comparison(f"preemptions, {kv_format} / native", PREEMPTIONS, one, native, at_most=most),
        Comparison(f"throughput, {kv_format} / native", TOKENS, one, native, at_least=least),
    )


def _run(kv_format: str) -> Run:
    return Run(
        f"{kv_format} KV",
        LOAD,
        server=(*SERVER, "--kv-format", kv_format),
        in_flight=IN_FLIGHT,
        visits="asked",
        edge_seconds=3.0,
    )
