"""A disk that takes no more, at any byte of an upload: the client is told, nothing is left behind,
and everything that is there is served on."""

from __future__ import annotations

import contextlib
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polydelta.adapters_store.reference import WEIGHTS_FILE

# `FaultyServer` of conftest.py.
Server = Any

# Of a LoRA on all linear layers of the tiny model, in float32.
BYTES_PER_RANK = 10_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of another process")


@contextlib.contextmanager
def no_file_larger_than(server: Server, nbytes: int) -> Iterator[None]:
    """Writes of the server's beyond that fail, as on a full disk but for the error's number."""
    pid, limit = server.process.pid, resource.RLIMIT_FSIZE
    soft, hard = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, (nbytes, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, limit, (soft, hard))


@contextlib.contextmanager
def bytes_left(server: Server, nbytes: int) -> Iterator[None]:
    """The store's file system has room for so many bytes more, in pages of 4096."""
    filler = server.store / "filler"
    try:
        with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(1 << 16)):
                pass
        left = filler.stat().st_size - nbytes
        with open(filler, "r+b") as file:
            file.truncate(left)
        yield
    finally:
        filler.unlink()


def files(store: Path) -> set[str]:
    """All but the catalog, what it writes beside itself, and what fills the disk."""
    found = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(("catalog", "filler"))}


def upload_on_full_disk(server: Server, folder: Path) -> bool:
    """Whether an upload is taken; if not, nothing of it is left, and all else is served."""
    before = files(server.store)
    answer = server.put("big", folder)
    for adapter in ("sent", "steady"):
        server.evict(adapter)
        server.ask(adapter)
    for path in ("/v1/adapters", "/v1/adapters/sent"):
        assert server.http.get(path).status_code == 200
    if answer.status_code == 201:
        text = server.ask("big")
        server.evict("big")
        assert server.ask("big") == text
        return True
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["message"]
    assert server.complete("big").status_code == 404
    assert files(server.store) == before
    return False


def check_afterwards(server: Server, folder: Path) -> None:
    """With room again, the same upload is taken, served and deleted."""
    assert server.put("big", folder).status_code in (200, 201)
    server.ask("big")
    assert server.http.delete("/v1/adapters/big").status_code == 200


def test_no_file_can_grow(server: Server, writer: Any) -> None:
    # Larger than the catalog's log, which grows meanwhile.
    log = (server.store / "catalog.db-wal").stat().st_size + (1 << 20)
    large = writer.lora("large", log // BYTES_PER_RANK, seed=7)
    small = writer.lora("small", 1, ["q_proj"], [0])
    packed = server.store / "packed" / server.put("big", large).json()["sha256"]
    weights = (large / WEIGHTS_FILE).stat().st_size
    most = next(packed.iterdir()).stat().st_size
    assert log < weights < most
    server.http.delete("/v1/adapters/big")
    cases = [
        (large, 0, False),
        (large, 100, False),
        (large, weights - 1, False),
        # Without its packed form it is served all the same.
        (large, weights, True),
        (large, most - 1, True),
        (large, most, True),
        # Its files can be written, but not its row.
        (small, 6000, False),
    ]
    for folder, nbytes, taken in cases:
        with no_file_larger_than(server, nbytes):
            assert upload_on_full_disk(server, folder) is taken, nbytes
        check_afterwards(server, folder)


def test_a_file_system_has_no_room(server: Server, writer: Any) -> None:
    if not server.mounted:
        pytest.skip("no file system can be mounted here")
    folder = writer.lora("big", 5, seed=7)
    taken = []
    for pages in (0, 1, 13, 15, 16, 18, 20, 25, 30, 40, 100):
        with bytes_left(server, pages * 4096):
            taken.append(upload_on_full_disk(server, folder))
        check_afterwards(server, folder)

    assert taken[0] is False
    assert taken[-1] is True


def test_an_adapter_is_served_where_its_packed_form_cannot_be_written(
    server: Server, writer: Any
) -> None:
    folder = server.install(writer.lora("own", 4, seed=3))
    with no_file_larger_than(server, 0):
        answer = server.ask("own")
        server.evict("own")
        assert server.ask("own") == answer
        assert server.http.delete("/v1/adapters/sent").status_code == 503
    server.evict("own")
    assert server.ask("own") == answer
    shutil.rmtree(folder)
