"""Locust as its own process against servers that have no model: what it sends, counts and says."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

ROOT = Path(__file__).parents[2]
# Seconds from a request to its first token, and from each token to the next.
FIRST, GAP = 0.1, 0.03
TOKENS = 6
BASE = {"id": "base", "parent": None}
KEY = "a-key"
DONE = "[DONE]"


def text_event(text: str) -> str:
    return json.dumps({"choices": [{"text": text}], "usage": None})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": TOKENS}})
# By model: the events of a stream that is not as it must be, or a status and a body.
FAULTS: dict[str, list[str] | tuple[int, str]] = {
    "errs": [text_event("a"), '{"error": {"message": "no room for errs"}}', DONE],
    "ends-early": [text_event("a"), USAGE],
    "empty": [text_event(""), USAGE, DONE],
    "garbled": ["{", DONE],
    "hangs-up": [text_event("a")],
    "busy": (503, '{"error": {"message": "come back later"}}'),
    "fails": (500, '{"error": {"message": "fails is broken"}}'),
    "not-json": (400, "<p>bad gateway"),
}


pytestmark = pytest.mark.slow


@dataclass
class Seen:
    """One request as it came."""

    method: str
    path: str
    head: str
    body: bytes


@dataclass
class FakeServer:
    """Speaks enough HTTP and OpenAI for Locust, in a thread of its own."""

    cards: list[dict[str, Any]]
    # Whether it has /v1/adapters.
    uploads: bool = False
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    # Models of streams that were read to the end, and of those that were left.
    finished: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    # Version numbers by id, of adapters that are there now.
    adapters: dict[str, list[int]] = field(default_factory=dict)

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        async with await asyncio.start_server(self.handle, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            started.set()
            await stop.wait()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"content-length: *(\d+)", head, re.IGNORECASE)
                body = await reader.readexactly(int(length[1]) if length else 0)
                method, path, _ = head.split(" ", 2)
                self.seen.append(Seen(method, path.partition("?")[0], head, body))
                if path.endswith("/completions"):
                    await self.complete(json.loads(body)["model"], reader, writer)
                else:
                    status, answer = self.answer(self.seen[-1])
                    self.write(writer, status, json.dumps(answer))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def write(self, writer: asyncio.StreamWriter, status: int, body: str) -> None:
        head = f"HTTP/1.1 {status} X\r\nRetry-After: 0\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())

    def answer(self, request: Seen) -> tuple[int, Any]:
        if request.path == "/v1/models":
            return 200, {"data": self.cards}
        if not self.uploads:
            return 404, {"detail": "Not Found"}
        if request.method == "GET":
            return 200, {"data": []}
        if request.path == "/v1/adapters":
            name = request.body.partition(b'name="id"\r\n\r\n')[2].partition(b"\r\n")[0].decode()
            self.adapters[name] = [1]
            return 201, {"id": name, "version": 1}
        versions = self.adapters[request.path.split("/")[3]]
        if request.method == "DELETE":
            del self.adapters[request.path.split("/")[3]]
            return 200, {"data": []}
        versions.append(versions[-1] + 1)
        return 201, {"version": versions[-1]}

    async def complete(
        self, model: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Raises ConnectionError where the stream is cut, by either side."""
        fault = FAULTS.get(model)
        if isinstance(fault, tuple):
            self.write(writer, *fault)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        if fault is None:
            for number in range(TOKENS):
                await asyncio.sleep(GAP if number else FIRST)
                if reader.at_eof() or writer.is_closing():
                    self.left.append(model)
                    raise ConnectionError
                self.send(writer, text_event("word"))
            fault = [USAGE, DONE]
        for event in fault:
            self.send(writer, event)
        if model == "hangs-up":
            await writer.drain()
            raise ConnectionError
        writer.write(b"0\r\n\r\n")
        self.finished.append(model)

    def send(self, writer: asyncio.StreamWriter, event: str) -> None:
        line = f"data: {event}\n\n"
        writer.write(f"{len(line):x}\r\n{line}\r\n".encode())


def run_locust(port: int, options: str) -> tuple[int, dict[tuple[str, str], dict[str, Any]], str]:
    """Exit code, rows of the statistics by type and name, log."""
    command = [sys.executable, "-m", "locust", "-f", "load_tests/locustfile.py", "--headless"]
    command += ["-H", f"http://127.0.0.1:{port}/v1", "--json", *shlex.split(options)]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LOCUST_") and name != "OPENAI_API_KEY"
    }
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    rows = json.loads(ended.stdout) if ended.stdout else []
    return ended.returncode, {(row["method"], row["name"]): row for row in rows}, ended.stderr


def served(fake: FakeServer) -> Iterator[FakeServer]:
    """For the time in which the generator waits."""
    loop, started, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=[fake.serve(started, stop)])
    thread.start()
    assert started.wait(10)
    yield fake
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)


def tiny_adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 1}')
    (folder / "adapter_model.safetensors").write_bytes(save({"a": np.arange(3, dtype=np.float32)}))


