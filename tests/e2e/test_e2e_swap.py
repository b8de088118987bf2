"""Versions that come and go under a running server: nobody fails, nobody gets a stale answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

# Several blocks, so that a new version could find the old one's prefix.
PROMPT = "Swap the adapter in the middle of a sentence that is long enough to be kept, and go on."
KEY = "secret-key"
# A stream long enough to be in flight while a version is uploaded.
LONG = {"max_tokens": 300, "n": 4}
# Some 8 MB as a stream: more than the buffers between a server and a client who reads nothing hold
# (4 MiB on Linux, if nobody has changed that), so that it cannot end before it is read.
ENDLESS = {"max_tokens": 300, "n": 32, "logprobs": 20}
PAGES = "polydelta_pool_pages"


@dataclass(frozen=True)
class Api:
    """What the tests ask of one server."""

    url: str
    headers: dict[str, str] = field(default_factory=dict)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        options = {"headers": self.headers, "timeout": 60} | options
        return httpx.request(method, f"{self.url}{path}", **options)

    def done(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        answer = self.call(method, path, **options)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    def put(self, adapter_id: str, folder: Path, **fields: str) -> dict[str, Any]:
        files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
        return self.done("PUT", f"/v1/adapters/{adapter_id}", files=files, data=fields)

    def complete(self, model: str, **fields: Any) -> httpx.Response:
        body = {"model": model, "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
        return self.call("POST", "/v1/completions", json=body | fields)

    def ask(self, model: str, **fields: Any) -> str:
        answer = self.complete(model, **fields)
        assert answer.status_code == 200, answer.text
        return "".join(choice["text"] for choice in answer.json()["choices"])

    def metrics(self, name: str, label: str) -> dict[str, float]:
        families = text_string_to_metric_families(self.call("GET", "/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {s.labels[label]: s.value for s in samples if s.name == name}

    def loads(self) -> float:
        return self.metrics("polydelta_adapter_loads_total", "tier")["host"]


class Stream:
    """A streamed request of its own thread."""

    def __init__(self, api: Api, model: str, read_on: bool = True, **fields: Any) -> None:
        """read_on: whether what comes after the first chunk is read before it is asked for."""
        self._api = api
        self._begun = threading.Event()
        self._read_on = threading.Event()
        if read_on:
            self._read_on.set()
        self._texts: dict[int, str] = {}
        self._reasons: list[str | None] = []
        self._thread = threading.Thread(target=self._read, args=(model, LONG | fields))
        self._thread.start()
        assert self._begun.wait(60)

    def result(self) -> str:
        self._read_on.set()
        self._thread.join(60)
        assert set(self._reasons) == {"length"}, self._reasons
        return "".join(self._texts[index] for index in sorted(self._texts))

    def _read(self, model: str, fields: dict[str, Any]) -> None:
        body = {"model": model, "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
        url, body = f"{self._api.url}/v1/completions", body | {"stream": True} | fields
        with httpx.stream("POST", url, json=body, headers=self._api.headers, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))
                    self._read_on.wait(60)
        self._begun.set()

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self._reasons.append(chunk["error"]["message"])
            return
        choice = chunk["choices"][0]
        self._texts[choice["index"]] = self._texts.get(choice["index"], "") + choice["text"]
        if choice["finish_reason"] is not None:
            self._reasons.append(choice["finish_reason"])
        self._begun.set()


class Traffic:
    """Other requests, again and again, each compared with its own answer."""

    def __init__(self, api: Api, wanted: dict[str, str]) -> None:
        self._api = api
        self._wanted = wanted
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(len(wanted))

    def __enter__(self) -> None:
        self._counts = [self._pool.submit(self._run, model) for model in self._wanted]

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with self._pool:
            assert all(count.result() > 0 for count in self._counts)

    def _run(self, model: str) -> int:
        count = 0
        while not self._stop.is_set():
            assert self._api.ask(model) == self._wanted[model], model
            count += 1
        return count


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def none(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without adapters."""
    return tmp_path_factory.mktemp("none")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swap-store")


