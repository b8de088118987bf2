"""One server for all faults, which balances its books whenever it rests.

It is a `faulty_server.py`. Where a file system can be mounted, its store has one of its own, small
enough to be filled.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from polydelta.adapters_store.base_layout import BaseLayout

PROMPT = "The quick brown fox jumps over the lazy dog, once more."
FAULTY_SERVER = Path(__file__).with_name("faulty_server.py")
# Seconds in which a server is at rest again.
PATIENCE = 30.0
# What is 0 then.
BUSY = (
    *("vllm:num_requests_running", "vllm:num_requests_waiting"),
    *("pages:kv", "pages:adapters"),
)
# Its own, and connections that clients keep open.
MOST_FILES = 100
STORE_BYTES = 20 << 20
# Small enough for sixteen sequences to need each other's pages.
OPTIONS = ("--check-integrity", "--pool", "2MiB")
# A command in a mount namespace of its own, in which the folder $0 is a file system of so many
# bytes: it goes with the process.
MOUNT = f'mount -t tmpfs -o size={STORE_BYTES} tmpfs "$0" && exec "$@"'
NAMESPACES = (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount"))


@dataclass(frozen=True)
class FaultyServer:
    url: str
    process: subprocess.Popen[bytes]
    http: httpx.Client
    # Where faults are called up; see faulty_server.py.
    faults: Path
    # The operator's folder of adapters.
    adapters: Path
    # The store, as it can be reached from here.
    store: Path
    # Whether the store has a file system of its own.
    mounted: bool

    def body(self, model: str, **fields: Any) -> dict[str, Any]:
        """Of a request for a completion whose text is always the same."""
        body = {"model": model, "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
        return body | {"max_tokens": 12} | fields

    def complete(self, model: str, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json=self.body(model, **fields))

    def stream(self, model: str, **fields: Any) -> AbstractContextManager[httpx.Response]:
        body = self.body(model, stream=True, **fields)
        return self.http.stream("POST", "/v1/completions", json=body)

    def ask(self, model: str, **fields: Any) -> str:
        answer = self.complete(model, **fields)
        assert answer.status_code == 200, answer.text
        return "".join(choice["text"] for choice in answer.json()["choices"])

    def put(self, adapter_id: str, folder: Path) -> httpx.Response:
        files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir()]
        return self.http.put(f"/v1/adapters/{adapter_id}", files=files)

    def install(self, folder: Path) -> Path:
        """A copy of an adapter, in the operator's folder; another one of its name goes."""
        target = self.adapters / folder.name
        shutil.rmtree(target, ignore_errors=True)
        return shutil.copytree(folder, target)

    def evict(self, adapter_id: str) -> None:
        answer = self.http.post(f"/v1/adapters/{adapter_id}/evict")
        assert answer.status_code == 200, answer.text

    @contextlib.contextmanager
    def fault(self, name: str, content: str = "") -> Iterator[Callable[[], None]]:
        """The fault is there within; it ends earlier when what it gives is called."""
        path = self.faults / name
        path.write_text(content)

        def end() -> None:
            path.unlink(missing_ok=True)

        try:
            yield end
        finally:
            end()

    def metrics(self) -> dict[str, float]:
        """Value by name; `pages:OWNER`, and `finished:REASON` of choices."""
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                name = sample.name
                if name == "polydelta_pool_pages":
                    name = f"pages:{sample.labels['owner']}"
                elif name == "vllm:request_success_total":
                    name = f"finished:{sample.labels['finished_reason']}"
                found[name] = found.get(name, 0.0) + sample.value
        return found

    def until(self, name: str, count: float) -> None:
        """Waits for a metric to be at least that much."""
        deadline = time.monotonic() + PATIENCE
        while self.metrics()[name] < count:
            assert time.monotonic() < deadline, f"{name} never was {count}"

    def rest(self) -> None:
        """Nothing runs, waits, or holds a page of the pool or a socket, in the end."""

        def busy() -> dict[str, float]:
            waiting = {name: found[name] for name in BUSY if found[name]}
            open_files = found["process_open_fds"]
            return waiting | ({"open files": open_files} if open_files > MOST_FILES else {})

        deadline = time.monotonic() + PATIENCE
        found = self.metrics()
        while busy():
            assert time.monotonic() < deadline, f"the server is still busy: {busy()}"
            time.sleep(0.02)
            found = self.metrics()
        pages = sum(value for name, value in found.items() if name.startswith("pages:"))
        assert pages == found["polydelta_pool_size_pages"]
        # Its loop ends when the books do not balance.
        assert self.http.get("/health").status_code == 200

    def answers(self) -> dict[str, str]:
        """Of the base, of an adapter of the operator's and of an uploaded one."""
        return {model: self.ask(model, max_tokens=5) for model in ("tiny", "steady", "sent")}


def mounting() -> tuple[str, ...] | None:
    """The command that makes a mount namespace here; None where there can be none."""
    for command in NAMESPACES:
        with contextlib.suppress(OSError):
            tried = [*command, "sh", "-c", MOUNT, "/tmp", "true"]
            if subprocess.run(tried, capture_output=True, check=False).returncode == 0:
                return command
    return None


@pytest.fixture(scope="session")
def start_faulty(
    launch: Callable[..., Any], tiny_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., FaultyServer]]:
    """Starts faulty servers, one in the place of another, or with a small store where such can be
    mounted."""
    clients = contextlib.ExitStack()

    def start(
        *options: str, mount: bool = False, instead_of: FaultyServer | None = None
    ) -> FaultyServer:
        """instead_of: has ended; its port and its folders are taken over."""
        root = instead_of.faults.parent if instead_of else tmp_path_factory.mktemp("faulty")
        port = httpx.URL(instead_of.url).port if instead_of else None
        faults, adapters, store = (root / name for name in ("faults", "adapters", "store"))
        for folder in (faults, adapters, store):
            folder.mkdir(exist_ok=True)
        namespace = mounting() if mount else None
        program = [sys.executable, str(FAULTY_SERVER), str(faults)]
        if namespace is not None:
            program = [*namespace, "sh", "-c", MOUNT, str(store), *program]
        options = ("--model", str(tiny_file), "--adapters", str(adapters), *OPTIONS, *options)
        running = launch(*options, "--store", str(store), program=program, port=port)
        # Through its own root, what is mounted there for the server alone is seen from here too.
        seen = Path(f"/proc/{running.process.pid}/root{store}") if namespace else store
        http = clients.enter_context(httpx.Client(base_url=running.url, timeout=PATIENCE))
        return FaultyServer(
            running.url, running.process, http, faults, adapters, seen, namespace is not None
        )

    with clients:
        yield start


@pytest.fixture
def writer(adapter_writer: Callable[..., Any], tiny_file_layout: BaseLayout) -> Any:
    return adapter_writer(tiny_file_layout)


@pytest.fixture(scope="session")
def shared(start_faulty: Callable[..., FaultyServer]) -> FaultyServer:
    return start_faulty(mount=True)


@pytest.fixture(scope="session")
def answers() -> dict[str, str]:
    """Of the shared server, before any fault."""
    return {}


@pytest.fixture
def server(shared: FaultyServer, writer: Any, answers: dict[str, str]) -> Iterator[FaultyServer]:
    """The shared server. After the test it must be at rest and answer as it always did."""
    if not answers:
        shared.install(writer.lora("steady", 3, seed=1))
        assert shared.put("sent", writer.shira("sent", 2, seed=2)).status_code == 201
        answers |= shared.answers()
    yield shared
    shared.rest()
    assert shared.answers() == answers
    shared.rest()
