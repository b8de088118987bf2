"""The port while the model loads, and the moment in which the server itself takes over."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn
from starlette.responses import PlainTextResponse

from polydelta.server.lifecycle import Lifecycle
from polydelta.server.loading_door import LoadingDoor
from polydelta.server.serving import bind, url_of

PATIENCE = 30.0


@pytest.fixture
def bound():
    with bind("127.0.0.1", 0) as bound:
        yield bound


@pytest.fixture
def serve_on(bound) -> Iterator[Callable[[], None]]:
    """Starts a server that says 200 to everything."""
    config = uvicorn.Config(PlainTextResponse("served"), lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound.dup()],))
    yield thread.start
    server.should_exit = True
    if thread.is_alive():
        thread.join()


@pytest.fixture
def ask(bound) -> Callable[..., httpx.Response]:
    """A request that connects as often as it takes until somebody listens."""
    transport = httpx.HTTPTransport(retries=10)
    client = httpx.Client(base_url=url_of(bound), timeout=PATIENCE, transport=transport)
    with client:
        yield client.request


def test_while_the_model_loads_everybody_is_told_how_far_it_is(bound, ask):
    lifecycle = Lifecycle()
    with LoadingDoor(bound, lifecycle):
        lifecycle.report("Opening the model", 0, 1)
        ready = ask("GET", "/ready")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "5")
        assert ready.json() == {"status": "loading", "stage": "Opening the model"}
        lifecycle.report("Loading weights", 3, 272)
        for method, path in (
            ("GET", "/health"),
            ("GET", "/v1/models"),
            ("POST", "/v1/completions"),
        ):
            answer = ask(method, path, content=b"x" * 100_000 if method == "POST" else None)
            assert (answer.status_code, answer.headers["connection"]) == (503, "close")
            error = answer.json()["error"]
            assert error["code"] == 503
            assert "Loading weights (3 of 272)" in error["message"]


def test_no_request_is_lost_when_the_server_takes_over(bound, serve_on):
    statuses: list[int] = []

    def keep_asking() -> None:
        while 200 not in statuses:
            statuses.append(httpx.get(url_of(bound), timeout=PATIENCE).status_code)

    with LoadingDoor(bound, Lifecycle()) as door, ThreadPoolExecutor(4) as clients:
        httpx.HTTPTransport(retries=10).handle_request(httpx.Request("GET", url_of(bound)))
        asking = [clients.submit(keep_asking) for _ in range(4)]
        deadline = time.monotonic() + 30
        while len(statuses) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        door.close()
        serve_on()
        for client in asking:
            client.result(PATIENCE)
    assert set(statuses) == {503, 200}


def test_who_comes_between_the_two_waits_for_the_server(bound, serve_on, ask):
    with LoadingDoor(bound, Lifecycle()) as door:
        assert ask("GET", "/ready").status_code == 503
        door.close()
        with ThreadPoolExecutor(1) as client:
            answer = client.submit(ask, "GET", "/ready")
            serve_on()
            assert answer.result(PATIENCE).text == "served"


def test_a_client_that_says_nothing_does_not_keep_the_door_open(bound, ask):
    with LoadingDoor(bound, Lifecycle()) as door:
        ask("GET", "/ready")
        with socket.create_connection(bound.getsockname(), PATIENCE) as silent:
            ask("GET", "/ready")
            door.close()
            assert silent.recv(1) == b""
