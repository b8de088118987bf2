"""The adapters' routes over a real store and a fake engine, and requests that come in pieces."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from safetensors.torch import save

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear, LinearPart
from polydelta.adapters_store.disk_tier import DiskTier
from polydelta.adapters_store.errors import AdapterError, InUseError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE, AdapterRef
from polydelta.adapters_store.store import AdapterStore, StoreConfig
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.publisher import Publisher
from polydelta.engine.adapter_entry import AdapterPlace, ResidencyState
from polydelta.server.adapters.changes import Changes
from polydelta.server.adapters.lora_routes import lora_router
from polydelta.server.adapters.publishing import Publishing
from polydelta.server.adapters.routes import adapters_router
from polydelta.server.errors import install_error_handlers
from polydelta.server.service import Service

HIDDEN = 20
BOUNDARY = "sep"


class FakePool:
    """Does at once what the engine is asked for."""

    def __init__(self, layout: BaseLayout) -> None:
        self.layout = layout
        self.alive = True
        self.places: dict[AdapterRef, AdapterPlace] = {}
        self.pinned: set[str] = set()
        # Paths that adapters were loaded from.
        self.read: list[Path] = []
        self.error: Exception | None = None
        # Orders stay undone.
        self.stuck = False
        self.orders: list[Future[None]] = []

    def adapter_place(self, ref: AdapterRef) -> AdapterPlace:
        return self.places.get(ref, AdapterPlace(ResidencyState.ON_DISK))

    def load_adapter(self, ref: AdapterRef, pin: bool = False) -> Future[None]:
        def load() -> None:
            self.read.append(ref.path)
            self.places[ref] = AdapterPlace(ResidencyState.RESIDENT, 3)
            if pin:
                self.pinned.add(ref.name)

        return self._order(load)

    def withdraw(self, order: Future[None]) -> None:
        if not order.done():
            order.set_exception(AdapterError("The order was withdrawn."))

    def unpin_adapter(self, ref: AdapterRef) -> Future[None]:
        return self._order(lambda: self.pinned.discard(ref.name))

    def evict_adapter(self, ref: AdapterRef) -> Future[None]:
        if ref.name in self.pinned:
            self.error = InUseError(f"{ref.name!r} is pinned: unpin it first.")
        return self._order(lambda: self.places.pop(ref, None))

    def _order(self, work: Callable[[], object]) -> Future[None]:
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        self.orders.append(done)
        if not self.alive:
            done.set_exception(AdapterError("The engine has stopped."))
        elif self.error is not None:
            done.set_exception(self.error)
        elif not self.stuck:
            work()
            done.set_result(None)
        return done


@dataclass
class World:
    """A server of adapters, from inside."""

    root: Path
    engine: FakePool
    store: AdapterStore
    app: FastAPI

    @property
    def staging(self) -> list[Path]:
        """Uploads under way."""
        folder = self.store.staging_folder
        return list(folder.iterdir()) if folder.is_dir() else []

    def folder_adapter(self, adapter_id: str, files: Mapping[str, bytes]) -> Path:
        """An adapter in the operator's folder."""
        return write(self.root / "folders" / adapter_id, files)

    def named_adapter(self, name: str, files: Mapping[str, bytes]) -> Path:
        """A folder that clients may name."""
        return write(self.root / "allowed" / name, files)


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    layout = BaseLayout(
        "tiny",
        2,
        (FusedLinear("self_attn.o_proj", HIDDEN, (LinearPart("self_attn.o_proj", HIDDEN),)),),
    )
    for name in ("folders", "allowed"):
        (tmp_path / name).mkdir()
    folders = FolderCatalog([tmp_path / "folders"])
    store = AdapterStore(StoreConfig(tmp_path / "store"), folders)
    tier = DiskTier(layout, torch.float32, store.packed_folder, store.content, 1 << 30)
    limits = UploadLimits(max_file_bytes=1 << 20, max_total_bytes=2 << 20, max_files=8)
    engine = FakePool(layout)
    service = Service(
        engine=engine,
        store=store,
        publisher=Publisher(store, tier, layout, limits, [tmp_path / "allowed"]),
        metrics=None,
        base_name="base",
        started=0,
    )
    app = FastAPI()
    install_error_handlers(app)
    publishing, changes = Publishing(service), Changes(store)
    app.include_router(adapters_router(service, publishing, changes))
    app.include_router(lora_router(service, publishing, changes))
    yield World(tmp_path, engine, store, app)
    store.close()