@pytest.fixture(scope="module")
def api(launch, tiny_file, store, none) -> Api:
    options = ("--model", str(tiny_file), "--store", str(store), "--adapters", str(none))
    return Api(launch(*options).url)


@pytest.fixture(scope="module")
def reference(launch, tiny_file, none) -> Api:
    """A server that keeps no prefixes; it asks for a key."""
    options = ("--model", str(tiny_file), "--adapters", str(none), "--no-prefix-caching")
    return Api(launch(*options, "--api-key", KEY).url, {"Authorization": f"Bearer {KEY}"})


@pytest.fixture
def writer(adapter_writer, tiny_file_layout):
    return adapter_writer(tiny_file_layout)


@pytest.fixture
def contents(writer) -> list[Path]:
    """A LoRA, a SHiRA and another LoRA, each of its own answer."""
    return [
        writer.lora("first", 8, seed=1),
        writer.shira("second", 3, seed=2),
        writer.lora("third", 5, targets=("q_proj", "down_proj"), seed=3, scale=2.0),
    ]


@pytest.fixture
def alone(reference: Api, contents: list[Path]) -> Callable[..., str]:
    """What a server answers that has never had another version."""
    for folder in contents:
        reference.put(folder.name, folder)
    return lambda folder, **fields: reference.ask(folder.name, **fields)


@pytest.fixture
def fresh(api: Api) -> Iterator[str]:
    """An id that is deleted with all its versions afterwards."""
    yield "bot"
    api.call("DELETE", "/v1/adapters/bot?in_use=defer")
    until(lambda: api.call("GET", "/v1/adapters/bot/versions").status_code == 404)


@pytest.mark.slow
def test_streams_finish_on_their_version_and_the_next_ones_get_the_new_one(
    api, reference, contents, alone, writer, fresh
):
    other = writer.lora("other", 4, seed=9)
    for server in (api, reference):
        server.put("other", other)
    short = {folder: alone(folder) for folder in contents}
    long = {folder: alone(folder, **LONG) for folder in contents}
    assert len(set(short.values())) == len(set(long.values())) == len(contents)

    order, in_flight = [*contents, *contents], 0
    version = api.put("bot", order[0])["version"]
    traffic = {model: reference.ask(model) for model in ("tiny", "other")}
    with Traffic(api, traffic):
        for old, new in pairwise(order):
            assert api.ask("bot") == short[old]
            streams = [Stream(api, "bot"), Stream(api, f"bot@{version}")]
            published = api.put("bot", new)
            in_flight += api.done("GET", f"/v1/adapters/bot@{version}")["active_requests"]
            assert published["version"] == version + 1
            assert api.ask("bot") == short[new]
            assert api.ask(f"bot@{version}") == short[old]
            assert [stream.result() for stream in streams] == [long[old], long[old]]
            assert api.ask("bot", **LONG) == long[new]
            version += 1
    # Or every upload came after its streams.
    assert in_flight > 0


@pytest.mark.slow
def test_a_rollback_under_traffic_brings_the_old_answer_back(api, contents, alone, fresh):
    first, second, _ = contents
    for folder in (first, second):
        version = api.put("bot", folder)["version"]
    streams = [Stream(api, "bot") for _ in range(2)]
    rolled = api.done("POST", "/v1/adapters/bot/rollback", json={"version": version - 1})
    assert rolled["version"] == version + 1
    assert api.ask("bot") == alone(first)
    assert [stream.result() for stream in streams] == [alone(second, **LONG)] * 2
    assert api.ask("bot", **LONG) == alone(first, **LONG)


