"""Thousands of adapters, less memory than they want, more requests than the machine can serve, and
a tenant that floods it: the ratios that tell how a server takes it.

One page of the pool is 16 tokens of KV, 368,640 bytes. An adapter on all linear layers takes 2, 4,
7 or 14 pages at rank 1, 2, 4 or 8, 6.75 in the mean; a request 2 to 8 pages of KV, about 4 in the
middle of its life. On two cores the server does about 19 requests a second with five adapters at
16 in flight, and hardly more with a larger batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from load_tests.comparisons import Comparison
from load_tests.run import Run
from load_tests.suites.suite import LENGTHS, Suite, comparing
from load_tests.workload import Power, Shift, Synthetic, Tenants, Workload

MANY = 2000
RANKS = (1, 2, 4, 8)
TOKENS = "throughput.output_tokens_per_second"
FIRST_TOKEN = "first_token_ms.p50"
# All adapters that a run asks for: 4.6 GB are 2,000 of them.
HOST = ("--host-adapter-ram", "6GiB")
# Room for whatever a full batch of 64 and the adapters of these runs take: 728 pages.
AMPLE = ("--pool", "256MiB")
LOAD = Synthetic(18.0, 25.0, 5, Power(1.0), 1.0, LENGTHS, LENGTHS)
# Two tenants and their keys.
TENANTS = Path(__file__).with_name("tenants.toml")


def suite() -> Suite:
    comparisons = (
        _many_over_few(),
        _one_over_none(),
        _enabled_over_disabled(),
        *_unified_over_split(),
        _unified_over_split_when_traffic_shifts(),
        _overfull_over_fitting(),
        *_overload(),
        *_flooded_over_alone(),
    )
    return comparing(
        "Ratios of runs that take turns, there and back: many adapters over few, one pool over two,"
        " twice as many adapters as fit, overload, and a tenant beside a flood; 25 minutes.",
        comparisons,
    )


def _closed(name: str, workload: Workload, *server: str, in_flight: int = 16) -> Run:
    """As fast as the server can."""
    return Run(
        name,
        workload,
        RANKS,
        "all",
        (*server, *HOST),
        in_flight=in_flight,
        visits="asked",
        edge_seconds=3.0,
    )


def _open(name: str, workload: Synthetic, *server: str, slo: float = 6.0) -> Run:
    """At the workload's rate, which asks for each adapter more than once."""
    return Run(
        name,
        workload,
        RANKS,
        "all",
        server,
        visits=workload.adapters,
        slo_seconds=slo,
        edge_seconds=3.0,
    )


def _many_over_few() -> Comparison:
    # 466 pages: 338 for 50 adapters, 8 for each of 16 sequences.
    pool = ("--pool", "164MiB")
    return Comparison(
        f"{MANY:,} adapters / 5",
        TOKENS,
        _closed(f"{MANY:,} adapters", replace(LOAD, adapters=MANY), *pool),
        _closed("5 adapters", LOAD, *pool),
        at_least=0.95,
    )


def _one_over_none() -> Comparison:
    one = _closed("1 adapter", replace(LOAD, adapters=1), *AMPLE)
    return Comparison(
        "1 adapter / none",
        TOKENS,
        replace(one, ranks=(8,)),
        _closed("no adapter", replace(LOAD, adapters=0), *AMPLE),
        at_least=0.90,
    )


def _enabled_over_disabled() -> Comparison:
    """A hundredth is less than two runs differ by: more turns, and more requests."""
    base = replace(LOAD, adapters=0, rate=20.0)
    # So many adapters lie in the pool, idle.
    enabled = replace(_closed("base only, adapters enabled", base, *AMPLE), visits=50)
    return Comparison(
        "base only, adapters enabled / disabled",
        TOKENS,
        replace(enabled, registered=MANY),
        _closed("base only, adapters disabled", base, *AMPLE),
        at_least=0.99,
        turns=4,
    )


def _unified_over_split() -> tuple[Comparison, ...]:
    """With 2,000 adapters hardly two of those that run share one: each takes 6.75 pages for its
    adapter and about 4 of KV. One pool holds 10 of them. A fixed half for adapters holds 8, three
    quarters leave KV for 7, and a quarter holds 4: the half is the best of the three, and what one
    would take who does not know the traffic, so it has the bar. A share of 0.63, which only this
    traffic's own arithmetic tells, would come close to one pool, as long as the traffic stays.
    """
    load = replace(LOAD, adapters=MANY, rate=10.0)
    unified = _small("one pool", load)
    return tuple(
        Comparison(
            f"one pool / {share:g} of it for adapters",
            TOKENS,
            unified,
            _small(f"{share:g} of the pool for adapters", load, share),
            at_least=1.15 if share == 0.5 else None,
        )
        for share in (0.25, 0.5, 0.75)
    )