def lora(seed: int = 0, rank: int = 2) -> dict[str, bytes]:
    """The two files of a LoRA, by name; another seed is another content."""
    generator = torch.Generator().manual_seed(seed)
    module = "base_model.model.model.layers.1.self_attn.o_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.randn(rank, HIDDEN, generator=generator),
        f"{module}.lora_B.weight": torch.randn(HIDDEN, rank, generator=generator),
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["o_proj"]}
    return {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(tensors)}


@pytest.fixture
def make_lora() -> Callable[..., dict[str, bytes]]:
    return lora


def zipped(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def tarred(files: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


@pytest.fixture
def packers() -> dict[str, Callable[[Mapping[str, bytes]], bytes]]:
    return {"x.zip": zipped, "x.tar.gz": tarred}


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    # One event loop for all requests of a test.
    with TestClient(world.app, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def upload(client: TestClient) -> Callable[..., Any]:
    """POSTs files under an id; the record of the answer, which must be a good one."""

    def post(adapter_id: str, files: Mapping[str, bytes], **labels: str) -> dict[str, Any]:
        parts = [("files", (name, content)) for name, content in files.items()]
        data = {"id": adapter_id} | ({"labels": json.dumps(labels)} if labels else {})
        answer = client.post("/v1/adapters", data=data, files=parts)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    return post


def refused(answer: Any, status: int, param: str | None = None) -> str:
    """The message of an answer that must be OpenAI's error with this status."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (status, param)
    return error["message"]


@pytest.fixture
def refusal() -> Callable[..., str]:
    return refused


def form(*parts: tuple[str, str | None, bytes], boundary: str = BOUNDARY) -> bytes:
    """A multipart body of (field, file name, content)."""
    lines = []
    for field, filename, content in parts:
        name = f'; filename="{filename}"' if filename is not None else ""
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"{name}\r\n\r\n'
        lines.append(head.encode() + content + b"\r\n")
    return b"".join(lines) + f"--{boundary}--\r\n".encode()


@pytest.fixture
def make_form() -> Callable[..., bytes]:
    return form


@dataclass
class Answer:
    """As httpx has it, as far as tests ask."""

    status_code: int
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode()

    def json(self) -> Any:
        return json.loads(self.content)


async def call(
    app: FastAPI,
    chunks: Iterable[bytes],
    path: str = "/v1/adapters",
    method: str = "POST",
    content_type: str | bytes | None = f"multipart/form-data; boundary={BOUNDARY}",
    leave: bool = False,
    stall: bool = False,
    before_end: Callable[[], object] = lambda: None,
) -> Answer:
    """One request whose body comes chunk by chunk. With `leave`, the client hangs up after them;
    with `stall`, it stays and sends nothing more.

    before_end: called when all chunks were taken, and the request goes on.
    """

    async def receive() -> AsyncIterator[dict[str, Any]]:
        for chunk in chunks:
            yield {"type": "http.request", "body": chunk, "more_body": True}
        before_end()
        if stall:
            await asyncio.sleep(3600)
        if not leave:
            yield {"type": "http.request", "body": b"", "more_body": False}
            await asyncio.sleep(3600)
        while True:
            yield {"type": "http.disconnect"}

    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    if isinstance(content_type, str):
        content_type = content_type.encode("latin-1")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [] if content_type is None else [(b"content-type", content_type)],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive().__anext__, send)
    body = b"".join(message.get("body", b"") for message in messages)
    return Answer(messages[0]["status"], body)


@pytest.fixture
def send() -> Callable[..., Any]:
    """`call` in an event loop of its own."""
    return lambda *args, **options: asyncio.run(call(*args, **options))


@pytest.fixture
def send_async() -> Callable[..., Any]:
    return call
