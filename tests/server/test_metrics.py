"""`/metrics`."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from polydelta.adapters_store.load_times import LoadTier, LoadTotals
from polydelta.engine.adapter_entry import ResidentAdapter
from polydelta.engine.adapter_usage import AdapterCounts, AdapterUsageSnapshot
from polydelta.engine.eviction import EvictionReason
from polydelta.engine.histogram import Distribution
from polydelta.engine.preemption_mode import PreemptionMode
from polydelta.engine.request import ErrorKind
from polydelta.engine.stats import EngineStats
from polydelta.engine.step_stats import StepPhase, StepSnapshot


@pytest.fixture
def samples(client):
    """All samples of ours as {(name, labels without those of the whole server): value}."""

    def scrape():
        answer = client.get("/metrics", follow_redirects=False)
        assert answer.status_code == 200
        found = {}
        for family in text_string_to_metric_families(answer.text):
            for sample in family.samples:
                labels = dict(sample.labels)
                if sample.name.startswith("process_"):
                    continue
                assert labels.pop("model_name") == "fake-base"
                assert (labels.pop("engine", None) == "0") == sample.name.startswith("vllm:")
                found[sample.name, tuple(sorted(labels.items()))] = sample.value
        return found

    return scrape


def by_label(found, name, label):
    """The samples of a family by the value of a label."""
    return {dict(labels)[label]: value for (n, labels), value in found.items() if n == name}


def test_the_engine_s_counts_have_vllm_s_names(samples, engine):
    engine.stats_now = EngineStats(
        num_running=3,
        num_waiting=2,
        waiting_for_adapter=1,
        pages_total=10,
        pages_kv=5,
        block_size=16,
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
    waiting = by_label(found, "vllm:num_requests_waiting_by_reason", "reason")
    assert waiting == {"capacity": 1, "deferred": 1}
    assert found["vllm:kv_cache_usage_perc", ()] == 0.5
    assert found["vllm:prompt_tokens_total", ()] == 100
    assert found["vllm:generation_tokens_total", ()] == 50
    assert found["vllm:prefix_cache_queries_total", ()] == 80
    assert found["vllm:prefix_cache_hits_total", ()] == 40
    assert found["vllm:num_preemptions_total", ()] == 1
    ends = by_label(found, "vllm:request_success_total", "finished_reason")
    assert ends == {"stop": 7, "length": 2}
    for label, value in (("block_size", "16"), ("num_gpu_blocks", "10")):
        assert by_label(found, "vllm:cache_config_info", label) == {value: 1}


def test_the_pool_is_told_by_owner_and_what_left_it_by_kind_and_reason(samples, engine):
    engine.stats_now = EngineStats(
        pages_total=15,
        pages_free=5,
        pages_kv=4,
        pages_cached=3,
        pages_adapters=2,
        pages_adapters_idle=1,
        adapter_evictions_by_reason={EvictionReason.ROOM: 5, EvictionReason.DELETED: 1},
        prefix_evictions_by_reason={EvictionReason.ROOM: 7},
    )
    found = samples()
    owners = by_label(found, "polydelta_pool_pages", "owner")
    assert owners == {"free": 5, "kv": 4, "cached": 3, "adapters": 2, "adapters_idle": 1}
    assert found["polydelta_pool_size_pages", ()] == 15
    assert found["polydelta_pool_bytes", ()] == engine.pool_bytes
    evictions = {
        tuple(dict(labels).values()): value
        for (name, labels), value in found.items()
        if name == "polydelta_evictions_total"
    }
    assert evictions == {("adapter", "room"): 5, ("adapter", "deleted"): 1, ("prefix", "room"): 7}


def test_how_kv_is_kept_is_told_with_the_tokens_that_the_pool_holds(samples, engine):
    engine.stats_now = EngineStats(kv_tokens=310)
    assert samples()["polydelta_pool_kv_tokens", ()] == 310
    kept = {"cache_dtype": "bfloat16", "kv_format": "native", "kv_select": "full"}
    for label, value in (kept | {"prefill": "full"}).items():
        assert by_label(samples(), "vllm:cache_config_info", label) == {value: 1}


def test_preemptions_are_told_by_how_the_kv_comes_back(samples, engine):
    engine.stats_now = EngineStats(
        preemptions=7,
        preemptions_by_mode={PreemptionMode.RECOMPUTE: 5, PreemptionMode.SWAP: 2},
        host_kv_bytes=3 << 20,
    )
    found = samples()
    modes = by_label(found, "polydelta_preemptions_total", "mode")
    assert modes == {"recompute": 5, "swap": 2}
    assert found["polydelta_host_kv_bytes", ()] == 3 << 20


def test_tenants_are_told_by_name(samples, engine):
    acme = AdapterCounts(requests=4, prompt_tokens=30, generation_tokens=20, queue_seconds=0.5)
    both = {"acme": acme, "other": AdapterCounts(requests=1)}
    engine.stats_now = EngineStats(tenants=AdapterUsageSnapshot(both))
    found = samples()
    for name, counts in (
        ("requests", {"acme": 4, "other": 1}),
        ("prompt_tokens", {"acme": 30, "other": 0}),
        ("generation_tokens", {"acme": 20, "other": 0}),
        ("queue_seconds", {"acme": 0.5, "other": 0}),
    ):
        assert by_label(found, f"polydelta_tenant_{name}_total", "tenant") == counts


def test_loads_are_told_by_tier(samples, engine):
    engine.stats_now = EngineStats(
        loads={LoadTier.FILES: LoadTotals(3, 1.5), LoadTier.PACKED: LoadTotals(4, 0.5)},
        load_failures=2,
        cold_starts=6,
        usage=AdapterUsageSnapshot(
            {"dates": AdapterCounts(swap_ins=5, swap_in_seconds=0.25)},
            AdapterCounts(swap_ins=1, swap_in_seconds=0.5),
        ),
    )
    found = samples()
    loads = by_label(found, "polydelta_adapter_loads_total", "tier")
    assert loads == {"files": 3, "packed": 4, "host": 6}
    seconds = by_label(found, "polydelta_adapter_load_seconds_total", "tier")
    assert seconds == {"files": 1.5, "packed": 0.5, "host": 0.75}
    assert found["polydelta_adapter_load_failures_total", ()] == 2
    assert found["polydelta_cold_starts_total", ()] == 6


def test_adapters_are_told_by_name_and_the_rest_together(samples, engine):
    engine.stats_now = EngineStats(
        usage=AdapterUsageSnapshot(
            {"": AdapterCounts(requests=9), "dates": AdapterCounts(requests=4, queue_seconds=0.5)},
            AdapterCounts(requests=2),
        )
    )
    found = samples()
    requests = by_label(found, "polydelta_adapter_requests_total", "adapter")
    assert requests == {"fake-base": 9, "dates": 4, "other": 2}
    queue = by_label(found, "polydelta_adapter_queue_seconds_total", "adapter")
    assert queue == {"fake-base": 0, "dates": 0.5, "other": 0}


def test_an_adapter_named_other_is_counted_with_the_others(samples, engine):
    named = {"other": AdapterCounts(requests=4)}
    engine.stats_now = EngineStats(usage=AdapterUsageSnapshot(named, AdapterCounts(requests=2)))
    found = samples()
    assert by_label(found, "polydelta_adapter_requests_total", "adapter") == {"other": 6}


def test_no_more_adapters_than_was_set_have_a_series_of_residency(samples, engine):
    resident = tuple(ResidentAdapter(f"a{number}", 2, 3) for number in range(103))
    busy = AdapterUsageSnapshot({"a102": AdapterCounts(requests=4)})
    engine.stats_now = EngineStats(resident=resident, usage=busy)
    found = samples()
    pages = by_label(found, "polydelta_adapter_pages", "adapter")
    assert len(pages) == 101
    assert pages["other"] == 9
    assert pages["a102"] == 3, "a busy one has its own"
    assert by_label(found, "polydelta_adapter_resident", "adapter")["other"] == 3
    assert by_label(found, "polydelta_adapter_resident", "version") == {"2": 1, "": 3}


def test_routers_find_the_adapters_of_running_and_waiting_requests(samples, engine):
    engine.stats_now = EngineStats(running_adapters=("a", "b"), waiting_adapters=("c",))
    labels = (
        ("max_lora", "64"),
        ("running_lora_adapters", "a,b"),
        ("waiting_lora_adapters", "c"),
    )
    assert samples()["vllm:lora_requests_info", labels] > 1e9


def test_distributions_are_cumulative_as_prometheus_has_them(samples, engine):
    distribution = Distribution((0.5, 1.0), (3, 2, 1), 4.25)
    engine.stats_now = EngineStats(
        requests={"time_to_first_token_seconds": distribution},
        steps=StepSnapshot(phases={StepPhase.WAIT: distribution}),
    )
    found = samples()
    for name, labels in (
        ("vllm:time_to_first_token_seconds", ()),
        ("polydelta_step_seconds", (("phase", "wait"),)),
    ):
        buckets = {
            dict(all_labels)["le"]: value
            for (n, all_labels), value in found.items()
            if n == f"{name}_bucket"
        }
        assert buckets == {"0.5": 3, "1.0": 5, "+Inf": 6}
        assert found[f"{name}_count", labels] == 6
        assert found[f"{name}_sum", labels] == 4.25


def test_prompts_are_counted_by_how_many_choices_they_get(samples, complete, stream):
    complete(n=2, prompt=["a", "b"])
    stream("/v1/chat/completions")
    found = samples()
    assert found["vllm:request_params_n_count", ()] == 3
    assert found["vllm:request_params_n_sum", ()] == 5


def test_requests_that_were_refused_are_counted_by_why(samples, client, stream, engine):
    def ask(**fields):
        body = {"model": "fake-base", "prompt": "Hi"} | fields
        return client.post("/v1/completions", json=body).status_code

    assert ask(model="nobody") == 404
    assert ask(temperature="hot") == 400
    assert client.get("/no-such-route").status_code == 404
    engine.error = "The pool is too small."
    assert ask() == ask(stream=True) == 400
    # Refused in the middle of a success.
    engine.error_after = 2
    assert "error" in stream("/v1/completions")[-1]
    engine.alive = False
    assert ask() == 503
    # A probe is told the same, and is no request.
    assert client.get("/ready").status_code == 503
    found = samples()
    refused = {
        tuple(dict(labels).values()): value
        for (name, labels), value in found.items()
        if name == "polydelta_refusals_total" and value
    }
    assert refused == {
        ("not_found", "404"): 2,
        ("bad_request", "400"): 4,
        ("unavailable", "503"): 1,
    }
    rejected = by_label(found, "vllm:admission_rejections_total", "reason")
    assert rejected.pop("unavailable") == 1
    assert set(rejected.values()) == {0}


def test_refusals_of_a_busy_server_are_counted_by_what_it_lacks(samples, client, stream, engine):
    names = {"late", "queue_full", "tenant_rate", "tenant_concurrency", "overload", "unavailable"}
    # All of them are there before the first one happens: rates begin at zero.
    assert by_label(samples(), "vllm:admission_rejections_total", "reason") == dict.fromkeys(
        names, 0
    )
    body = {"model": "fake-base", "prompt": "Hi"}
    for kind, count in ((ErrorKind.LATE, 3), (ErrorKind.QUEUE_FULL, 2)):
        engine.error, engine.error_kind = "busy", kind
        for number in range(count):
            client.post("/v1/completions", json=body | {"stream": number == 1})
    # One of its choices, in the middle of a success.
    engine.error_after = 1
    assert stream("/v1/completions")[-1]["error"]["code"] == 503
    found = samples()
    for status, reason, count in ((429, "late", 3), (503, "queue_full", 3)):
        labels = (("reason", reason), ("status", str(status)))
        assert found["polydelta_refusals_total", labels] == count
        assert found["vllm:admission_rejections_total", (("reason", reason),)] == count


def test_a_bug_in_mid_stream_is_a_refusal_too(samples, stream, engine):
    engine.tokenizer.token_bytes = lambda _: 1 / 0
    assert stream("/v1/completions", logprobs=1)[-1]["error"]["code"] == 500
    assert samples()["polydelta_refusals_total", (("reason", "internal"), ("status", "500"))] == 1


def test_a_bug_of_ours_is_a_refusal_too(samples, client, app):
    @app.get("/v1/bug")
    def bug():
        raise ZeroDivisionError

    assert client.get("/v1/bug").status_code == 500
    assert samples()["polydelta_refusals_total", (("reason", "internal"), ("status", "500"))] == 1


def test_adapters_called_as_the_base_or_as_the_others_are_added_to_them(samples, engine):
    named = {name: AdapterCounts(requests=2) for name in ("", "fake-base", "other")}
    engine.stats_now = EngineStats(usage=AdapterUsageSnapshot(named, AdapterCounts(requests=5)))
    requests = by_label(samples(), "polydelta_adapter_requests_total", "adapter")
    assert requests == {"fake-base": 4, "other": 7}


def test_two_servers_in_one_process_count_apart(make_app, complete):
    complete()
    make_app()  # would fail on a shared registry: every name is registered twice
