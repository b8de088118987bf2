"""Real servers: `polydelta serve`, its own process. Most tests share one with the default model.

Its pool is small, so that requests must share it: `test_e2e_load.py` asserts that something was
preempted or evicted. Tests of the adapter store take a tiny model, which is loaded in no time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import httpx
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers.pre_tokenizers import ByteLevel

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.models.gguf_file import GgufFile
from polydelta.server.settings import packaged_samples

OPTIONS = (
    *("--dtype", "float32", "--pool", "40MiB", "--max-model-len", "512"),
    *("--max-batch-tokens", "128", "--max-batch-size", "16"),
)
# What `polydelta` is, as a command.
PROGRAM = (sys.executable, "-m", "polydelta.server")
# Seconds to load the model on a busy machine.
PATIENCE = 180.0


@dataclass(frozen=True)
class RunningServer:
    url: str
    process: subprocess.Popen[bytes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(
    log: Path, *options: str, program: Sequence[str] = PROGRAM, port: int | None = None
) -> RunningServer:
    """A server that answers /ready. port: None takes a free one."""
    port = port or free_port()
    command = [*program, "serve", "--port", str(port), *options]
    if "--store" not in options:
        command += ["--store", str(log.parent / "store")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("POLYDELTA_")}
    with log.open("wb") as output:
        # A session of its own: what it leaves behind can be told from other processes.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready").status_code == 200:
                return RunningServer(url, process)
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"The server did not start:\n{log.read_text()}")


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers with more options than OPTIONS, as `start_server` does; all are gone at the
    end."""
    started: list[RunningServer] = []

    def start(*options: str, **more: Any) -> RunningServer:
        log = tmp_path_factory.mktemp("server") / "log.txt"
        started.append(start_server(log, *OPTIONS, *options, **more))
        return started[-1]

    yield start
    for running in started:
        running.process.kill()
        running.process.wait()


@pytest.fixture(scope="session")
def server(launch: Callable[..., RunningServer]) -> RunningServer:
    return launch()


@pytest.fixture(scope="session")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE
    )


@pytest.fixture(scope="session")
def base(client: openai.OpenAI) -> str:
    """The base model's name."""
    return next(iter(client.models.list())).id


@pytest.fixture(scope="session")
def samples() -> list[str]:
    """Ids of the sample adapters that are there."""
    ids = [
        folder.name
        for root in packaged_samples()
        for folder in sorted(root.iterdir())
        if (folder / "adapter_config.json").is_file()
    ]
    if not ids:
        pytest.fail("the package has no sample adapters")
    return ids


@pytest.fixture(scope="session")
def sample_tasks() -> ModuleType:
    """The tasks that the samples were trained on; `TASKS` by id."""
    path = Path(__file__).parents[2] / "examples" / "sample_tasks.py"
    spec = importlib.util.spec_from_file_location("sample_tasks", path)
    if spec is None or spec.loader is None:
        raise ImportError(path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def metrics(server: RunningServer) -> Callable[[], dict[str, float]]:
    """Scrapes /metrics: value by sample name; pages as `...{owner}`, ends as `finished{reason}`."""

    def scrape() -> dict[str, float]:
        text = httpx.get(f"{server.url}/metrics").text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                name = sample.name
                if owner := sample.labels.get("owner"):
                    name = f"{name}{{{owner}}}"
                if reason := sample.labels.get("finished_reason"):
                    name = f"finished{{{reason}}}"
                found[name] = found.get(name, 0.0) + sample.value
        return found

    return scrape


@pytest.fixture
def settled(metrics: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    """Waits until nothing runs or waits; the metrics then."""

    def wait() -> dict[str, float]:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            found = metrics()
            if found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"] == 0:
                return found
            time.sleep(0.1)
        raise TimeoutError(f"the server is still busy: {found}")

    return wait


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of odd sizes whose tokens are bytes: a server with it starts in 4 s, all of
    them imports, where the default model's 49152 tokens and its weights take 5 s more."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    hidden, inner, heads, kv_rows, layers, vocabulary = 60, 92, 6, 20, 3, 307
    tokens = ["<end>", "\u0120t", *sorted(ByteLevel.alphabet())]
    tokens += [f"<{number}>" for number in range(vocabulary - len(tokens))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_rows * heads // hidden)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["\u0120 t"])
    writer.add_token_types([1] * vocabulary)
    writer.add_eos_token_id(0)
    generator = np.random.default_rng(11)

    def add(name: str, *shape: int) -> None:
        values = 0.2 * generator.standard_normal(shape) + (len(shape) == 1)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    add("token_embd", vocabulary, hidden)
    add("output_norm", hidden)
    for layer in range(layers):
        add(f"blk.{layer}.attn_norm", hidden)
        add(f"blk.{layer}.attn_q", hidden, hidden)
        add(f"blk.{layer}.attn_k", kv_rows, hidden)
        add(f"blk.{layer}.attn_v", kv_rows, hidden)
        add(f"blk.{layer}.attn_output", hidden, hidden)
        add(f"blk.{layer}.ffn_norm", hidden)
        add(f"blk.{layer}.ffn_gate", inner, hidden)
        add(f"blk.{layer}.ffn_up", inner, hidden)
        add(f"blk.{layer}.ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_file_layout(tiny_file: Path) -> BaseLayout:
    return base_layout(GgufFile(tiny_file).config, "tiny")
