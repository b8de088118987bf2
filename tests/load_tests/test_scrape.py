"""Time series of `/metrics`."""

from __future__ import annotations

import asyncio

from benchmarks.http_client import Endpoint
from load_tests.scrape import Scraper, make_series, read_exposition

EARLY = """\
# HELP vllm:num_requests_running Requests running.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 2.0
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{model_name="m"} 4.0
# TYPE polydelta_pool_pages gauge
polydelta_pool_pages{model_name="m",owner="kv"} 10.0
polydelta_pool_pages{model_name="m",owner="adapters_idle"} 5.0
# TYPE polydelta_adapter_loads counter
polydelta_adapter_loads_total{model_name="m",tier="host"} 1.0
# TYPE unrelated gauge
unrelated 7.0
"""
LATE = (
    EARLY
    + """\
# TYPE polydelta_evictions counter
polydelta_evictions_total{kind="adapter",reason="room"} 2.0
polydelta_evictions_total{kind="adapter",reason="ordered"} 1.0
polydelta_evictions_total{kind="prefix",reason="room"} 9.0
"""
)


def test_an_exposition_is_read_by_owner_tier_and_kind():
    assert read_exposition(LATE) == {
        "running": 2.0,
        "preemptions": 4.0,
        "pages_kv": 10.0,
        "pages_adapters_idle": 5.0,
        "adapter_loads_host": 1.0,
        # Of all reasons.
        "evictions_adapter": 3.0,
        "evictions_prefix": 9.0,
    }


def test_a_sample_without_the_label_counts_as_all():
    text = "# TYPE polydelta_adapter_loads counter\npolydelta_adapter_loads_total 3.0\n"
    assert read_exposition(text) == {"adapter_loads_all": 3.0}


def test_a_series_has_a_value_for_every_time():
    series = make_series([(0.0, EARLY), (0.51234, LATE)])
    assert series.values["evictions_adapter"] == [0.0, 3.0]
    assert series.values["running"] == [2.0, 2.0]
    assert "waiting" not in series.values
    assert series.to_json()["seconds"] == [0.0, 0.512]
    assert series.to_json()["pages_kv"] == [10.0, 10.0]
    assert make_series([]).to_json() == {"seconds": []}


def test_the_scraper_looks_at_the_start_once_in_a_while_and_at_the_end(fake_server):
    async def scenario() -> Scraper:
        scraper = Scraper(Endpoint(fake_server.url), every=0.02)
        async with scraper.scraping():
            await asyncio.sleep(0.2)
        return scraper

    series = asyncio.run(scenario()).series()
    assert len(series.times) == fake_server.scrapes >= 3
    assert series.times == sorted(series.times)
    assert series.values["adapter_loads_host"] == [*range(1, fake_server.scrapes + 1)]


def test_a_server_that_does_not_answer_leaves_an_empty_series():
    async def scenario() -> Scraper:
        scraper = Scraper(Endpoint("http://127.0.0.1:9"), every=0.01)
        async with scraper.scraping():
            await asyncio.sleep(0.03)
        return scraper

    assert asyncio.run(scenario()).series().times == []
