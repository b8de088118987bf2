"""Uploads as bytes on the wire: how they are cut, what is refused, what is left behind."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.publisher import Published
from polydelta.adapters_store.upload.staging import Staging
from polydelta.server.adapters import publishing
from polydelta.server.adapters.multipart import MAX_HEADER_BYTES, MAX_PARTS, read_chunks
from polydelta.server.adapters.publishing import Publishing
from polydelta.server.errors import ApiError
from polydelta.server.tenants.tenant import OPERATOR

# `World` of conftest.py.
Worlds = Any
Send = Callable[..., Any]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def body(make_form: Callable[..., bytes], make_lora: Callable[..., Any]) -> bytes:
    files = make_lora()
    return make_form(
        ("id", None, b"sql"),
        ("labels", None, b'{"team": "a"}'),
        *(("files", name, content) for name, content in files.items()),
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000, 1 << 20])
def test_a_body_is_the_same_however_it_is_cut(
    size: int, world: Worlds, send: Send, body: bytes
) -> None:
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    answer = send(world.app, chunks)
    assert answer.status_code == 201
    assert (answer.json()["name"], answer.json()["labels"]) == ("sql@1", {"team": "a"})
    assert answer.json()["bytes"] == sum(
        path.stat().st_size for path in next((world.root / "store/content").iterdir()).iterdir()
    )
    assert world.staging == []


def test_the_order_of_the_fields_does_not_matter(
    world: Worlds, send: Send, make_form: Callable[..., bytes], make_lora: Callable[..., Any]
) -> None:
    files = make_lora()
    body = make_form(
        ("files", WEIGHTS, files[WEIGHTS]),
        ("labels", None, b'{"team": "a"}'),
        ("files", CONFIG, files[CONFIG]),
        ("id", None, b"sql"),
    )
    answer = send(world.app, [body])
    assert answer.status_code == 201
    assert answer.json()["labels"] == {"team": "a"}


def test_text_around_the_form_is_no_part_of_it(world: Worlds, send: Send, body: bytes) -> None:
    assert send(world.app, [b"\r\n", body, b"and more"]).status_code == 201


def test_what_comes_after_the_form_is_not_waited_for(
    world: Worlds, send: Send, body: bytes
) -> None:
    def endless() -> Iterator[bytes]:
        yield body
        while True:
            yield b"x" * 1000

    assert send(world.app, endless()).status_code == 201


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_body_that_is_cut_short_is_refused_and_nothing_stays(
    share: float, world: Worlds, send: Send, body: bytes, refusal: Callable[..., str]
) -> None:
    answer = send(world.app, [body[: int(share * (len(body) - 10))]])
    assert "last boundary" in refusal(answer, 400)
    assert world.staging == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_client_that_hangs_up_leaves_nothing_behind(
    share: float, world: Worlds, send: Send, body: bytes
) -> None:
    under_way: list[Path] = []
    answer = send(
        world.app,
        [body[: int(share * len(body))]],
        leave=True,
        before_end=lambda: under_way.extend(world.staging),
    )
    assert answer.status_code == 499
    assert len(under_way) == 1
    assert world.staging == []
    assert world.store.catalog.versions("sql") == []


def test_a_request_that_is_cancelled_leaves_nothing_behind(
    world: Worlds, send_async: Send, body: bytes
) -> None:
    async def cancel() -> None:
        taken = asyncio.Event()
        request = asyncio.create_task(
            send_async(world.app, [body[:-20]], stall=True, before_end=taken.set)
        )
        await taken.wait()
        assert len(world.staging) == 1
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request

    asyncio.run(cancel())
    assert world.staging == []


def test_a_client_that_falls_asleep_is_not_waited_for_for_ever() -> None:
    class Asleep:
        async def stream(self) -> Any:
            yield b"a"
            await asyncio.sleep(3600)

    async def read() -> list[bytes]:
        return [chunk async for chunk in read_chunks(Asleep(), idle_seconds=0.01)]

    with pytest.raises(ApiError, match="Nothing came") as error:
        asyncio.run(read())
    assert error.value.status == 408


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/mixed; boundary=sep",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        "multipart/form-data; boundary=" + "x" * 71,
        b"\xff\xfe; boundary=sep",
        "multipart/form-data; boundary=other",
    ],
)
def test_a_wrong_content_type_is_refused(
    content_type: str | bytes | None,
    world: Worlds,
    send: Send,
    body: bytes,
    refusal: Callable[..., str],
) -> None:
    refusal(send(world.app, [body], content_type=content_type), 400)
    assert world.staging == []


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (b"\r\n", "Content-Disposition"),
        (b"Content-Disposition: form-data\r\n\r\n", "Content-Disposition"),
        (b'Content-Disposition: attachment; name="id"\r\n\r\n', "Content-Disposition"),
        (b"no colon\r\n\r\n", "not a multipart form"),
        (b": no name\r\n\r\n", "not a multipart form"),
        (b'Content-Disposition: form-data; name="\xff"\r\n\r\n', "UTF-8"),
        (b"X: " + b"y" * MAX_HEADER_BYTES + b"\r\n\r\n", "header"),
        (b"X: y\r\n" * MAX_HEADER_BYTES + b"\r\n", "header"),
        (
            b"Content-Transfer-Encoding: base64\r\n"
            b'Content-Disposition: form-data; name="id"\r\n\r\n',
            "base64",
        ),
    ],
    ids=range(9),
)
def test_a_part_with_a_bad_head_is_refused(
    part: bytes, reason: str, world: Worlds, send: Send, refusal: Callable[..., str]
) -> None:
    body = b"--sep\r\n" + part + b"x\r\n--sep--\r\n"
    assert reason.casefold() in refusal(send(world.app, [body]), 400).casefold()


@pytest.mark.parametrize(
    ("part", "status", "param"),
    [
        (("name", None, b"sql"), 400, "name"),
        (("id", None, b"again"), 400, "id"),
        (("id", None, b"\xff"), 400, "id"),
        (("id", None, b"../up"), 400, "id"),
        (("id", None, b"sql@2"), 400, "id"),
        (("id", None, b"base"), 400, "id"),
        (("id", None, b"x" * 70_000), 413, "id"),
        (("labels", None, b"x"), 400, "labels"),
        (("labels", None, b"[]"), 400, "labels"),
        (("labels", None, b'{"a": 1}'), 400, "labels"),
        (("labels", None, b'{"a": "\\ud800"}'), 400, "labels"),
        (("labels", None, b'{"": "a"}'), 400, "labels"),
        (("labels", None, b'{"a":' * 9000), 400, "labels"),
        (("labels", None, b" " * 70_000), 413, "labels"),
        (("files", None, b"{}"), 400, "files"),
        (("files", "", b"{}"), 400, "files"),
        (("files", "../adapter_config.json", b"{}"), 400, "files"),
        (("files", "evil.exe", b"MZ"), 400, "files"),
        (("files", CONFIG, b"x" * (2 << 20)), 413, "files"),
    ],
    ids=range(19),
)
def test_a_bad_field_is_refused_by_name(
    part: tuple[str, str | None, bytes],
    status: int,
    param: str,
    world: Worlds,
    send: Send,
    make_form: Callable[..., bytes],
    make_lora: Callable[..., Any],
    refusal: Callable[..., str],
) -> None:
    files = [("files", name, content) for name, content in make_lora().items()]
    known = [("id", None, b"sql")] if part[0] != "id" or part[2] == b"again" else []
    answer = send(world.app, [make_form(*known, part, *files)])
    assert len(refusal(answer, status, param)) < 600
    assert world.staging == []
    assert world.store.catalog.known() == set()


def test_a_form_without_an_id_or_without_files_is_refused(
    world: Worlds, send: Send, make_form: Callable[..., bytes], refusal: Callable[..., str]
) -> None:
    assert "required" in refusal(send(world.app, [make_form()]), 400, "id")
    answer = send(world.app, [make_form(("id", None, b"sql"))])
    assert "adapter_config.json is missing" in refusal(answer, 400, "files")


def test_the_number_of_parts_and_of_files_is_bounded(
    world: Worlds, send: Send, make_form: Callable[..., bytes], refusal: Callable[..., str]
) -> None:
    many = [("files", f"{number}.txt", b"") for number in range(9)]
    assert "8 files" in refusal(send(world.app, [make_form(*many)]), 413, "files")
    empty = b"--sep\r\nContent-Disposition: form-data; name=id\r\n\r\n\r\n"
    answer = send(world.app, [empty * (MAX_PARTS + 1)])
    # One chunk is looked through before its parts are used.
    assert str(MAX_PARTS) in refusal(answer, 413)


def test_more_uploads_than_may_be_under_way_are_refused_at_once(
    world: Worlds,
    send_async: Send,
    body: bytes,
    refusal: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing, "MAX_UPLOADS", 2)

    async def stalled() -> asyncio.Task[Any]:
        taken = asyncio.Event()
        call = send_async(world.app, [body[:-20]], stall=True, before_end=taken.set)
        task = asyncio.create_task(call)
        await taken.wait()
        return task

    async def crowd() -> None:
        tasks = [await stalled(), await stalled()]
        assert "2 uploads are under way" in refusal(await send_async(world.app, [body]), 503)
        assert len(world.staging) == 2
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        assert (await send_async(world.app, [body])).status_code == 201
        tasks[1].cancel()
        await asyncio.wait(tasks)

    asyncio.run(crowd())
    assert world.staging == []


def test_an_upload_to_a_store_that_is_full_is_refused_before_it_is_taken(
    world: Worlds,
    send: Send,
    body: bytes,
    refusal: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(world.store.catalog, "total_bytes", lambda: 1 << 60)

    def chunks() -> Iterator[bytes]:
        yield body[:10]
        raise AssertionError("more of the body was taken")

    message = refusal(send(world.app, chunks()), 413, "files")
    assert "quota" in message
    assert world.staging == []


class NoChecks:
    """A publisher that takes everything that is sent whole."""

    def __init__(self, root: Path) -> None:
        huge = 1 << 40
        self._staging = Staging(root, UploadLimits(max_file_bytes=huge, max_total_bytes=huge))
        self.sizes: list[int] = []

    def begin(self) -> Any:
        return self._staging.begin()

    def publish(self, adapter_id: str, staged: Any, labels: Any, allowance: Any) -> Published:
        self.sizes.append(staged.nbytes)
        return Published(None, created=True)  # type: ignore[arg-type]


def test_an_upload_of_200_mb_takes_a_few_mb_of_memory(
    tmp_path: Path, make_form: Callable[..., bytes], make_lora: Callable[..., Any]
) -> None:
    values = 50_000_000
    header = json.dumps({"x": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}})
    start, end = make_form(
        ("id", None, b"big"),
        ("files", CONFIG, make_lora()[CONFIG]),
        ("files", WEIGHTS, b"@"),
    ).split(b"@")
    chunk = bytes(64_000)

    def chunks() -> Iterator[bytes]:
        yield start + len(header).to_bytes(8, "little") + header.encode()
        for _ in range(4 * values // len(chunk)):
            yield chunk
        yield end

    class Sent:
        headers = {"content-type": "multipart/form-data; boundary=sep"}  # noqa: RUF012

        async def stream(self) -> Any:
            for piece in chunks():
                yield piece

    class WithRoom:
        def check_room(self, allowance: None) -> None:
            pass

    class OfNoChecks:
        store = WithRoom()
        publisher = NoChecks(tmp_path)
        base_name = "base"

    service = OfNoChecks()
    tracemalloc.start()
    try:
        asyncio.run(Publishing(service).from_form(OPERATOR, Sent(), None))  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert service.publisher.sizes[0] > 4 * values
    assert peak < 8 << 20
