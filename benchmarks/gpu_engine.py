"""An engine with random weights on the device of the kernels, and work for it."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_adapters import DISTINCT
from benchmarks.gpu_clock import LAUNCHES
from benchmarks.gpu_setup import DTYPE, Setup
from benchmarks.kv_reader import Way
from benchmarks.kv_ways import NATIVE
from benchmarks.made_model import made_checkpoint
from benchmarks.mixed_kinds import MadeAdapters, random_lora
from benchmarks.timed_answer import TimedAnswer
from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.packing import pack
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.build import assemble
from polydelta.engine.config import EngineConfig
from polydelta.engine.engine import Engine
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.engine.runner import Runner
from polydelta.kernels.ops import RecordedStep

# Of the pool where a section needs little of it, and of adapters kept in page-locked memory.
POOL_BYTES, HOST_BYTES = 8 << 30, 8 << 30


class MadeEngine:
    """Runs requests that begin together."""

    def __init__(self, setup: Setup, engine: Engine, made: MadeAdapters, steps: Recorder) -> None:
        self._setup = setup
        self.engine = engine
        self._made = made
        self._steps = steps
        self._random = Random(0)
        self._count = 0

    @property
    def runner(self) -> Runner:
        """Only while the engine has nothing to do."""
        return self.engine._runner

    def use_graphs(self, use: bool) -> None:
        """Whether decode steps are recorded from now on."""
        if use != self._steps.active:
            self._steps.active = use
            self.runner._recorded.forget()

    def add_adapters(self, rank: int, count: int) -> list[str]:
        """LoRAs on all linear layers; their names."""
        packed = [packed_lora(self._setup, rank, seed) for seed in range(DISTINCT)]
        names = [f"{rank}-{number}" for number in range(count)]
        for number, name in enumerate(names):
            self._made.packed[name] = packed[number % DISTINCT]
        return names

    def adapter_bytes(self, name: str) -> int:
        return self._made.packed[name].nbytes

    def run(
        self, batch: int, adapters: Sequence[str], prompt_tokens: int, new_tokens: int
    ) -> list[TimedAnswer]:
        """So many sequences, which take the adapters in turn."""
        answers = [TimedAnswer() for _ in range(batch)]
        everybody = threading.Event()
        # The engine's loop waits until all are there.
        self.engine._commands.give(lambda: _wait(everybody))
        for row, answer in enumerate(answers):
            name = adapters[row % len(adapters)] if adapters else None
            self.engine.submit(self._request(name, prompt_tokens, new_tokens), answer.take)
        everybody.set()
        return [answer.wait() for answer in answers]

    def decode_seconds(self, batch: int, adapters: Sequence[str]) -> float:
        """The median step in which all sequences decode, from token to token."""
        sizes = self._setup.sizes
        # Loads, compiles and records.
        self.run(batch, adapters, sizes.engine_prompt, min(4, sizes.engine_tokens))
        answers = self.run(batch, adapters, sizes.engine_prompt, sizes.engine_tokens)
        began = max(answer.times[0] for answer in answers)
        ended = min(answer.times[-1] for answer in answers)
        times = [at for at in answers[0].times if began <= at <= ended]
        return statistics.median(b - a for a, b in pairwise(times))

    def replay_seconds(self) -> float | None:
        """Of the last step that was replayed, on the GPU alone; None where none was."""
        if self._steps.last is None:
            return None
        step, inputs = self._steps.last
        with torch.inference_mode():
            return self._setup.clock.eager_seconds([lambda: step.replay(inputs)] * LAUNCHES)

    def _request(
        self, adapter: str | None, prompt_tokens: int, new_tokens: int
    ) -> GenerationRequest:
        self._count += 1
        vocab = self._setup.sizes.model.vocab_size
        prompt = [self._random.randrange(vocab) for _ in range(prompt_tokens)]
        shares = () if adapter is None else (Share(AdapterRef(adapter, 1, Path(adapter))),)
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        return GenerationRequest(f"{self._count}", prompt, params, shares)


class Recorder:
    """Stands before the kernels' `record`."""

    def __init__(self, record: Callable[..., tuple[Tensor, RecordedStep | None]]) -> None:
        self._record = record
        self.active = True
        # The last step that was replayed, and its inputs.
        self.last: tuple[RecordedStep, Sequence[Any]] | None = None

    def __call__(
        self, inputs: Sequence[Any], run: Callable[[], Tensor]
    ) -> tuple[Tensor, RecordedStep | None]:
        self.last = None
        if not self.active:
            return run(), None
        result, step = self._record(inputs, run)
        return result, None if step is None else _WatchedStep(step, self)


class _WatchedStep:
    """Tells the recorder of each replay."""

    def __init__(self, step: RecordedStep, recorder: Recorder) -> None:
        self._step = step
        self._recorder = recorder

    def replay(self, inputs: Sequence[Any]) -> Tensor:
        self._recorder.last = self._step, inputs
        return self._step.replay(inputs)


def packed_lora(setup: Setup, rank: int, seed: int) -> PackedAdapter:
    """On all linear layers of the whole model."""
    layout = base_layout(setup.sizes.model, "made")
    return pack(random_lora(layout, rank, seed), layout, DTYPE)


@contextmanager
def made_engine(
    setup: Setup, pool_bytes: int | None = POOL_BYTES, start: bool = True, way: Way = NATIVE
) -> Iterator[MadeEngine]:
    """pool_bytes: None for what the GPU has left."""
    sizes, kernels, made = setup.sizes, setup.kernels, MadeAdapters()
    config = EngineConfig(
        dtype="bfloat16",
        max_batch_tokens=sizes.prompt,
        max_batch_size=max(sizes.engine_batches),
        pool_bytes=pool_bytes if setup.on_gpu else 400 * sizes.page_bytes * sizes.model.num_layers,
        host_adapter_bytes=HOST_BYTES,
        prefix_caching=False,
        kv_format=way.format,
        kv_select=way.selection,
    )
    steps = Recorder(kernels.record)
    kernels.record = steps  # type: ignore[method-assign]
    checkpoint = made_checkpoint(sizes.model, setup.device, DTYPE)
    engine = assemble(checkpoint, config, kernels, make_loader=lambda *_: made)
    if start:
        engine.start()
    try:
        yield MadeEngine(setup, engine, made, steps)
    finally:
        engine.shutdown()
        kernels.record = steps._record  # type: ignore[method-assign]


def _wait(event: threading.Event) -> None:
    event.wait()