@pytest.mark.slow
def test_a_version_in_use_is_not_deleted_or_when_it_is_done(api, contents, alone, fresh, store):
    def pages() -> dict[str, float]:
        return api.metrics(PAGES, "owner")

    def resident() -> list[str]:
        return list(api.metrics("polydelta_adapter_resident", "adapter"))

    folder = contents[0]
    before = pages()
    record = api.put("bot", folder)
    path = f"/v1/adapters/{record['name']}"
    stream = Stream(api, "bot", read_on=False, **ENDLESS)
    refused = api.call("DELETE", path)
    assert refused.status_code == 409, refused.text
    assert "in use" in refused.json()["error"]["message"]
    assert (store / "content" / record["sha256"]).is_dir()

    (deferred,) = api.done("DELETE", path, params={"in_use": "defer"})["data"]
    assert deferred["state"] == "deleting"
    assert api.complete("bot").status_code == 404
    assert record["id"] in resident()
    assert stream.result() == alone(folder, **ENDLESS)

    until(lambda: api.call("GET", path).status_code == 404)
    until(lambda: not (store / "content" / record["sha256"]).exists())
    until(lambda: not (store / "packed" / record["sha256"]).exists())
    until(lambda: record["id"] not in resident())
    assert pages() == before


@pytest.mark.slow
@pytest.mark.parametrize("order", ["load", "pin"])
def test_an_order_that_meets_a_delete_leaves_nothing_in_the_pool(api, writer, order):
    before = api.metrics(PAGES, "owner")
    # Another moment each time, and large, so that loading takes a while.
    for number in range(20):
        name = f"/v1/adapters/{order}-{number}"
        api.put(f"{order}-{number}", writer.lora(f"{order}-{number}", 64, seed=number))
        with ThreadPoolExecutor(1) as client:
            ordered = client.submit(api.call, "POST", f"{name}/{order}")
            time.sleep(number / 1000)
            assert api.call("DELETE", name).status_code == 200
        assert ordered.result().status_code in (200, 400, 404, 409), ordered.result().text
    until(lambda: api.metrics(PAGES, "owner") == before)
    assert not any(
        name.startswith(order) for name in api.metrics("polydelta_adapter_resident", "adapter")
    )


@pytest.mark.slow
def test_thirty_requests_for_a_cold_adapter_are_one_load(api, contents, alone, fresh):
    api.put("bot", contents[1])
    wanted = alone(contents[1])
    for _ in range(2):
        before = api.loads()
        with ThreadPoolExecutor(30) as clients:
            answers = list(clients.map(api.ask, ["bot"] * 30))
        assert answers == [wanted] * 30
        assert api.loads() == before + 1
        # And again from the disk.
        assert api.done("POST", "/v1/adapters/bot/evict")["residency"]["state"] == "on disk"


@pytest.mark.slow
def test_sums_over_http(api, reference, contents, alone, writer):
    for folder in contents:
        api.put(folder.name, folder)
    first, third = contents[0].name, contents[2].name
    parts = [{"id": first, "weight": 0.75}, {"id": third, "weight": -0.5}]
    api.done("POST", "/v1/adapters", json={"id": "sum", "compose": parts})
    answer = api.ask("tiny", adapters=parts)
    assert answer == api.ask("tiny", adapters=parts[::-1]) == api.ask("sum")
    # Of half of a sum, as of its parts.
    assert api.ask("tiny", adapters=[{"id": "sum", "weight": 0.5}]) == api.ask(
        "tiny", adapters=[{"id": first, "weight": 0.375}, {"id": third, "weight": -0.25}]
    )
    assert answer not in {api.ask("tiny"), api.ask(first), api.ask(third)}
    for folder in contents:
        assert api.ask("tiny", adapters=[{"id": folder.name}]) == alone(folder)
    # A part keeps its version.
    api.put(first, writer.lora("later", 6, seed=12))
    assert api.ask("sum") == answer
    assert api.ask("tiny", adapters=parts) != answer
    refused = api.call("DELETE", f"/v1/adapters/{first}@1")
    assert refused.status_code == 409
    assert "sum@1" in refused.json()["error"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "adapters", "status", "param"),
    [
        ("tiny", [{"id": f"many-{number}"} for number in range(9)], 400, "adapters"),
        ("tiny", [{"id": "nobody"}], 404, "adapters"),
        ("tiny", [{"id": "many-0", "weight": float("nan")}], 400, "adapters"),
        ("tiny", [{"id": "many-0", "weight": float("inf")}], 400, "adapters"),
        ("tiny", [{"id": "many-0", "weight": 1.7e308}] * 2, 400, "adapters"),
        ("many-0", [{"id": "many-1"}], 400, "model"),
    ],
    ids=["nine", "unknown", "nan", "infinite", "overflow", "conflict"],
)
def test_a_sum_that_cannot_be_is_refused_in_openai_s_words(
    api, writer, model, adapters, status, param
):
    for number in range(9):
        folder = writer.lora(f"many-{number}", 1, layers=[0], seed=number)
        api.put(f"many-{number}", folder)
    body = {"model": model, "prompt": PROMPT, "adapters": adapters}
    headers = {"Content-Type": "application/json"}
    # Not `json=`, which would refuse the NaN here.
    answer = api.call("POST", "/v1/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"].startswith(param)


