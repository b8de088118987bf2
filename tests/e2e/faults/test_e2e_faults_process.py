"""Stops under traffic, a restart at the same port, and an engine that fails."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

# `FaultyServer` of conftest.py, and what starts one.
Server = Any
Start = Callable[..., Any]

PATIENCE = 60.0


def processes_of(server: Server) -> list[str]:
    """Processes of the server's session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = stat.read_text().rpartition(")")
        except OSError:  # gone meanwhile
            continue
        state, _, _, session = rest.split()[:4]
        if session == str(server.process.pid) and state != "Z":
            found.append(name)
    return found


def check_gone(server: Server) -> None:
    """It ends in order, and no process of its own is left."""
    assert server.process.wait(PATIENCE) == 0
    assert processes_of(server) == []


def streamed(server: Server, model: str, **fields: Any) -> list[dict[str, Any]]:
    """All chunks of a stream that comes to its end."""
    with server.stream(model, **fields) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Traffic:
    """Clients that ask again and again, and count what comes of it."""

    def __init__(self, url: str, wanted: dict[str, str], body: Callable[..., Any]) -> None:
        self._url = url
        self._wanted = wanted
        self._body = body
        self._stop = threading.Event()
        self.counts: Counter[str] = Counter()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with ThreadPoolExecutor(len(self._wanted)) as threads:
            clients = [threads.submit(self._ask, model) for model in self._wanted]
            try:
                yield
            finally:
                self._stop.set()
            for client in clients:
                client.result()

    def until(self, what: str, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.counts[what] < count:
            assert time.monotonic() < deadline, self.counts
            time.sleep(0.01)

    def _ask(self, model: str) -> None:
        with httpx.Client(base_url=self._url, timeout=PATIENCE) as http:
            while not self._stop.is_set():
                self.counts[self._answer(http, model)] += 1
                time.sleep(0.005)

    def _answer(self, http: httpx.Client, model: str) -> str:
        try:
            answer = http.post("/v1/completions", json=self._body(model))
        except httpx.TransportError:
            return "nobody there"
        if answer.status_code == 503:
            assert answer.json()["error"]["message"]
            return "unavailable"
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        if choice["finish_reason"] == "abort":
            return "aborted"
        assert choice["text"] == self._wanted[model]
        return "right"


@pytest.mark.slow
def test_a_stop_lets_requests_finish_and_another_server_takes_the_port_under_traffic(
    start_faulty: Start, writer: Any
) -> None:
    first = start_faulty("--shutdown-timeout", "30")
    first.install(writer.lora("steady", 3, seed=1))
    first.install(writer.lora("own", 4, seed=3))
    wanted = {model: first.ask(model) for model in ("tiny", "steady")}
    own = first.ask("own", max_tokens=50)
    first.evict("own")
    traffic = Traffic(first.url, wanted, first.body)
    with traffic.running(), ThreadPoolExecutor(4) as clients:
        traffic.until("right", 20)
        with first.fault("wait-own") as go_on:
            whole = clients.submit(first.ask, "own", max_tokens=50)
            stream = clients.submit(streamed, first, "own", max_tokens=50)
            first.until("polydelta_requests_waiting_for_adapter", 2)
            first.process.send_signal(signal.SIGTERM)
            check_draining(first)
            traffic.until("unavailable", 5)
            assert not whole.done()
            go_on()
            assert whole.result() == own
            chunks = stream.result()
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == own
        check_gone(first)
        before = traffic.counts["right"]
        second = start_faulty("--shutdown-timeout", "0", instead_of=first)
        traffic.until("right", before + 20)
        assert {model: second.ask(model) for model in wanted} == wanted
    check_stop_at_once(second, writer)
    assert traffic.counts["aborted"] == 0


def check_draining(server: Server) -> None:
    deadline = time.monotonic() + PATIENCE
    while (ready := server.http.get("/ready")).status_code == 200:
        assert time.monotonic() < deadline
    assert ready.status_code == 503
    assert server.http.get("/health").status_code == 200
    assert server.metrics()["polydelta_ready"] == 0
    refused = server.complete("tiny")
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) > 0
    assert refused.json()["error"]["message"]


