"""The process itself: keys, a stop with a request in flight, and `generate` on the terminal."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

# Seconds; far more than a tiny model takes to load.
PATIENCE = 60.0


@pytest.fixture
def loading(tiny_file: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server with a tiny model that has just been started, and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "polydelta.server", "serve", "--model", str(tiny_file)]
    command += ["--adapters", str(tmp_path), "--store", str(tmp_path / "store")]
    command += ["--pool", "16MiB", "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        yield process, f"http://127.0.0.1:{port}"
        process.kill()


def polled(process: subprocess.Popen[bytes], url: str) -> Iterator[httpx.Response]:
    """Answers of /ready from the first one on."""
    deadline = time.monotonic() + PATIENCE
    answered = False
    while process.poll() is None and time.monotonic() < deadline:
        try:
            yield httpx.get(f"{url}/ready", timeout=PATIENCE)
            answered = True
        except httpx.ConnectError:
            assert not answered, "nobody listens any more"
        time.sleep(0.01)


@pytest.mark.slow
def test_a_server_with_keys_stops_in_mid_stream_with_abort_and_code_0(launch):
    running = launch("--api-key", "secret-key", "--served-model-name", "mine", "--adapters", ".")
    url = f"{running.url}/v1"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()

    client = openai.OpenAI(base_url=url, api_key="secret-key", max_retries=0, timeout=60)
    assert client.models.list().data[0].id == "mine"
    chunks = client.completions.create(
        model="mine", prompt="Hello", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(chunks)
    began = time.monotonic()
    running.process.terminate()
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons[-1] == "abort"
    assert running.process.wait(20) == 0
    assert time.monotonic() - began < 10
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")


def test_the_port_answers_while_the_model_loads_and_from_then_on(loading):
    process, url = loading
    stages = set()
    for answer in polled(process, url):
        if answer.status_code == 200:
            break
        assert answer.json()["status"] == "loading"
        stages.add(answer.json()["stage"])
    assert answer.json() == {"status": "ready"}
    assert stages
    process.terminate()
    assert process.wait(10) == 0
    assert b"Traceback" not in process.stderr.read()


def test_a_stop_while_the_model_loads_ends_the_process(loading):
    process, url = loading
    assert next(polled(process, url)).status_code == 503
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


@pytest.mark.slow
def test_generate_answers_without_a_server(samples, sample_tasks):
    sample = samples[0]
    example = sample_tasks.TASKS[sample].held_out(1)[0]
    command = [sys.executable, "-m", "polydelta.server", "generate", example.prompt]
    options = ["--adapter", sample, "--dtype", "float32", "--pool", "256MiB"]
    done = subprocess.run(
        command + options, capture_output=True, text=True, check=True, timeout=300
    )
    assert sample_tasks.TASKS[sample].check(done.stdout.removesuffix("\n"), example.answer)
    assert "tokens" in done.stderr
    assert "Traceback" not in done.stderr
