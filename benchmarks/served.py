"""`polydelta serve` in a process of its own, on a free port, while a benchmark needs it."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory, TemporaryFile

# A larger model from a cold disk takes minutes.
PATIENCE = 600.0
POLL = 0.02


@dataclass(frozen=True)
class Served:
    """A server that is ready."""

    url: str
    # From the process's start to the first 200 of /ready.
    seconds_to_ready: float


@contextmanager
def served(arguments: str = "") -> Iterator[Served]:
    """arguments: more of the command line, quoted as in a shell. Raises RuntimeError, with what
    the server said, when it ends before it is ready."""
    port = _free_port()
    command = [sys.executable, "-m", "polydelta.server", "serve", "--port", str(port)]
    command += ["--log-level", "warning", *shlex.split(arguments)]
    with TemporaryFile() as said, TemporaryDirectory() as store:
        # The user's own store is left alone, unless the arguments name it.
        environment = os.environ | {"POLYDELTA_STORE": store}
        began = time.perf_counter()
        server = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            while not _answers(f"{url}/ready"):
                if server.poll() is not None or time.perf_counter() - began > PATIENCE:
                    said.seek(0)
                    raise RuntimeError(f"polydelta serve: {said.read().decode().strip()}")
                time.sleep(POLL)
            yield Served(url, time.perf_counter() - began)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False