def check_stop_at_once(server: Server, writer: Any) -> None:
    """With `--shutdown-timeout 0`, and everything under way that can be: streams, whole bodies, a
    load that hangs, half an upload, a client that reads nothing."""
    server.install(writer.lora("stuck", 2, seed=9))
    long = json.dumps(server.body("tiny", max_tokens=400, n=4, stream=True))
    silent = [
        request("PUT", "/v1/adapters/half", 5000, "multipart/form-data; boundary=b", "--b\r\n"),
        request("POST", "/v1/completions", len(long), "application/json", long),
    ]
    with (
        contextlib.ExitStack() as sockets,
        ThreadPoolExecutor(24) as clients,
        server.fault("wait-stuck"),
    ):
        url = httpx.URL(server.url)
        for content in silent:
            client = sockets.enter_context(socket.create_connection((url.host, url.port)))
            client.sendall(content)
        streams = [
            clients.submit(streamed, server, model, max_tokens=400, n=2)
            for model in ("tiny", "steady", "stuck", "stuck") * 4
        ]
        bodies = [clients.submit(server.complete, "stuck") for _ in range(4)]
        order = clients.submit(server.http.post, "/v1/adapters/stuck/load")
        server.until("polydelta_requests_waiting_for_adapter", 20)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for stream in streams:
            reasons = {
                choice["finish_reason"]
                for chunk in stream.result()
                for choice in chunk.get("choices", ())
            }
            assert reasons <= {None, "abort", "length"}, reasons
        for body in bodies:
            assert_ended(body)
        assert_ended(order)
        check_gone(server)
        assert time.monotonic() - began < 10
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def request(method: str, path: str, length: int, kind: str, body: str) -> bytes:
    """length: of the body, as the head says."""
    head = f"{method} {path} HTTP/1.1\r\nHost: here\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n{body}".encode()


def assert_ended(body: Future[httpx.Response]) -> None:
    answer = body.result()
    if answer.status_code == 200:
        assert {choice["finish_reason"] for choice in answer.json()["choices"]} == {"abort"}
    else:
        assert answer.status_code >= 400
        assert answer.json()["error"]["message"]


def failure(server: Server, model: str, **fields: Any) -> dict[str, Any]:
    """The body of a stream that was refused, or the last event of one that had begun."""
    with server.stream(model, **fields) as answer:
        lines = [line for line in answer.iter_lines() if line]
    if answer.status_code == 200:
        assert lines.pop() == "data: [DONE]"
    return json.loads(lines[-1].removeprefix("data: "))


def test_an_engine_that_fails_ends_every_request_and_leaves_a_process_that_says_so(
    start_faulty: Start, writer: Any
) -> None:
    server = start_faulty()
    server.install(writer.lora("own", 4, seed=3))
    server.ask("tiny")
    with ThreadPoolExecutor(24) as clients, server.fault("wait-own"):
        streams = [
            clients.submit(failure, server, model, max_tokens=400, n=2)
            for model in ("tiny", "own") * 6
        ]
        bodies = [
            clients.submit(server.complete, model, max_tokens=400) for model in ("tiny", "own") * 3
        ]
        orders = [clients.submit(server.http.post, "/v1/adapters/own/load") for _ in range(2)]
        server.until("polydelta_requests_waiting_for_adapter", 15)
        with server.fault("engine-fails"):
            for stream in streams:
                error = stream.result()["error"]
                assert error["code"] == 503
                assert "see the server's log" in error["message"]
            for answer in [*bodies, *orders]:
                assert answer.result().status_code == 503, answer.result().text
        for path in ("/health", "/ready"):
            assert server.http.get(path).status_code == 503
        assert server.http.get("/metrics").status_code == 200
        for fields in ({}, {"stream": True}):
            refused = server.complete("tiny", **fields)
            assert refused.status_code == 503
            assert refused.json()["error"]["message"]
        assert server.http.post("/v1/adapters/own/load").status_code == 503
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        check_gone(server)
