"""`/metrics`."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from polydelta.engine.stats import EngineStats


@pytest.fixture
def samples(client):
    """All samples as {(name, labels without the model's name): value}."""

    def scrape():
        answer = client.get("/metrics", follow_redirects=False)
        assert answer.status_code == 200
        found = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "fake-base"
                found[sample.name, tuple(sorted(labels.items()))] = sample.value
        return found

    return scrape


def test_the_engine_s_counts_have_vllm_s_names(samples, engine):
    engine.stats_now = EngineStats(
        num_running=3,
        num_waiting=2,
        pages_total=10,
        pages_kv=5,
        prompt_tokens=100,
        generation_tokens=50,
        prefix_queries=80,
        prefix_hits=40,
        preemptions=1,
        finished={"stop": 7, "length": 2},
    )
    found = samples()
    assert found["vllm:num_requests_running", ()] == 3
    assert found["vllm:num_requests_waiting", ()] == 2
    assert found["vllm:kv_cache_usage_perc", ()] == 0.5
    assert found["vllm:prompt_tokens_total", ()] == 100
    assert found["vllm:generation_tokens_total", ()] == 50
    assert found["vllm:prefix_cache_queries_total", ()] == 80
    assert found["vllm:prefix_cache_hits_total", ()] == 40
    assert found["vllm:num_preemptions_total", ()] == 1
    assert found["vllm:request_success_total", (("finished_reason", "stop"),)] == 7
    assert found["vllm:request_success_total", (("finished_reason", "length"),)] == 2


def test_the_pool_is_told_by_owner(samples, engine):
    engine.stats_now = EngineStats(
        pages_total=15,
        pages_free=5,
        pages_kv=4,
        pages_cached=3,
        pages_adapters=2,
        pages_adapters_idle=1,
        adapter_loads=6,
        adapter_evictions=5,
        resident_adapters=("dates",),
    )
    found = samples()
    owners = {
        owner: found["polydelta_pool_pages", (("owner", owner),)]
        for owner in ("free", "kv", "cached", "adapters", "adapters_idle")
    }
    assert owners == {"free": 5, "kv": 4, "cached": 3, "adapters": 2, "adapters_idle": 1}
    assert found["polydelta_pool_size_pages", ()] == 15
    assert found["polydelta_adapter_loads_total", ()] == 6
    assert found["polydelta_adapter_evictions_total", ()] == 5
    assert found["polydelta_adapter_resident", (("adapter", "dates"),)] == 1


def test_routers_find_the_adapters_of_running_and_waiting_requests(samples, engine):
    engine.stats_now = EngineStats(running_adapters=("a", "b"), waiting_adapters=("c",))
    labels = (
        ("max_lora", "64"),
        ("running_lora_adapters", "a,b"),
        ("waiting_lora_adapters", "c"),
    )
    assert samples()["vllm:lora_requests_info", labels] > 1e9


def test_latencies_are_counted_for_every_choice(samples, complete, stream):
    complete(n=2)
    stream("/v1/chat/completions")
    found = samples()
    assert found["vllm:time_to_first_token_seconds_count", ()] == 3
    assert found["vllm:e2e_request_latency_seconds_count", ()] == 3
    assert found["vllm:inter_token_latency_seconds_count", ()] == 3 * 4


def test_two_servers_in_one_process_count_apart(make_app, complete):
    complete()
    make_app()  # would fail on a shared registry: every name is registered twice
