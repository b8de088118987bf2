"""A server over an engine that does what a test's prompt says: `python fake_server.py OPTIONS`.

OPTIONS is JSON: `folder` of the test, and what differs from a plain server: `shutdown_timeout`,
`head_seconds` and `reader_seconds` of StalledConnections, `limits` for the constants LAST_STEP,
LAST_BYTES and LAST_SECONDS; with `stuck` the engine is in the middle of a step when it is to stop,
with `hangs` the process does not end by itself. Prompts:

    "crash"     the engine ends
    "much"      tokens of 64 KiB of text, without end
    others      short tokens, until there is a file `finish` in the folder

On standard output: the server's URL, a line "aborted" for each request that was, and "stopped".
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.engine.kv_setup import KVSetup
from polydelta.engine.request import FinishReason, RequestError, RequestOutput
from polydelta.engine.stats import EngineStats
from polydelta.server import serving
from polydelta.server.app import create_app
from polydelta.server.lifecycle import Lifecycle
from polydelta.server.serving import Server, bind, leave, url_of
from polydelta.server.settings import load_settings
from polydelta.server.stalled_connections import StalledConnections
from polydelta.server.stores import disk_tier, make_publisher, open_store

OPTIONS = json.loads(sys.argv[1])
FOLDER = Path(OPTIONS["folder"])
FINISH = FOLDER / "finish"
TEXTS = {"much": "x" * (1 << 16)}


def say(what: str) -> None:
    print(what, flush=True)


class ByteTokenizer:
    eos_token_ids = (0,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class ScriptedEngine:
    model_id = "fake-base"
    max_model_len = 64
    max_batch_size = 64
    vocab_size = 256
    pool_bytes = 1 << 20
    kv_setup = KVSetup()

    def __init__(self) -> None:
        self.tokenizer = ByteTokenizer()
        self.layout = BaseLayout("fake", 0, ())
        self.alive = False
        self._handlers: dict[str, Callable[[RequestOutput], None]] = {}
        self._lock = threading.Lock()

    def start(self) -> None:
        self.alive = True

    def stats(self) -> EngineStats:
        return EngineStats()

    def forget_adapter(self, ref: Any) -> None:
        """Nothing is kept."""

    def submit(self, request: Any, on_output: Callable[[RequestOutput], None]) -> None:
        if not self.alive:
            raise RuntimeError("dead")
        self._handlers[request.request_id] = on_output
        prompt = bytes(request.prompt_token_ids).decode()
        if prompt == "crash":
            self._end_all(FinishReason.ERROR, RequestError("The engine failed."))
            return
        text = TEXTS.get(prompt, "x")
        threading.Thread(target=self._run, args=(request.request_id, text), daemon=True).start()

    def abort(self, request_id: str) -> None:
        if self._handlers.pop(request_id, None):
            say("aborted")

    def shutdown(self, timeout: float) -> None:
        self.alive = False
        if OPTIONS.get("stuck"):
            time.sleep(timeout)
        else:
            self._end_all(FinishReason.ABORT)

    def _run(self, request_id: str, text: str) -> None:
        while not FINISH.exists():
            with self._lock:
                if not (on_output := self._handlers.get(request_id)):
                    return
                on_output(RequestOutput(request_id, text, (1,)))
            time.sleep(0.01)
        self._end(request_id, FinishReason.STOP)

    def _end_all(self, reason: FinishReason, error: RequestError | None = None) -> None:
        self.alive = False
        for request_id in list(self._handlers):
            self._end(request_id, reason, error)

    def _end(
        self, request_id: str, reason: FinishReason, error: RequestError | None = None
    ) -> None:
        with self._lock:
            if on_output := self._handlers.pop(request_id, None):
                on_output(RequestOutput(request_id, "", (), finish_reason=reason, error=error))


if limits := OPTIONS.get("limits"):
    serving.LAST_STEP, serving.LAST_BYTES, serving.LAST_SECONDS = limits
engine: Any = ScriptedEngine()
settings = load_settings(
    adapters=(),
    store=FOLDER / "store",
    port=0,
    shutdown_timeout=OPTIONS.get("shutdown_timeout", 0.0),
)
store = open_store(settings)
lifecycle = Lifecycle()
with bind(settings.host, settings.port) as bound:
    publisher = make_publisher(store, engine, settings, disk_tier(store, settings))
    app = create_app(engine, store, publisher, settings, lifecycle)
    server = Server(app, engine, settings, lifecycle, lambda: say(url_of(bound)))
    server.stalled = StalledConnections(
        OPTIONS.get("head_seconds", 60.0), OPTIONS.get("reader_seconds", 90.0)
    )
    server.serve_until_stopped(bound)
say("stopped")
if OPTIONS.get("hangs"):
    time.sleep(3600)
leave()
