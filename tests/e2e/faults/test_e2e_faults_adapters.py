"""Adapters whose files go, or are damaged, at any moment, and loads that fail in any way.

Whoever asks for such an adapter is told; nobody else notices, and a mended one is served again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

# `FaultyServer` of conftest.py.
Server = Any
Damage = Callable[[Path], object]

CONFIG, WEIGHTS = Path(CONFIG_FILE), Path(WEIGHTS_FILE)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def garble(path: Path, start: int) -> None:
    """64 bytes from there on, which are no numbers."""
    content = bytearray(path.read_bytes())
    start %= len(content)
    content[start : start + 64] = b"\xff" * len(content[start : start + 64])
    path.write_bytes(content)


DAMAGES: dict[str, Damage] = {
    "the folder is gone": shutil.rmtree,
    "the weights are gone": lambda folder: (folder / WEIGHTS).unlink(),
    "the config is gone": lambda folder: (folder / CONFIG).unlink(),
    "the weights are cut short": lambda folder: cut(folder / WEIGHTS),
    "the config is cut short": lambda folder: cut(folder / CONFIG),
    "the weights are empty": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "the header is garbled": lambda folder: garble(folder / WEIGHTS, 8),
    "the numbers are garbled": lambda folder: garble(folder / WEIGHTS, -200),
    "the config is garbled": lambda folder: garble(folder / CONFIG, 5),
}
damages = pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))


def refused(answer: Any) -> str:
    """Why; it must be told to the client, and be no failure of the server's own."""
    assert answer.status_code in (400, 404, 503), answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "/" not in error["message"].replace("/v1/", ""), "it tells of the server's folders"
    return str(error["message"])


def streamed(lines: Any) -> str:
    """The rest of a stream's text."""
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert all("error" not in chunk for chunk in chunks), chunks[-1]
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@damages
def test_a_damaged_folder_of_the_operator_s_fails_alone_until_it_is_mended(
    server: Server, writer: Any, damage: Damage
) -> None:
    source = writer.lora("own", 4, seed=3)
    # Before its first load.
    damage(server.install(source))
    refused(server.complete("own"))
    folder = server.install(source)
    short, long = server.ask("own"), server.ask("own", max_tokens=120)
    # While it is resident, and a stream runs with it.
    with server.stream("own", max_tokens=120) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        damage(folder)
        refused(server.complete("own"))
        assert streamed([first, *lines]) == long
    server.install(source)
    assert server.ask("own") == short
    # After it was evicted.
    server.evict("own")
    damage(folder)
    refused(server.complete("own"))
    server.install(source)
    assert server.ask("own") == short
    shutil.rmtree(folder)


@damages
def test_files_that_go_while_they_are_loaded_fail_those_who_wait(
    server: Server, writer: Any, damage: Damage
) -> None:
    source = writer.lora("own", 4, seed=3)
    folder = server.install(source)
    with ThreadPoolExecutor(3) as clients, server.fault("wait-own") as go_on:
        waiting = [clients.submit(server.complete, "own", n=n) for n in (1, 2, 3)]
        server.until("polydelta_requests_waiting_for_adapter", 6)
        # Nobody else waits for it.
        server.ask("steady")
        damage(folder)
        go_on()
        for answer in waiting:
            refused(answer.result())
    server.install(source)
    server.ask("own")
    shutil.rmtree(folder)


def only_packed(store: Path, digest: str) -> Path:
    (path,) = (store / "packed" / digest).iterdir()
    return path


PACKED_DAMAGES: dict[str, Damage] = {
    "gone": Path.unlink,
    "cut short": cut,
    "empty": lambda path: path.write_bytes(b""),
    "header garbled": lambda path: garble(path, 60),
    # What they lead to must never be read or written.
    "indices garbled": lambda path: garble(path, -3000),
    "never written": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("kind", ["lora", "shira"])
def test_a_damaged_packed_form_is_made_anew(server: Server, writer: Any, kind: str) -> None:
    record = server.put("up", getattr(writer, kind)("up", 4, seed=5)).json()
    answer = server.ask("up")
    path = only_packed(server.store, record["sha256"])
    content = path.read_bytes()
    for damage in PACKED_DAMAGES.values():
        damage(path)
        assert server.ask("up") == answer
        server.evict("up")
        assert server.ask("up") == answer
        assert path.read_bytes() == content
        server.evict("up")
    server.http.delete("/v1/adapters/up")


@damages
def test_a_lost_or_damaged_upload_is_refused_until_it_is_sent_again(
    server: Server, writer: Any, damage: Damage
) -> None:
    source = writer.shira("up", 3, seed=6)
    record = server.put("up", source).json()
    content = server.store / "content" / record["sha256"]
    packed = only_packed(server.store, record["sha256"])
    # Before its first load: the packed form is there.
    damage(content)
    answer = server.ask("up")
    # Resident.
    packed.unlink()
    assert server.ask("up") == answer
    server.evict("up")
    refused(server.complete("up"))
    again = server.put("up", source)
    assert (again.status_code, again.json()["version"]) == (200, record["version"])
    assert server.ask("up") == answer
    # From its files, as the packed form has gone once more.
    server.evict("up")
    packed.unlink()
    assert server.ask("up") == answer
    server.http.delete("/v1/adapters/up")
    assert not content.exists()


@pytest.mark.parametrize(
    "error", ["RuntimeError", "MemoryError", "OSError", "RecursionError", "SystemExit"]
)
def test_a_loader_that_raises_anything_fails_those_who_asked_and_nobody_else(
    server: Server, writer: Any, error: str
) -> None:
    server.install(writer.lora("own", 4, seed=3))
    parts = {"adapters": [{"id": "steady"}, {"id": "own", "weight": 0.5}]}
    asked: list[tuple[str, dict[str, Any]]] = [
        *[("own", {"n": n}) for n in (1, 2, 3) * 3],
        *[("own", {"stream": True})] * 6,
        ("tiny", parts),
    ]
    with (
        ThreadPoolExecutor(len(asked) + 1) as clients,
        server.fault("raise-own", error),
        server.fault("wait-own") as go_on,
    ):
        answers = [clients.submit(server.complete, model, **more) for model, more in asked]
        order = clients.submit(server.http.post, "/v1/adapters/own/load")
        server.until("polydelta_requests_waiting_for_adapter", 25)
        go_on()
        refusals = [answer.result() for answer in (*answers, order)]
    for refusal in refusals:
        assert refusal.status_code == 503
        assert "a test has called up" not in refusal.text
    server.ask("own")
    server.ask("tiny", **parts)
    shutil.rmtree(server.adapters / "own")
