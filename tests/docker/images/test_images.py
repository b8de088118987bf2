"""What the Dockerfiles say of the images: what is in them, who runs it, and what it may write."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from polydelta.server.settings import ENV_PREFIX, ServerSettings, env_name

ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
IMAGES = ("cpu.Dockerfile", "cuda.Dockerfile")


@pytest.fixture(params=IMAGES)
def image(request: pytest.FixtureRequest, dockerfile: Callable[[str], Any]) -> Any:
    return dockerfile(request.param)


def test_both_images_are_filled_by_the_same_steps(dockerfile: Callable[[str], Any]) -> None:
    cpu, cuda = (
        [found for found in dockerfile(name).builder if found.keyword != "ARG"] for name in IMAGES
    )
    assert cpu == cuda


@pytest.mark.parametrize(
    "keyword",
    ["RUN", "VOLUME", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD", "ARG", "LABEL"],
)
def test_both_images_are_run_in_the_same_way(
    dockerfile: Callable[[str], Any], keyword: str
) -> None:
    cpu, cuda = (
        [found for found in dockerfile(name).runtime if found.keyword == keyword] for name in IMAGES
    )
    assert cpu == cuda != []


def test_every_stage_has_the_same_base_and_it_is_named_by_a_tag(image: Any) -> None:
    bases = [stage[0].words[0] for stage in image.stages]
    assert re.fullmatch(r"python:\$\{PYTHON\}-slim-\w+", bases[0])
    assert bases[1:] == ["base", "base"]


def test_what_is_copied_is_there_and_let_through_by_the_ignore_file(
    image: Any, shipped: Callable[[str], list[str]], ignored: Callable[[str], bool]
) -> None:
    sources = [source for stage in image.stages for source, _ in image.copies(stage)]
    assert [source for source in sources if not shipped(source)] == []
    assert [file for source in sources for file in shipped(source) if ignored(file)] == []


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        ".venv/bin/python",
        "docker/.env",
        "docker/compose.yaml",
        "server/.env",
        "server/__pycache__/app.cpython-311.pyc",
        "store/catalog.db",
        "tests/conftest.py",
    ],
)
def test_everything_else_is_kept_away_by_the_ignore_file(
    ignored: Callable[[str], bool], path: str
) -> None:
    assert ignored(path)


def test_the_user_is_not_root_and_has_a_number(image: Any) -> None:
    user, group = map(int, image.last("USER").rest.split(":"))
    assert user >= 1000
    assert group >= 1000


def test_the_server_is_started_without_a_shell_so_that_sigterm_reaches_it(image: Any) -> None:
    assert json.loads(image.last("ENTRYPOINT").rest) == ["tini", "--", "polydelta"]
    assert json.loads(image.last("CMD").rest) == ["serve"]


def test_what_the_image_sets_are_settings_of_the_server(image: Any) -> None:
    settings = {env_name(name) for name in ServerSettings.model_fields}
    ours = {name for name in image.environment if name.startswith(ENV_PREFIX)}
    assert ours - settings == set()


def test_the_server_listens_on_the_port_that_the_image_exposes(image: Any) -> None:
    assert image.environment["POLYDELTA_HOST"] == "0.0.0.0"
    assert image.environment["POLYDELTA_PORT"] == image.last("EXPOSE").rest


def test_every_folder_that_is_written_is_on_a_volume(image: Any) -> None:
    folders = {
        name: PurePosixPath(value)
        for name, value in image.environment.items()
        if value.startswith("/") and name != "PATH"
    }
    assert {"POLYDELTA_STORE", "XDG_CACHE_HOME"} <= folders.keys()
    outside = [
        name
        for name, folder in folders.items()
        if not any(folder.is_relative_to(volume) for volume in image.volumes)
    ]
    assert outside == []


def test_the_labels_say_what_the_project_says(image: Any) -> None:
    labels = dict(word.split("=", 1) for word in image.last("LABEL").words)
    told = {
        key: labels[f"org.opencontainers.image.{key}"]
        for key in ("version", "description", "licenses")
    }
    assert told == {
        "version": PROJECT["version"],
        "description": PROJECT["description"],
        "licenses": PROJECT["license"],
    }


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server whose /health has a status; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def check_health(dockerfile: Callable[[str], Any]) -> Callable[[int], int]:
    """Runs the images' health check against a port of this machine; its exit code."""
    image = dockerfile(IMAGES[0])
    kind, _, command = image.last("HEALTHCHECK").rest.partition(" ")
    program, path = json.loads(command)
    assert (kind, program) == ("CMD", "python")
    (script,) = (ROOT / source for source, at in image.copies(image.runtime) if str(at) == path)

    def run(port: int) -> int:
        # Nobody answers at the proxy.
        environment = {"POLYDELTA_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
        return subprocess.run(
            [sys.executable, script], env=os.environ | environment, capture_output=True, check=False
        ).returncode

    return run


@pytest.mark.parametrize(("status", "code"), [(200, 0), (404, 1), (503, 1)])
def test_the_health_check_passes_where_health_is_200_and_no_proxy_is_asked(
    check_health: Callable[[int], int], status: int, code: int
) -> None:
    with answering(status) as port:
        assert check_health(port) == code


def test_the_health_check_fails_where_nobody_listens(check_health: Callable[[int], int]) -> None:
    with answering(200) as port:
        pass
    assert check_health(port) == 1
