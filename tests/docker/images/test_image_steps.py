"""The install steps of the CPU image, performed as its Dockerfile says, and what came of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[3]
INSTALL = "docker/install.sh"

# Both tests want the one fixture, which takes most of the time.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("servers")]


class Built:
    """A folder that stands for an image's `/`, filled by the Dockerfile's own COPY and RUN lines
    with this machine's Python. Its programs run on this machine, as this user, with its compiler:
    the distribution's packages and users are not there."""

    def __init__(self, image: Any, root: Path, shipped: Callable[[str], list[str]]) -> None:
        self.root = root
        self._image = image
        self._shipped = shipped
        self._source = root / "source"
        arguments: dict[str, str] = {}
        for found in image.builder:
            match found.keyword:
                case "ARG":
                    arguments.update(word.split("=", 1) for word in found.words)
                case "COPY":
                    self._copy(found)
                case "RUN":
                    self._run(found, arguments)
        for found in image.runtime:
            if "from=builder" in found.flags:
                self._move(*found.words)
        for folder in image.volumes:
            self.path(folder).mkdir(parents=True)
        (root / "work").mkdir()
        (root / "nonexistent").touch()

    def path(self, path: str) -> Path:
        """Where a path of the image is."""
        return self.root / path.removeprefix("/")

    @property
    def environment(self) -> dict[str, str]:
        """The image's, for a user with no home: below a file not even root can write."""
        image = dict(self._image.environment)
        (programs,) = re.findall(r"^(/\S+):\$PATH$", image.pop("PATH"))
        return {
            **{k: str(self.path(v)) if v.startswith("/") else v for k, v in image.items()},
            "PATH": f"{self.path(programs)}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(self.root / "nonexistent" / "home"),
            "PYTHONNOUSERSITE": "1",
            "POLYDELTA_HOST": "127.0.0.1",
        }

    @property
    def command(self) -> list[str]:
        """What a container runs, less the init process."""
        entrypoint = self._image.last("ENTRYPOINT").words
        return entrypoint[entrypoint.index("polydelta") :] + self._image.last("CMD").words

    def files(self) -> set[Path]:
        """All that is not on a volume, but for compiled Python."""
        volumes = [self.path(volume) for volume in self._image.volumes]
        return {
            file
            for file in self.root.rglob("*")
            if "__pycache__" not in file.parts
            and not any(file.is_relative_to(volume) for volume in volumes)
        }

    def _copy(self, found: Any) -> None:
        for name, target in found.copies():
            for file in self._shipped(name):
                copied = self._source / target / Path(file).relative_to(name)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / file, copied)

    def _run(self, found: Any, arguments: dict[str, str]) -> None:
        program, *words = found.words
        assert program == INSTALL, "what else fills the image is not performed here"
        environment = os.environ | arguments
        environment["TORCH_INDEX"] = answering_index(arguments["TORCH_INDEX"])
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        # Python compiles what it imports, and everything takes pip 14 s.
        environment["PIP_COMPILE"] = "0"
        done = subprocess.run(
            [
                self._source / program,
                *(str(self.path(word)) if word.startswith("/") else word for word in words),
            ],
            cwd=self._source,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def _move(self, source: str, target: str) -> None:
        """From one stage to the next: they have one `/` here."""
        if source != target:
            shutil.copytree(self.path(source), self.path(target), symlinks=True, dirs_exist_ok=True)


def answering_index(index: str) -> str:
    """pip's own where it does not answer, as in the Makefile."""
    try:
        with urllib.request.urlopen(f"{index}/torch/", timeout=10):
            return index
    except OSError:
        return ""


@pytest.fixture(scope="module")
def built(
    dockerfile: Callable[[str], Any],
    shipped: Callable[[str], list[str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Built]:
    root = tmp_path_factory.mktemp("image")
    yield Built(dockerfile("cpu.Dockerfile"), root, shipped)
    shutil.rmtree(root)


def test_everything_is_installed_in_the_version_that_is_pinned(built: Built) -> None:
    code = (
        "import json, psycopg, opentelemetry.sdk, polydelta.server\n"
        "from importlib.metadata import distributions\n"
        "versions = {found.name: found.version for found in distributions()}\n"
        "print(json.dumps([polydelta.server.__file__, versions]))"
    )
    output = subprocess.check_output(
        ["python", "-c", code], env=built.environment, cwd=built.root / "work"
    )
    file, found = json.loads(output)
    versions = {
        re.sub("[-_.]+", "-", name).lower(): version.partition("+")[0]
        for name, version in found.items()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert Path(file).is_relative_to(built.path("/opt/polydelta"))
    assert versions.pop("polydelta") == project["version"]
    assert versions == {name: pinned.get(name) for name in versions}


def test_the_server_answers_writes_to_volumes_only_and_leaves_when_told(built: Built) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = built.files()
    log = built.path("/tmp/log.txt")
    log.parent.mkdir()
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*built.command, "--pool", "64MiB", "--max-model-len", "256"],
            env=built.environment | {"POLYDELTA_PORT": str(port)},
            cwd=built.root / "work",
            stdout=output,
            stderr=output,
        )
    try:
        tokens = count_tokens(server, f"http://127.0.0.1:{port}")
        server.send_signal(signal.SIGTERM)
        code = server.wait(30)
    finally:
        server.kill()
        server.wait()
    assert (tokens, code) == (3, 0), log.read_text()
    assert list(built.path("/var/cache/polydelta").rglob("kernels-*.so")), log.read_text()
    assert list(built.path("/var/lib/polydelta").iterdir())
    assert built.files() - before == {log.parent, log}


def count_tokens(server: subprocess.Popen[bytes], url: str) -> int:
    """Of the default model's answer, or 0 if it does not come to that."""
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    else:
        return 0
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "prompt": "Once upon a", "max_tokens": 3, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    return int(answer.json()["usage"]["completion_tokens"])
