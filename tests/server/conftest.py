"""A server over a fake engine, which answers from a thread of its own, as the real one does; and
the command line in this process, with models in folders."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from transformers import LlamaForCausalLM, PreTrainedModel

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.reference import AdapterRef
from polydelta.adapters_store.store import AdapterStore, StoreConfig
from polydelta.engine.kv_setup import KVSetup
from polydelta.engine.models import checkpoint
from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.request import (
    ErrorKind,
    FinishReason,
    GenerationRequest,
    OutputHandler,
    RequestError,
    RequestOutput,
    TokenLogprob,
)
from polydelta.engine.stats import EngineStats
from polydelta.server.app import create_app
from polydelta.server.cli import main
from polydelta.server.settings import ServerSettings
from polydelta.server.stores import disk_tier, make_publisher


class FakeTokenizer:
    """One token a byte."""

    eos_token_ids = (256,)
    vocab_size = 300

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id])

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if messages[-1]["role"] == "assistant":
            raise ValueError("the last message must not be the assistant's")
        return self.encode("".join(f"{m['role']}:{m['content']};" for m in messages))


class FakeEngine:
    """Answers every request with `answer(request)`, a byte at a time."""

    model_id = "fake-base"
    max_model_len = 64
    max_batch_size = 64
    vocab_size = 300
    pool_bytes = 1 << 20
    kv_setup = KVSetup()

    def __init__(self) -> None:
        self.tokenizer = FakeTokenizer()
        self.layout = BaseLayout("fake", 0, ())
        # Versions that were deleted.
        self.forgotten: list[str] = []
        self.alive = True
        self.requests: list[GenerationRequest] = []
        self.aborted: set[str] = set()
        self.answer: Callable[[GenerationRequest], str] = lambda _: "Hello"
        # Ends every request with this error, after this many tokens.
        self.error: str | None = None
        self.error_kind = ErrorKind.REQUEST
        self.retry_after: float | None = None
        self.error_after = 0
        self.cached_tokens = 0
        # Never finish; tokens keep coming until the request is aborted.
        self.endless = False
        self.stats_now = EngineStats()

    def stats(self) -> EngineStats:
        return self.stats_now

    def submit(self, request: GenerationRequest, on_output: OutputHandler) -> None:
        if not self.alive:
            raise RuntimeError("dead")
        self.requests.append(request)
        threading.Thread(target=self._run, args=(request, on_output), daemon=True).start()

    def abort(self, request_id: str) -> None:
        self.aborted.add(request_id)

    def forget_adapter(self, ref: AdapterRef) -> None:
        self.forgotten.append(ref.name)

    def _run(self, request: GenerationRequest, on_output: OutputHandler) -> None:
        while self.endless and request.request_id not in self.aborted:
            on_output(self._output(request, ord("x"), None))
            time.sleep(0.002)
        if self.endless:
            return
        tokens = list(self.answer(request).encode())
        limit = request.sampling.max_tokens
        if self.error is not None:
            for token in tokens[: self.error_after]:
                on_output(self._output(request, token, None))
            on_output(
                RequestOutput(
                    request.request_id,
                    "",
                    (),
                    finish_reason=FinishReason.ERROR,
                    error=RequestError(self.error, self.error_kind, self.retry_after),
                )
            )
            return
        end = FinishReason.STOP if len(tokens) <= limit else FinishReason.LENGTH
        tokens = tokens[:limit]
        for place, token in enumerate(tokens):
            on_output(self._output(request, token, end if place + 1 == len(tokens) else None))

    def _output(
        self, request: GenerationRequest, token: int, reason: FinishReason | None
    ) -> RequestOutput:
        wanted = request.sampling.logprobs
        logprobs: tuple[TokenLogprob, ...] = ()
        if wanted is not None:
            ranked = ((token + 1, -0.25), (token, -1.5), (token + 2, float("-inf")))
            logprobs = (TokenLogprob(token, -1.5, ranked[:wanted]),)
        return RequestOutput(
            request.request_id,
            chr(token) if token < 128 else "",
            (token,),
            logprobs,
            self.cached_tokens,
            reason,
        )


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    """Two adapters in a folder of the operator's; nothing but their names is ever looked at."""
    folders = tmp_path / "secret"
    for name in ("dates", "labels"):
        (folders / name).mkdir(parents=True)
        (folders / name / "adapter_config.json").write_text("{}")
    store = AdapterStore(StoreConfig(tmp_path / "store"), FolderCatalog([folders]))
    yield store
    store.close()


