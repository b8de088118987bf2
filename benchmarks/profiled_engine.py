"""An engine whose steps are timed part by part, and requests for it that run side by side."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.floor import Work
from benchmarks.mixed_kinds import DTYPE, MadeAdapters, random_lora
from benchmarks.step_clock import StepClock, TimedStep
from benchmarks.timed_answer import TimedAnswer
from polydelta.adapters_store.composition import Share
from polydelta.adapters_store.packing import pack
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.build import assemble
from polydelta.engine.config import EngineConfig
from polydelta.engine.engine import Engine
from polydelta.engine.models.checkpoint import Checkpoint, open_checkpoint
from polydelta.engine.models.decoder import base_layout
from polydelta.engine.request import GenerationRequest, SamplingParams
from polydelta.kernels.ops import kernels_for

# Under PyTorch's profiler: a prefill and a decode step; of each the operators that take longest.
TRACED, SHOWN = 2, 12


class ProfiledEngine:
    """The default model in bfloat16, with random LoRAs that never were files."""

    def __init__(self, ranks: Sequence[int], max_batch_tokens: int) -> None:
        checkpoint = open_checkpoint(None)
        self.model = checkpoint.config
        self._clock, self._made, self._random = StepClock(), MadeAdapters(), Random(0)
        # Steps under PyTorch's profiler, and the operators in them.
        self._traced: list[tuple[TimedStep, str]] = []
        self._to_trace = 0
        config = EngineConfig(prefix_caching=False, max_batch_tokens=max_batch_tokens)
        # On a thread that ends, for the reason given in engine/build.py.
        with ThreadPoolExecutor(max_workers=1) as loading:
            self._engine = loading.submit(self._make, checkpoint, config, ranks).result()
        self._engine.start()

    def steps(self, work: Work) -> list[TimedStep]:
        """Runs the requests of a piece of work; the steps that they took."""
        self._clock.steps.clear()
        answers = [TimedAnswer() for _ in range(work.batch)]
        everybody, noted = threading.Event(), threading.Event()
        # The engine's loop waits until all are there, so that they share their first step.
        self._engine._commands.give(lambda: _wait(everybody))
        for row, answer in enumerate(answers):
            self._engine.submit(self._request(row, work), answer.take)
        everybody.set()
        for answer in answers:
            answer.wait()
        # The last step hands its tokens out before it is noted, and that is before this.
        self._engine._commands.give(noted.set)
        noted.wait()
        return list(self._clock.steps)

    def operations(self, work: Work) -> list[tuple[TimedStep, str]]:
        """The same under PyTorch's profiler: the first steps, each with a table of its
        operators."""
        self._traced, self._to_trace = [], TRACED
        self.steps(work)
        return self._traced

    def close(self) -> None:
        self._engine.shutdown()

    def _make(self, checkpoint: Checkpoint, config: EngineConfig, ranks: Sequence[int]) -> Engine:
        layout = base_layout(checkpoint.config, checkpoint.id)
        for number, rank in enumerate(ranks):
            self._made.packed[f"{number}"] = pack(random_lora(layout, rank, number), layout, DTYPE)
        kernels = kernels_for(torch.device("cpu"), DTYPE)
        # A recorded step is one call: its parts would not be seen.
        kernels.record = lambda inputs, run: (run(), None)  # type: ignore[method-assign]  # noqa: ARG005
        self._clock.watch_kernels(kernels)
        engine = assemble(checkpoint, config, kernels, make_loader=lambda *_: self._made)
        self._clock.watch_engine(engine)
        step = engine._step

        def traced() -> bool:
            if len(self._traced) == self._to_trace:
                return step()
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                busy = step()
            if busy:
                table = trace.key_averages().table("self_cpu_time_total", row_limit=SHOWN)
                self._traced.append((self._clock.steps[-1], table))
            return busy

        engine._step = traced  # type: ignore[method-assign]
        return engine

    def _request(self, row: int, work: Work) -> GenerationRequest:
        shares: tuple[Share, ...] = ()
        if work.ranks:
            name = f"{row % len(work.ranks)}"
            shares = (Share(AdapterRef(name, 1, Path(name))),)
        prompt = [self._random.randrange(100, 40000) for _ in range(work.prompt_tokens)]
        params = SamplingParams(max_tokens=work.new_tokens, temperature=0.0, ignore_eos=True)
        return GenerationRequest(f"{row}", prompt, params, shares)


def _wait(event: threading.Event) -> None:
    event.wait()