@dataclass
class Run:
    server: FakeServer
    code: int
    rows: dict[tuple[str, str], dict[str, Any]]
    log: str

    def count(self, method: str, name: str) -> int:
        row = self.rows.get((method, name))
        return int(row["num_requests"]) if row else 0

    def mean(self, method: str, name: str) -> float:
        """Milliseconds."""
        row = self.rows[method, name]
        return float(row["total_response_time"] / row["num_requests"])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Two adapters and uploads, by users who wait for their answers when the time is up."""
    folder = tmp_path_factory.mktemp("adapters")
    tiny_adapter(folder / "tiny")
    adapters = [{"id": f"adapter-{number}", "parent": "base"} for number in range(2)]
    for fake in served(FakeServer([BASE, *adapters], uploads=True)):
        options = (
            "-u 4 -r 4 -t 3s --stop-timeout 10 --alpha 1 --prompt-tokens 3,5 "
            f"--output-tokens {TOKENS} --disconnect-share 0.3 --upload-share 0.4 "
            f"--upload-folder {shlex.quote(str(folder))} --api-key {KEY}"
        )
        yield Run(fake, *run_locust(fake.port, options))


@pytest.fixture(scope="module")
def bad() -> Iterator[Run]:
    cards = [{"id": name, "parent": "base"} for name in FAULTS]
    for fake in served(FakeServer(cards)):
        options = "-u 3 -r 9 -t 1s --alpha 1 --disconnect-share 0 --chat"
        yield Run(fake, *run_locust(fake.port, options))


def test_every_stream_is_counted_under_its_kind_and_whether_it_was_left(good: Run):
    assert good.code == 0, good.log
    assert good.server.left

    def kinds(models: list[str]) -> Counter[str]:
        words = {"base": "base", "adapter": "adapter", "locust": "uploaded"}
        return Counter(words[model.partition("-")[0]] for model in models)

    asked = kinds(good.server.finished + good.server.left)
    assert asked.keys() == {"base", "adapter", "uploaded"}
    for kind in asked:
        name = f"/v1/completions {kind}"
        complete, left = good.count("POST", name), good.count("POST", f"{name} (left)")
        assert complete + left == asked[kind]
        # Some leave before the first token.
        assert 0 < complete <= good.count("TTFT", name) <= asked[kind]
        assert good.count("TPOT", name) == complete
        assert good.rows["POST", name]["total_content_length"] == complete * TOKENS
    assert sum(row["num_failures"] for row in good.rows.values()) == 0


def test_the_first_token_is_seen_when_it_comes_and_not_with_the_last(good: Run):
    name = "/v1/completions base"
    assert good.rows["TTFT", name]["min_response_time"] >= FIRST * 1e3
    rest = good.mean("POST", name) - good.mean("TTFT", name)
    # What a stream takes after its first token: half of it is still far from none.
    assert rest > (TOKENS - 1) * GAP * 1e3 / 2
    assert good.mean("TPOT", name) > GAP * 1e3 / 2


def test_requests_are_what_was_asked_for(good: Run):
    bodies = [json.loads(seen.body) for seen in good.server.seen if "completions" in seen.path]
    assert all(3 <= len(body["prompt"].split()) <= 5 for body in bodies)
    assert len({body["prompt"] for body in bodies}) > len(bodies) / 2
    assert all(body["max_tokens"] == TOKENS and body["stream"] for body in bodies)
    assert all(f"Bearer {KEY}\r\n" in seen.head for seen in good.server.seen)
    # Statistics have as many rows however many adapters there are.
    assert len(good.rows) <= 2 + 4 + 4 * 3


def test_adapters_are_made_replaced_rolled_back_and_deleted(good: Run):
    asked = Counter(
        (seen.method, seen.path.count("/")) for seen in good.server.seen if "adapters" in seen.path
    )
    assert good.count("POST", "/v1/adapters") == asked["POST", 2] > 0
    assert good.count("PUT", "/v1/adapters/{id}") == asked["PUT", 3] > 0
    assert good.count("POST", "/v1/adapters/{id}/rollback") == asked["POST", 4] > 0
    assert good.count("DELETE", "/v1/adapters/{id}") == asked["DELETE", 3] > 0
    assert good.server.adapters == {}
    forms = [seen.body for seen in good.server.seen if b'name="files"' in seen.body]
    notes = [re.search(rb'"load_test":"(\w+)"', form) for form in forms]
    assert len({note[1] for note in notes if note}) == len(forms) > 1


def test_answers_that_are_none_are_failures_with_their_reason(bad: Run):
    assert bad.code == 1
    assert "requests failed; 0.00% may" in bad.log
    for message in (
        "error event: no room for errs",
        "the stream ended without [DONE]",
        "the stream has no content",
        "an event is no JSON object: {",
        "the connection broke in mid-stream",
        "503: come back later",
        "500: ... is broken",
        "400: <p>bad gateway",
    ):
        assert message in bad.log
    failed = bad.rows["POST", "/v1/chat/completions adapter"]
    assert failed["num_failures"] == failed["num_requests"] > 0
    assert bad.count("POST", "/v1/chat/completions adapter (refused, 503)") > 0
    assert not any(method == "TPOT" for method, _ in bad.rows)


def test_nothing_is_uploaded_where_uploads_are_not_known(bad: Run):
    assert "without uploads" in bad.log
    assert {seen.path for seen in bad.server.seen if seen.method != "GET"} == {
        "/v1/chat/completions"
    }


def test_as_many_failures_as_are_allowed_leave_the_exit_code_alone():
    for fake in served(FakeServer([{"id": "busy"}])):
        code, rows, log = run_locust(fake.port, "-t 1s --max-fail-ratio 1 --models busy")
    assert code == 0, log
    assert rows["POST", "/v1/completions base (refused, 503)"]["num_failures"] > 0


def test_a_server_that_is_not_there_ends_the_test_at_once():
    code, _, log = run_locust(9, "-t 1h")
    assert code == 1
    assert "There is nothing to test. http://127.0.0.1:9/v1/models: no answer" in log


def test_arguments_that_make_no_sense_are_refused():
    code, _, log = run_locust(9, "--output-tokens 9,8")
    assert code == 2
    assert "'9,8' is no MIN,MAX" in log
