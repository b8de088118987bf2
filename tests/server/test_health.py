"""Probes."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from fastapi.testclient import TestClient

from polydelta.server.app import create_app
from polydelta.server.lifecycle import Lifecycle, State
from polydelta.server.settings import ServerSettings
from polydelta.server.stores import disk_tier, make_publisher


@pytest.fixture
def around(engine, store):
    """A client of an application in a server at some point of its life."""

    def make(lifecycle: Lifecycle) -> TestClient:
        settings = ServerSettings(adapters=())
        publisher = make_publisher(store, engine, settings, disk_tier(store, settings))
        return TestClient(create_app(engine, store, publisher, settings, lifecycle))

    return make


def test_health_is_200_with_an_empty_body(client):
    for path in ("/health", "/ping"):
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_a_dead_engine_is_503(client, engine):
    engine.alive = False
    for path in ("/health", "/ping", "/ready"):
        assert client.get(path).status_code == 503


def test_ready_says_so(client):
    assert client.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("state", [State.LOADING, State.DRAINING, State.STOPPED])
def test_ready_is_503_unless_requests_are_taken(around, state):
    client = around(Lifecycle(state, "Almost there"))
    answer = client.get("/ready")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["status"] == state.value
    assert ("stage" in answer.json()) == (state is State.LOADING)
    assert client.get("/health").status_code == 200


def test_a_server_that_drains_refuses_in_openai_s_body(around):
    lifecycle = Lifecycle(State.READY)
    client = around(lifecycle)
    assert client.get("/v1/models").status_code == 200
    lifecycle.state = State.DRAINING
    for path in ("/v1/models", "/v1/adapters", "/nothing"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")
        assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    assert client.get("/metrics").headers["connection"] == "close"
    assert lifecycle.in_flight == 0


def test_the_gauge_says_whether_requests_are_taken(around, engine):
    lifecycle = Lifecycle(State.READY)
    client = around(lifecycle)

    def gauge() -> float:
        (line,) = (
            line
            for line in client.get("/metrics").text.splitlines()
            if line.startswith("polydelta_ready{")
        )
        return float(line.split()[-1])

    assert gauge() == 1
    lifecycle.state = State.DRAINING
    assert gauge() == 0
    lifecycle.state, engine.alive = State.READY, False
    assert gauge() == 0


def test_the_version_is_that_of_the_package(client):
    assert client.get("/version").json() == {"version": version("polydelta")}
