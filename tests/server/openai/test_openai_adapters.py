"""Which adapters a request means: by `model`, or by a weighted sum in `adapters`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from polydelta.adapters_store.reference import AdapterRef
from polydelta.adapters_store.store import AdapterStore

BOTH = ("/v1/completions", "/v1/chat/completions")


def shares(engine: Any) -> list[tuple[str, float]]:
    return [(share.ref.name, share.weight) for share in engine.requests[-1].adapters]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Gives adapters in folders, which have no tensors here, a kind."""
    known: dict[str, str] = {}

    class Summary:
        def __init__(self, path: Any) -> None:
            self.kinds = (known.get(path.name, "LowRank"),)

    monkeypatch.setattr("polydelta.adapters_store.store.inspect", Summary)
    return known.__setitem__


def test_a_sum_reaches_the_engine_in_one_order(
    complete: Callable, chat: Callable, engine: Any, kinds: Callable
) -> None:
    complete(adapters=[{"id": "labels", "weight": 0.5}, {"id": "dates@1", "weight": -0.7}])
    assert shares(engine) == [("dates@1", -0.7), ("labels@1", 0.5)]
    chat(adapters=[{"id": "dates", "weight": 0.25}, {"id": "labels"}, {"id": "dates@1"}])
    assert shares(engine) == [("dates@1", 1.25), ("labels@1", 1.0)]


def test_what_weighs_nothing_is_left_out(complete: Callable, engine: Any, kinds: Callable) -> None:
    complete(adapters=[{"id": "dates", "weight": 0}, {"id": "labels", "weight": 0.0}])
    assert shares(engine) == []


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"adapters": [{"id": "nobody"}]}, 404, "adapters", "nobody"),
        ({"model": "dates", "adapters": [{"id": "labels"}]}, 400, "model", "fake-base"),
        ({"adapters": [{"id": "dates"}] * 9}, 400, "adapters", "8"),
        ({"adapters": [{"id": "dates", "weight": "1"}]}, 400, "adapters[0].weight", "number"),
        ({"adapters": [{"id": "dates", "scale": 1}]}, 400, "adapters[0].scale", "not supported"),
        ({"adapters": {"id": "dates"}}, 400, "adapters", "list"),
    ],
)
def test_a_sum_that_cannot_be_had_is_refused(
    refusal: Callable, path: str, fields: dict, status: int, param: str, words: str
) -> None:
    got, error = refusal(path, **fields)
    assert (got, error["param"]) == (status, param)
    assert words in error["message"]


def test_kinds_that_cannot_be_added_are_refused_by_name(
    refusal: Callable, complete: Callable, engine: Any, kinds: Callable
) -> None:
    kinds("labels", "Rotate")
    status, error = refusal(BOTH[0], adapters=[{"id": "dates"}, {"id": "labels"}])
    assert status == 400
    assert "'labels@1'" in error["message"]
    assert "Rotate" in error["message"]
    status, _ = refusal(BOTH[0], adapters=[{"id": "labels", "weight": 0.5}])
    assert status == 400
    complete(adapters=[{"id": "labels"}])  # alone and whole, it is no sum
    assert shares(engine) == [("labels@1", 1.0)]


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("stream", [True, False])
def test_an_adapter_is_in_use_as_long_as_its_answer(
    path: str, stream: bool, client: TestClient, store: AdapterStore, engine: Any
) -> None:
    used: list[int] = []
    ref = store.resolve("dates")

    def users() -> int:
        return store._leases.users(AdapterRef(ref.id, ref.version, ref.path))

    engine.answer = lambda request: used.append(users()) or "Hello"
    body = {"model": "dates", "stream": stream, "prompt": "Hi"}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    assert client.post(path, json=body).status_code == 200
    assert used == [1]
    deadline = time.monotonic() + 5
    while users() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert users() == 0


def test_an_adapter_of_a_refused_request_is_not_in_use(
    refusal: Callable, store: AdapterStore, engine: Any
) -> None:
    ref = store.resolve("dates")
    engine.error = "the load failed"
    assert refusal(BOTH[0], model="dates")[0] == 400
    engine.error = None
    assert refusal(BOTH[0], model="dates", max_tokens=10_000)[0] == 400
    assert store._leases.users(ref) == 0