@pytest.mark.slow
def test_a_weight_that_no_model_survives_hurts_nobody_else(api, contents, alone, fresh):
    api.put("bot", contents[0])
    for weight in (1e30, -1e300):
        answer = api.complete("tiny", adapters=[{"id": "bot", "weight": weight}])
        assert answer.status_code in (200, 400), answer.text
    assert api.ask("bot") == alone(contents[0])


@pytest.mark.slow
def test_a_restarted_server_has_every_version_label_and_pin(
    launch, tiny_file, none, tmp_path, contents, alone
):
    options = ("--model", str(tiny_file), "--adapters", str(none), "--store", str(tmp_path / "s"))
    running = launch(*options)
    api = Api(running.url)
    for folder in contents:
        api.put("bot", folder, labels=json.dumps({"content": folder.name}))
    api.done("POST", "/v1/adapters/bot@2/pin")
    parts = [{"id": "bot@1", "weight": 0.5}, {"id": "bot@3"}]
    api.done("POST", "/v1/adapters", json={"id": "sum", "compose": parts})
    answers = {name: api.ask(name) for name in ("bot", "bot@1", "bot@2", "bot@3", "sum")}

    def records() -> list[dict[str, Any]]:
        shown = [
            *api.done("GET", "/v1/adapters/bot/versions")["data"],
            api.done("GET", "/v1/adapters/sum"),
        ]
        fleeting = ("residency", "active_requests", "parts")
        return [{k: v for k, v in record.items() if k not in fleeting} for record in shown]

    before = records()
    running.process.terminate()
    assert running.process.wait(30) == 0
    api = Api(launch(*options).url)
    assert records() == before
    assert [record["labels"]["content"] for record in before[:3]] == [f.name for f in contents]
    assert [record["pinned"] for record in before] == [False, True, False, False]
    until(lambda: api.done("GET", "/v1/adapters/bot@2")["residency"]["state"] == "resident")
    assert answers == {name: api.ask(name) for name in answers}
    assert [answers[f"bot@{number}"] for number in (1, 2, 3)] == [alone(f) for f in contents]


@pytest.mark.slow
@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/adapters"),
        ("POST", "/v1/adapters"),
        ("PUT", "/v1/adapters/bot"),
        ("DELETE", "/v1/adapters/bot"),
        ("POST", "/v1/adapters/bot/pin"),
        ("POST", "/v1/adapters/bot/rollback"),
        ("POST", "/v1/load_lora_adapter"),
        ("POST", "/v1/unload_lora_adapter"),
    ],
)
def test_without_the_key_adapters_are_neither_shown_nor_changed(reference, headers, method, path):
    answer = reference.call(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "AuthenticationError"
