"""The process around the application, with a fake engine and a real uvicorn."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import httpx
import pytest

from polydelta.server.serving import bind, url_of
from polydelta.server.settings import SettingsError

PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
from conftest import FakeEngine
from pathlib import Path
from polydelta.engine.request import FinishReason, RequestOutput
from polydelta.engine.stats import EngineStats
from polydelta.server.app import create_app
from polydelta.server.serving import Server, bind, url_of
from polydelta.server.settings import load_settings
from polydelta.server.stores import disk_tier, make_publisher, open_store

class StoppableEngine(FakeEngine):
    def __init__(self):
        super().__init__()
        self.alive = False
        self.handlers = {{}}

    def start(self):
        self.alive = True

    def stats(self):
        return EngineStats(num_running=len(self.handlers))

    def submit(self, request, on_output):
        self.handlers[request.request_id] = on_output
        super().submit(request, on_output)

    def shutdown(self, timeout=10.0):
        self.alive = False
        for request_id, on_output in self.handlers.items():
            self.aborted.add(request_id)
            on_output(RequestOutput(request_id, "", (), finish_reason=FinishReason.ABORT))
        self.handlers.clear()

engine = StoppableEngine()
engine.endless = True
settings = load_settings(
    adapters=(), store=Path({store!r}), port=0, shutdown_timeout={timeout}
)
store = open_store(settings)
with bind(settings.host, settings.port) as bound:
    publisher = make_publisher(store, engine, settings, disk_tier(store, settings))
    app = create_app(engine, store, publisher, settings)
    ready = lambda: print(url_of(bound), flush=True)
    Server(app, engine, settings, ready).serve_until_stopped(bound)
print("stopped", flush=True)
"""


@pytest.fixture
def serve(tmp_path):
    """Starts the program; its process and its URL."""
    started = []

    def start(timeout: float = 0.0) -> tuple[subprocess.Popen, str]:
        program = textwrap.dedent(PROGRAM).format(
            folder=os.path.dirname(__file__), store=str(tmp_path), timeout=timeout
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_an_idle_server_with_code_0(serve, number):
    process, url = serve()
    assert httpx.get(f"{url}/health").status_code == 200
    process.send_signal(number)
    assert process.wait(10) == 0
    assert process.stdout.read() == "stopped\n"


def test_requests_in_flight_end_with_abort(serve):
    process, url = serve()
    body = {"model": "fake-base", "prompt": "Hi", "stream": True}
    began = time.monotonic()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"abort"' in rest[-2]
    assert process.wait(10) == 0
    assert time.monotonic() - began < 10


def test_requests_in_flight_get_the_time_that_was_set(serve):
    process, url = serve(timeout=1.0)
    body = {"model": "fake-base", "prompt": "Hi", "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as answer:
        next(answer.iter_lines())
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.8)
        # Nobody new is let in meanwhile.
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert process.wait(10) == 0


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