def _unified_over_split_when_traffic_shifts() -> Comparison:
    """First as above, then five adapters with long answers: 34 pages for all adapters, about 7 of
    KV for each sequence. One pool holds 11 of these, with half of it for adapters 8. More for
    adapters is worse then, less is worse before: the half is about the best that any share does.
    """
    many = replace(LOAD, adapters=MANY, rate=10.0, duration=12.0)
    few = replace(LOAD, rate=4.0, duration=12.0, output_tokens=(64, 192), seed=43)
    load = Shift(many, few)
    return Comparison(
        "one pool / 0.5 of it for adapters, traffic shifts",
        TOKENS,
        _small("one pool, traffic shifts", load),
        _small("0.5 of the pool for adapters, traffic shifts", load, 0.5),
        at_least=1.15,
    )


def _small(name: str, load: Workload, share: float | None = None) -> Run:
    """On as little memory as S-LoRA's A10G has, at one eighth: 110 pages, 1,760 tokens, so that it
    is memory that bounds how many requests run. share: of the adapters; None: one pool."""
    pool = "38800KiB" if share is None else f"38800KiB,split:{share:g}"
    return _closed(name, load, "--pool", pool, in_flight=32)


def _overfull_over_fitting() -> Comparison:
    # 402 pages: 338 for 50 adapters, 8 for each of 8 sequences, more than run at this rate.
    pool = ("--pool", "142MiB")
    load = replace(LOAD, rate=4.0, duration=30.0)
    return Comparison(
        "first token, twice as many adapters as fit / as many",
        FIRST_TOKEN,
        _open("100 adapters, room for 50", replace(load, adapters=100), *pool),
        _open("50 adapters, room for 50", replace(load, adapters=50), *pool),
        at_most=2.0,
    )


def _overload() -> tuple[Comparison, ...]:
    """1.5 times what the server can do, as in S-LoRA's own experiment (6 requests a second, where
    it does 4.0). The bound is 2 s: about as long as a request takes here in a full batch, as its
    6 s were there.

    In T seconds at 1.5 times what it can do, no server can have more first tokens in time than
    (T + 2) / 1.5 T, and a batch: of 1,200 requests, 75 %. First come, first served loses all that
    come later than some 8 of 40 s.
    """
    load = replace(LOAD, rate=30.0, duration=40.0)
    slo = 2.0
    fcfs = _open("overload, fcfs", load, *AMPLE, "--scheduling-policy", "fcfs", slo=slo)
    fair = _open("overload, fair", load, *AMPLE, slo=slo)
    early = _open("overload, early refusal", load, *AMPLE, "--ttft-slo", f"{slo:g}", slo=slo)
    figure = "slo_attainment"
    return (
        Comparison("SLO attainment in overload, early refusal", figure, early, None, at_least=0.70),
        Comparison("SLO attainment in overload, early refusal / fcfs", figure, early, fcfs),
        Comparison("SLO attainment in overload, fair / fcfs", figure, fair, fcfs),
    )


def _flooded_over_alone() -> tuple[Comparison, ...]:
    """A tenant with a longer question once a second, about 200 tokens of the 1,300 that the server
    computes in it, far below half of them; and one that sends a third more than fits in all. A
    batch of 16 has 95 % of the throughput that larger ones have, at steps that are short enough for
    first tokens."""
    light = Synthetic(1.0, 24.0, 1, Power(1.0), 1.0, (128, 192), LENGTHS)
    flood = replace(LOAD, rate=25.0, duration=24.0, adapters=4, seed=43)
    server = (*AMPLE, "--max-batch-size", "16", "--tenants", str(TENANTS))
    keys = {"light": "sk-light", "flood": "sk-flood"}

    def run(name: str, *tenants: tuple[str, Synthetic], policy: str = "fair") -> Run:
        return Run(
            name,
            Tenants(tenants),
            RANKS,
            "all",
            (*server, "--api-key", "sk-operator", "--scheduling-policy", policy),
            # The same adapters, whoever asks.
            registered=5,
            visits="asked",
            tenant_keys=tuple((tenant, keys[tenant]) for tenant, _ in tenants),
            api_key="sk-operator",
            edge_seconds=3.0,
        )

    alone = run("light tenant alone", ("light", light))
    both = (("light", light), ("flood", flood))
    figure = f"tenants.light.{FIRST_TOKEN}"
    name = "light tenant's first token, beside a flood / alone"
    return (
        Comparison(name, figure, run("light tenant and a flood", *both), alone, at_most=2.0),
        Comparison(
            f"{name}, fcfs",
            figure,
            run("light tenant and a flood, fcfs", *both, policy="fcfs"),
            alone,
        ),
    )
