"""A server that is killed at any moment of an upload leaves a store that opens clean.

The server that is started to look at what one kill has left is the one that is killed next.
"""

from __future__ import annotations

import contextlib
import io
import random
import sqlite3
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from polydelta.adapters_store.formats.files import folder_digest
from polydelta.adapters_store.packed_file import read_packed
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

# Stores that are treated so at the same time.
CHAINS = 2
PROMPT = "The quick brown fox jumps over the lazy dog, once more."
# Each about 2 MB, so that a kill can fall into its check and its move.
CONTENTS, RANK = 5, 200
# Seconds: longest time in which a body is sent, and longest wait after its last byte.
SENDING, CHECKING = 0.4, 0.12
BOUNDARY = "the-boundary"
# Where a kill falls.
BODY, CHECK, ANSWERED = "in the body", "in the check", "after the answer"


def as_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def as_zip(folder: Path) -> dict[str, bytes]:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in as_files(folder).items():
            archive.writestr(name, content)
    return {"adapter.zip": memory.getvalue()}


def as_tar(folder: Path) -> dict[str, bytes]:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w:gz", compresslevel=1) as archive:
        for name in as_files(folder):
            archive.add(folder / name, name)
    return {"adapter.tar.gz": memory.getvalue()}


def form(files: dict[str, bytes]) -> bytes:
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"'
        "\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, content in files.items()
    ]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


@dataclass
class Upload:
    """One body on its way to a server, in pieces."""

    url: str
    body: bytes
    # Seconds that sending takes.
    sending: float
    began: threading.Event = field(default_factory=threading.Event)
    sent: threading.Event = field(default_factory=threading.Event)
    # None when no answer came.
    status: int | None = None

    def run(self) -> None:
        headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        try:
            answer = httpx.put(self.url, content=self._pieces(), headers=headers, timeout=60)
            self.status = answer.status_code
        except httpx.TransportError:
            pass  # the server was killed
        finally:
            self.began.set()
            self.sent.set()

    def _pieces(self) -> Iterator[bytes]:
        self.began.set()
        size, pause = -(-len(self.body) // 16), threading.Event()
        for start in range(0, len(self.body), size):
            pause.wait(self.sending / 16)
            yield self.body[start : start + size]
        self.sent.set()


@dataclass
class Content:
    body: bytes
    digest: str
    answer: str = ""


def ask(url: str, model: str) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body | {"ignore_eos": True}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def put(url: str, content: Content) -> None:
    upload = Upload(f"{url}/v1/adapters/bot", content.body, 0.0)
    upload.run()
    assert upload.status in (200, 201), upload.status


def check_store(store: Path) -> None:
    """Nothing half-written: every version has its files, and nothing else has any."""
    staging = store / "staging"
    assert not staging.is_dir() or list(staging.iterdir()) == []
    with contextlib.closing(sqlite3.connect(store / "catalog.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        digests = {row[0] for row in database.execute("SELECT digest FROM polydelta_versions")}
    assert {folder.name for folder in (store / "content").iterdir()} == digests
    for folder in (store / "content").iterdir():
        assert {path.name for path in folder.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}
        assert folder_digest(folder) == folder.name
    for path in (store / "packed").glob("*/*"):
        assert path.suffix == ".packed", path
        assert not path.name.startswith("."), path
        assert read_packed(path).digest == path.parent.name


def kill_again_and_again(
    start: Callable[[], Any], store: Path, contents: list[Content], seed: int, kills: int
) -> Counter[str]:
    """How many kills fell where."""
    chance, phases = random.Random(seed), Counter[str]()
    running = start()
    for content in contents:
        put(running.url, content)
        content.answer = ask(running.url, "bot")
    assert len({content.answer for content in contents}) == CONTENTS
    version, current = CONTENTS, contents[-1]
    for _ in range(kills):
        wanted = chance.choice([content for content in contents if content is not current])
        in_body = chance.random() < 0.4
        sending = chance.uniform(0.05, SENDING) if in_body else 0.0
        upload = Upload(f"{running.url}/v1/adapters/bot", wanted.body, sending)
        client = threading.Thread(target=upload.run)
        client.start()
        (upload.began if in_body else upload.sent).wait(60)
        threading.Event().wait(chance.uniform(0.0, sending if in_body else CHECKING))
        complete = upload.sent.is_set()
        running.process.kill()
        running.process.wait()
        client.join()
        assert upload.status in (None, 201)
        place = ANSWERED if upload.status else CHECK if complete else BODY
        phases[place] += 1

        running = start()
        check_store(store)
        record = httpx.get(f"{running.url}/v1/adapters/bot").json()
        if record["version"] != version:
            assert record["version"] == version + 1
            assert complete
            version, current = version + 1, wanted
            phases["published without an answer"] += upload.status is None
        else:
            # What was answered is kept.
            assert upload.status is None
        assert (record["state"], record["sha256"]) == ("ready", current.digest)
        assert ask(running.url, "bot") == current.answer
        assert ask(running.url, "bot@1") == contents[0].answer
    return phases


# Of each store, and how many must have fallen into each place, or the test says nothing of it.
@pytest.mark.slow
@pytest.mark.parametrize(("kills", "enough"), [(5, 0), pytest.param(26, 3, marks=pytest.mark.long)])
def test_a_kill_at_any_moment_of_an_upload_leaves_the_old_version_or_the_new_one(
    kills, enough, launch, tiny_file, tiny_file_layout, adapter_writer, tmp_path
):
    seed = random.randrange(1 << 32)
    print("seed", seed)
    writer = adapter_writer(tiny_file_layout)
    folders = [writer.lora(f"bot-{seed}", RANK, seed=seed) for seed in range(CONTENTS)]
    ways = [(as_files, as_zip, as_tar)[number % 3] for number in range(CONTENTS)]

    def chain(number: int) -> Counter[str]:
        store = tmp_path / f"store-{number}"
        contents = [
            Content(form(way(folder)), folder_digest(folder))
            for way, folder in zip(ways, folders, strict=True)
        ]

        def start():
            return launch("--model", str(tiny_file), "--store", str(store), "--adapters", str(none))

        return kill_again_and_again(start, store, contents, seed + number, kills)

    none = tmp_path / "none"
    none.mkdir()
    with ThreadPoolExecutor(CHAINS) as chains:
        phases = sum(chains.map(chain, range(CHAINS)), Counter[str]())
    print(dict(phases))
    assert min(phases[place] for place in (BODY, CHECK, ANSWERED)) >= enough
