"""Ways to do the same work, each in a process of its own, so that they can take turns.

Two teams of OpenMP threads in one process would slow each other down. A process whose turn it is
not waits for its pipe.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.engine.build import build_engine
from polydelta.engine.config import EngineConfig
from polydelta.engine.request import GenerationRequest, RequestOutput, SamplingParams


class Runs(Protocol):
    """What a side's process makes."""

    def run(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str | None], new_tokens: int
    ) -> list[list[int]]:
        """New tokens of each prompt; names: its adapter, None for the bare base."""


# From the folder of the adapters and their names.
MakeSide = Callable[[Path, Sequence[str]], Runs]


class EngineSide:
    """The engine, requests submitted all at once. Its prefix cache is off: repeated prompts would
    flatter it."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:  # noqa: ARG002
        config = EngineConfig(dtype="bfloat16", prefix_caching=False, max_batch_tokens=2048)
        self.engine = build_engine(None, config)
        self.engine.start()
        self.catalog = FolderCatalog([folder])

    def run(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str | None], new_tokens: int
    ) -> list[list[int]]:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        tokens: list[list[int]] = [[] for _ in names]
        finished = threading.Semaphore(0)

        def collect(row: int, output: RequestOutput) -> None:
            tokens[row] += output.token_ids
            if output.finished:
                finished.release()

        for row, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            adapters = (Share(self.catalog.resolve(name)),) if name else ()
            request = GenerationRequest(f"{row}", list(prompt), params, adapters)
            self.engine.submit(request, partial(collect, row))
        for _ in names:
            finished.acquire()
        return tokens


def _serve(make: MakeSide, folder: Path, names: Sequence[str], pipe: Connection) -> None:
    runner = make(folder, names)
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        began = time.perf_counter()
        tokens = runner.run(*work)
        pipe.send((time.perf_counter() - began, tokens))


class Side:
    """A side's process, seen from here."""

    def __init__(self, make: MakeSide, folder: Path, names: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(make, folder, names, theirs), daemon=True
        )
        self._process.start()
        theirs.close()  # so that a side that dies ends our waiting, by EOFError
        self._pipe.recv()

    def run(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str | None], new_tokens: int
    ) -> tuple[float, list[list[int]]]:
        """Seconds, and the new tokens of each prompt."""
        self._pipe.send((prompts, names, new_tokens))
        seconds, tokens = self._pipe.recv()
        return seconds, tokens

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
