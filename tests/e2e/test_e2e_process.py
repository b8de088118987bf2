"""The process itself: keys, a stop with a request in flight, and `generate` on the terminal."""

from __future__ import annotations

import subprocess
import sys
import time

import httpx
import openai
import pytest


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