@pytest.fixture
def make_app(engine: FakeEngine, store: AdapterStore) -> Callable[..., FastAPI]:
    def make(**options: object) -> FastAPI:
        settings = ServerSettings(adapters=(), **options)
        publisher = make_publisher(store, engine, settings, disk_tier(store, settings))
        return create_app(engine, store, publisher, settings)

    return make


@pytest.fixture
def app(make_app: Callable[..., FastAPI]) -> FastAPI:
    return make_app()


@pytest.fixture
def client(app: FastAPI) -> TestClient:
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def complete(client: TestClient) -> Callable[..., dict]:
    """POST /v1/completions with defaults; the body of the answer, which must be a good one."""

    def post(**fields: object) -> dict:
        body = {"model": "fake-base", "prompt": "Hi"} | fields
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


@pytest.fixture
def chat(client: TestClient) -> Callable[..., dict]:
    """POST /v1/chat/completions with defaults; the body of the answer, a good one."""

    def post(**fields: object) -> dict:
        body = {"model": "fake-base", "messages": [{"role": "user", "content": "Hi"}]} | fields
        answer = client.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    return post


@pytest.fixture
def stream(client: TestClient) -> Callable[..., list[dict]]:
    """POST with stream=true; the events between the start and `[DONE]`, parsed."""

    def post(path: str, **fields: object) -> list[dict]:
        defaults: dict[str, object] = {"model": "fake-base", "stream": True}
        if path.endswith("chat/completions"):
            defaults["messages"] = [{"role": "user", "content": "Hi"}]
        else:
            defaults["prompt"] = "Hi"
        answer = client.post(path, json=defaults | fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.split("\n\n")
        assert events.pop() == ""
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        assert events.pop() == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events]

    return post


@pytest.fixture
def refusal(client: TestClient) -> Callable[..., tuple[int, dict]]:
    """POST that must be refused; its status and its error object, whose shape is checked."""

    def post(path: str, **fields: object) -> tuple[int, dict]:
        defaults: dict[str, object] = {"model": "fake-base"}
        if path.endswith("chat/completions"):
            defaults["messages"] = [{"role": "user", "content": "Hi"}]
        else:
            defaults["prompt"] = "Hi"
        answer = client.post(path, json=defaults | fields)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == answer.status_code
        assert answer.status_code >= 400
        assert "secret" not in error["message"]
        return answer.status_code, error

    return post


@pytest.fixture
def polydelta(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> Callable[..., tuple[int, str, str]]:
    """Runs `polydelta ...` in this process; (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "250")
    # Zeroing a larger one takes seconds.
    monkeypatch.setenv("POLYDELTA_POOL", "64MiB")

    def open_once(model: str | None) -> Checkpoint:
        """Reading the default model's tokenizer takes seconds."""
        return request.getfixturevalue("default_checkpoint") if model is None else opened(model)

    opened = checkpoint.open_checkpoint
    monkeypatch.setattr(checkpoint, "open_checkpoint", open_once)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polydelta", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def facts() -> Callable[[str], dict[str, str]]:
    """Of what a command has printed: names and values, which stand side by side."""

    def parse(text: str) -> dict[str, str]:
        lines = (line.strip().split("  ", maxsplit=1) for line in text.splitlines() if line.strip())
        return {name: fact.strip() for name, fact in lines}

    return parse


@pytest.fixture(scope="session")
def save_model(default_checkpoint: Checkpoint) -> Callable[[PreTrainedModel, Path], Path]:
    """Writes a model with a tokenizer, so that commands open it; the folder."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        model.save_pretrained(folder)
        default_checkpoint.tokenizer.save(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_folder(
    tiny_model: LlamaForCausalLM, save_model: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model as a folder; not to be written to."""
    return save_model(tiny_model, tmp_path_factory.mktemp("tiny") / "model")
