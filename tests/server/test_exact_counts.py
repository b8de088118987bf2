"""What `/metrics` counts is what clients saw, to the last token: a real engine behind real sockets,
in this process."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.store import AdapterStore, StoreConfig
from polydelta.server.app import create_app
from polydelta.server.serving import bind, url_of
from polydelta.server.settings import ServerSettings
from polydelta.server.stores import disk_tier, make_publisher

MODELS = ("tiny", "a", "b")
CHOICES, TOKENS = 2, 7
# Choices of a request whose client leaves.
LEFT = 5


@contextmanager
def served(app):
    """The URL of an application that serves from a thread."""
    with bind("127.0.0.1", 0) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield url_of(bound)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def url(tiny_checkpoint, tiny_layout, adapter_writer, serve, tmp_path):
    """A pool so small that requests are preempted and adapters leave it."""
    writer = adapter_writer(tiny_layout)
    for number, name in enumerate(("a", "b", "broken")):
        writer.lora(name, rank=3 + number, seed=number)
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"nothing")
    store = AdapterStore(StoreConfig(tmp_path / "store"), FolderCatalog([tmp_path]))
    options = {"pool_bytes": 130 << 10, "block_size": 4, "max_batch_tokens": 24}
    settings = ServerSettings(adapters=(), dtype="float32")
    with closing(store), serve(tiny_checkpoint, **options) as engine:
        publisher = make_publisher(store, engine, settings, disk_tier(store, settings))
        with served(create_app(engine, store, publisher, settings)) as url:
            yield url


def scrape(url):
    """All samples: (name, the values of its labels but the server's own) -> value."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name, *labels.values()] = sample.value
    return found


def ask(url, number, prompt):
    """One request of the mix; its usage."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "n": CHOICES, "temperature": 1.0}
    body |= {"model": MODELS[number % 3], "seed": number, "ignore_eos": number % 2 == 0}
    if number % 4:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    *_, last, done = filter(None, answer.text.split("\n\n"))
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))["usage"]


def test_counters_agree_with_what_clients_saw_and_gauges_return_to_zero(url):
    prompts = [f"{'word ' * (number % 5)}and then {number}" for number in range(24)]
    with ThreadPoolExecutor(8) as clients:
        usages = list(clients.map(lambda pair: ask(url, *pair), enumerate(prompts)))
    # At once: nothing that a client has seen may be counted later.
    found = scrape(url)
    answers = len(prompts) * CHOICES
    generated = sum(usage["completion_tokens"] for usage in usages)
    # A prompt is one for its client, and one for each of its choices for the engine.
    prompted = CHOICES * sum(usage["prompt_tokens"] for usage in usages)
    ended = {r: found["vllm:request_success_total", r] for r in ("stop", "length", "abort")}
    assert ended["stop"] + ended["length"] == answers
    assert found["vllm:generation_tokens_total",] == generated
    assert found["vllm:prompt_tokens_total",] == prompted
    assert found["vllm:request_params_n_count",] == len(prompts)
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"vllm:{name}_seconds_count",] == answers, name
    assert found["vllm:inter_token_latency_seconds_count",] == generated - answers
    assert found["vllm:request_generation_tokens_sum",] == generated
    assert found["vllm:request_prompt_tokens_sum",] == prompted
    assert found["vllm:request_num_preemptions_sum",] == found["vllm:num_preemptions_total",]
    assert found["vllm:num_preemptions_total",] > 0, "the pool was not small enough"
    sent = Counter(MODELS[number % 3] for number in range(len(prompts)))
    for model in MODELS:
        assert found["polydelta_adapter_requests_total", model] == CHOICES * sent[model]
    by_model = [found["polydelta_adapter_generation_tokens_total", model] for model in MODELS]
    assert sum(by_model) == generated
    swaps = [found["polydelta_adapter_swap_ins_total", model] for model in MODELS]
    assert sum(swaps) == found["polydelta_adapter_loads_total", "host"]
    assert_idle(found)

    refused = [("nobody", 404), ("broken", 400), ("broken", 400)]
    for model, status in refused:
        body = {"model": model, "prompt": "x"}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == status
    found = scrape(url)
    assert found["polydelta_refusals_total", "not_found", "404"] == 1
    assert found["polydelta_refusals_total", "adapter_failed", "400"] == 2
    assert found["polydelta_adapter_load_failures_total",] == 2
    assert found["vllm:request_success_total", "error"] == 2
    assert_idle(found)

    for model in MODELS:
        leave_in_the_middle(url, model)
    deadline = time.monotonic() + 30
    while scrape(url)["vllm:request_success_total", "abort"] < LEFT * len(MODELS):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    found = scrape(url)
    assert found["vllm:request_success_total", "abort"] == LEFT * len(MODELS)
    assert found["vllm:generation_tokens_total",] >= generated + 3 * len(MODELS)
    assert_idle(found)


def leave_in_the_middle(url, model):
    """Hangs up after three tokens of many."""
    body = {"model": model, "prompt": "a", "max_tokens": 100, "n": LEFT}
    body |= {"ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = filter(None, answer.iter_lines())
        assert all(next(lines).startswith("data: {") for _ in range(3))


def assert_idle(found):
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert found[f"vllm:{name}",] == 0
    owners = ("free", "kv", "cached", "adapters", "adapters_idle")
    pages = {owner: found["polydelta_pool_pages", owner] for owner in owners}
    assert pages["kv"] == pages["adapters"] == 0
    assert sum(pages.values()) == found["polydelta_pool_size_pages",]
