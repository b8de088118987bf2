"""The process around the application, with a fake engine and a real uvicorn."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from polydelta.server.serving import LAST_BYTES, LAST_SECONDS, LAST_STEP, bind, url_of
from polydelta.server.settings import SettingsError

PROGRAM = Path(__file__).with_name("fake_server.py")
# Seconds; far more than anything here takes.
PATIENCE = 30.0


@dataclass
class Serving:
    process: subprocess.Popen[str]
    url: str
    folder: Path

    def stream(self, prompt: str = "Hi") -> httpx.Client:
        """To be entered; a stream without end."""
        body = {"model": "fake-base", "prompt": prompt, "stream": True}
        return httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=PATIENCE)

    def connect(self, first: bytes = b"") -> socket.socket:
        """A connection with a small window, on which `first` was sent."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(PATIENCE)
        connection.connect(("127.0.0.1", httpx.URL(self.url).port))
        connection.sendall(first)
        return connection

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE)

    def until_draining(self) -> httpx.Response:
        deadline = time.monotonic() + PATIENCE
        while (ready := self.get("/ready")).status_code == 200:
            assert time.monotonic() < deadline
        return ready


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Starts the program with these options."""
    started = []

    def start(**options: object) -> Serving:
        arguments = json.dumps({"folder": str(tmp_path), **options})
        process = subprocess.Popen(
            [sys.executable, PROGRAM, arguments], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return Serving(process, process.stdout.readline().strip(), tmp_path)

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def post(body: bytes, sent: bytes | None = None) -> bytes:
    """A request for a completion; of the body only `sent`."""
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + (body if sent is None else sent)


def completion(prompt: str, **fields: object) -> bytes:
    return json.dumps({"model": "fake-base", "prompt": prompt, **fields}).encode()


def everything(connection: socket.socket) -> bytes:
    """What comes until the connection has ended."""
    found = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def test_an_interrupt_stops_an_idle_server_with_code_0(serve):
    serving = serve(shutdown_timeout=PATIENCE)
    assert serving.get("/health").status_code == 200
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(10) == 0
    assert serving.process.stdout.read() == "stopped\n"


def test_a_connection_that_would_be_a_websocket_is_an_ordinary_one(serve):
    """Not one of another kind, that those who look after connections do not know."""
    serving = serve()
    upgrade = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    upgrade += b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    with serving.connect(upgrade) as connection:
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
        time.sleep(1.2)  # until they have looked
        assert serving.get("/health").status_code == 200


def test_without_a_timeout_requests_in_flight_end_with_abort(serve):
    serving = serve()
    with serving.stream() as answer:
        lines = answer.iter_lines()
        next(lines)
        serving.process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"abort"' in rest[-2]
    assert serving.process.wait(10) == 0


def test_requests_in_flight_may_finish_while_new_ones_are_refused(serve):
    serving = serve(shutdown_timeout=600.0)
    whole = completion("Hi")
    with (
        serving.stream() as answer,
        httpx.Client(base_url=serving.url) as kept,
        ExitStack() as open_,
    ):
        lines = answer.iter_lines()
        next(lines)
        assert kept.get("/version").headers.get("connection") is None
        upload = open_.enter_context(serving.connect(post(whole, whole[:7])))
        serving.process.terminate()

        ready = serving.until_draining()
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        for path in ("/health", "/ping", "/version", "/metrics"):
            assert serving.get(path).status_code == 200
        refusal = kept.post("/v1/completions", content=whole)
        assert refusal.status_code == 503
        assert "about to stop" in refusal.json()["error"]["message"]
        assert int(refusal.headers["retry-after"]) > 0
        assert refusal.headers["connection"] == "close"
        assert serving.get("/v1/models").status_code == 503

        upload.sendall(whole[7:])
        serving.folder.joinpath("finish").touch()
        rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"stop"' in rest[-2]
        assert upload.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
    assert serving.process.wait(10) == 0


def test_what_has_not_finished_in_time_is_aborted(serve):
    serving = serve(shutdown_timeout=1.0)
    with serving.stream() as answer:
        lines = answer.iter_lines()
        next(lines)
        serving.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            serving.process.wait(0.8)
        assert '"finish_reason":"abort"' in [line for line in lines if line][-2]
    assert serving.process.wait(10) == 0


def test_a_second_signal_ends_the_wait(serve):
    serving = serve(shutdown_timeout=600.0)
    with serving.stream() as answer:
        lines = answer.iter_lines()
        next(lines)
        serving.process.terminate()
        serving.until_draining()
        serving.process.terminate()
        assert '"finish_reason":"abort"' in [line for line in lines if line][-2]
    assert serving.process.wait(10) == 0


def test_no_client_and_no_step_of_the_engine_holds_up_the_end(serve):
    assert LAST_STEP + LAST_BYTES < LAST_SECONDS < 10
    serving = serve(stuck=True, hangs=True, limits=[0.4, 1, 2.5])
    much = post(completion("much", stream=True))
    beginnings = (b"", b"GET /heal", post(completion("Hi"), b"{"), much, post(completion("Hi")))
    with ExitStack() as connections:
        connected = [connections.enter_context(serving.connect(b)) for b in beginnings]
        connected[3].recv(1)
        serving.process.terminate()
        assert serving.process.wait(10) == 0
        assert connected[2].recv(1 << 16).startswith(b"HTTP/1.1 503 ")


def test_connections_on_which_a_client_does_nothing_are_closed(serve):
    serving = serve(head_seconds=0.5, reader_seconds=0.5, shutdown_timeout=600.0)
    begun = (b"", b"GET /health HTTP/1.1\r\nHo", post(completion("much", stream=True)))
    with ExitStack() as connections:
        silent, half, asleep = (connections.enter_context(serving.connect(b)) for b in begun)
        asleep.recv(1)
        assert serving.process.stdout.readline() == "aborted\n"
        assert b"[DONE]" not in everything(asleep)
        assert everything(silent) == everything(half) == b""
    # Nothing is left of them to be waited for.
    serving.process.terminate()
    assert serving.process.wait(10) == 0


def test_when_the_engine_crashes_everybody_is_told(serve):
    serving = serve(shutdown_timeout=600.0)
    whole = completion("Hi")
    with serving.stream() as answer, serving.connect(post(whole)) as waiting:
        lines = answer.iter_lines()
        next(lines)
        with serving.stream("crash") as crashed:
            assert crashed.status_code == 503
        rest = [line for line in lines if line]
        assert '"code": 503' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        assert waiting.recv(1 << 16).startswith(b"HTTP/1.1 503 ")
    for path in ("/health", "/ready"):
        assert serving.get(path).status_code == 503
    with serving.stream() as late:
        assert late.status_code == 503
    assert serving.get("/metrics").status_code == 200
    serving.process.terminate()
    assert serving.process.wait(10) == 0


def test_a_taken_port_is_a_settings_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port}.*--port"):
            bind("127.0.0.1", port)


def test_an_unknown_address_is_a_settings_error():
    with pytest.raises(SettingsError, match="no-such-host"):
        bind("no-such-host.invalid", 0)


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:")]
)
def test_the_url_is_one_that_works_from_here(host, shown):
    with bind(host, 0) as bound:
        assert url_of(bound).startswith(shown)
