"""`polydelta adapters push`, against a server of a few lines that keeps what it was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from email.parser import BytesParser
from email.policy import HTTP
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, str, str]]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RECORD = {
    "object": "adapter",
    "name": "sql@3",
    "format": "LORA",
    "kinds": ["LowRank"],
    "rank": 8,
    "modules": 7,
    "bytes": 2048,
    "sha256": "ab" * 32,
    "labels": {"team": "[a]"},
    "state": "ready",
    "ignored": ["README.md"],
}


class Server(HTTPServer):
    """Answers every POST with `answer`."""

    answer: tuple[int, bytes] = (201, json.dumps(RECORD).encode())
    path = ""
    headers: Any = None
    # Field -> (file name, content), in the order of arrival.
    parts: list[tuple[str, str | None, bytes]] = []  # noqa: RUF012

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        form = BytesParser(policy=HTTP).parsebytes(head + body)
        server.path, server.headers = self.path, self.headers
        server.parts = [
            (
                part.get_param("name", header="content-disposition"),
                part.get_filename(),
                part.get_payload(decode=True),
            )
            for part in form.iter_parts()
        ]
        status, content = server.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def run(polydelta: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `polydelta adapters push ...`; (exit code, stdout, stderr)."""
    monkeypatch.delenv("POLYDELTA_API_KEY", raising=False)
    return partial(polydelta, "adapters", "push")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder, as far as it is looked at here; larger than what is read at a time."""
    (tmp_path / CONFIG).write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(bytes(range(256)) * 1001)
    (tmp_path / "optimizer.pt").write_bytes(b"huge")
    return tmp_path


def test_a_folders_two_files_are_sent_and_the_record_is_shown(
    run: Run, server: Server, folder: Path
) -> None:
    code, out, err = run(
        folder, "--id", "sql", "--url", server.url + "/", "--label", "team=[a]", "--label", "b=c=d"
    )
    assert (code, err) == (0, "")
    assert server.path == "/v1/adapters"
    assert server.headers["Authorization"] is None
    assert server.parts[:1] == [("id", None, b"sql")]
    assert json.loads(server.parts[1][2]) == {"team": "[a]", "b": "c=d"}
    assert server.parts[2:] == [
        ("files", name, (folder / name).read_bytes()) for name in (CONFIG, WEIGHTS)
    ]
    for word in ("sql@3", "LORA, LowRank", "8", "2.0KiB", "ab" * 32, "team=[a]", "README.md"):
        assert word in out
    assert "already" not in out


def test_what_was_there_already_is_said_to_be(run: Run, server: Server, folder: Path) -> None:
    server.answer = (200, server.answer[1])
    code, out, _ = run(folder, "--id", "sql", "--url", server.url)
    assert code == 0
    assert "was there already" in out
    assert [part[0] for part in server.parts] == ["id", "files", "files"]


def test_an_archive_is_sent_as_it_is(run: Run, server: Server, tmp_path: Path) -> None:
    archive = tmp_path / "my adapter.tar.gz"
    archive.write_bytes(b"\x1f\x8b rest")
    assert run(archive, "--id", "sql", "--url", server.url)[0] == 0
    assert server.parts[1:] == [("files", archive.name, b"\x1f\x8b rest")]


def test_the_key_comes_from_the_option_or_the_environment(
    run: Run, server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYDELTA_API_KEY", "first,second")
    run(folder, "--id", "sql", "--url", server.url)
    assert server.headers["Authorization"] == "Bearer first"
    run(folder, "--id", "sql", "--url", server.url, "--api-key", "mine")
    assert server.headers["Authorization"] == "Bearer mine"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, b'{"error": {"message": "id: \'x\' is no adapter id"}}'), "(400): id: 'x' is no"),
        ((502, b"<html>Bad gateway"), "(502): <html>Bad gateway"),
        ((503, b""), "(503): Service Unavailable"),
        ((200, b"hello"), "no PolyDelta server"),
        ((200, b'["object"]'), "no PolyDelta server"),
        ((200, b'{"name": "x"}'), "no PolyDelta server"),
    ],
    ids=range(6),
)
def test_a_refusal_is_one_line_and_code_1(
    run: Run, server: Server, folder: Path, answer: tuple[int, bytes], reason: str
) -> None:
    server.answer = answer
    code, out, err = run(folder, "--id", "x", "--url", server.url)
    assert (code, out) == (1, "")
    assert reason in err
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://["])
def test_a_server_that_is_not_there_is_said_to_be(run: Run, folder: Path, url: str) -> None:
    code, _, err = run(folder, "--id", "x", "--url", url)
    assert code == 1
    assert "does not answer" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("url", ["nowhere", "127.0.0.1:8000", "ftp://x"])
def test_a_url_that_is_not_http_is_refused_with_the_remedy(
    run: Run, folder: Path, url: str
) -> None:
    code, _, err = run(folder, "--id", "x", "--url", url)
    assert code == 1
    assert "write http://" in err


def test_what_cannot_be_sent_is_refused_before_it_is_tried(run: Run, folder: Path) -> None:
    code, _, err = run(folder, "--id", "x", "--label", "novalue")
    assert code == 1
    assert "novalue=VALUE" in err
    (folder / WEIGHTS).unlink()
    code, _, err = run(folder, "--id", "x")
    assert code == 1
    assert f"has no {WEIGHTS}" in err
    assert run(folder / "none", "--id", "x")[0] == 2
    assert run(folder)[0] == 2


def test_the_help_teaches_with_examples(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "Examples" in out
    assert "polydelta adapters push ./my-adapter --id sql" in out
