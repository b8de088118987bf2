"""Requests to an engine in this process, with the time at which each token came."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from random import Random

from polydelta.adapters_store.composition import Shares
from polydelta.engine.engine import Engine
from polydelta.engine.request import (
    FinishReason,
    GenerationRequest,
    RequestOutput,
    SamplingParams,
)

# No request takes so many seconds unless something is wrong.
PATIENCE = 120.0


class Deadline:
    """The end of the time that one part of a benchmark may take."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() > self._end


class TimedAnswer:
    """One request's output; times are of `time.perf_counter`."""

    def __init__(self, tell: Callable[[], None] = lambda: None) -> None:
        """tell: called on the engine's thread when the answer has ended."""
        self.began = time.perf_counter()
        # When each token came.
        self.times: list[float] = []
        self._tell = tell
        self._ended = threading.Event()
        self._failed: str | None = None

    @property
    def first_token(self) -> float:
        """Seconds from the request to its first token."""
        return self.times[0] - self.began

    def take(self, output: RequestOutput) -> None:
        self.times += [time.perf_counter()] * len(output.token_ids)
        if output.finished:
            if output.finish_reason is not FinishReason.LENGTH:
                self._failed = output.error or str(output.finish_reason)
            self._ended.set()
            self._tell()

    def wait(self) -> TimedAnswer:
        """Until it has ended. Raises RuntimeError when that was no good end."""
        if not self._ended.wait(PATIENCE):
            raise RuntimeError(f"A request has no answer after {PATIENCE:.0f} s.")
        if self._failed is not None:
            raise RuntimeError(f"A request has failed: {self._failed}")
        return self


class Client:
    """Asks one engine, with prompts that no two requests share."""

    def __init__(self, engine: Engine, prompt_tokens: int) -> None:
        self.engine = engine
        self._prompt_tokens = prompt_tokens
        self._random = Random(0)
        self._count = 0

    def ask(
        self, max_tokens: int, adapters: Shares = (), answer: TimedAnswer | None = None
    ) -> TimedAnswer:
        """Greedy, to the last of max_tokens. answer: where the output goes; None for a new one."""
        self._count += 1
        prompt = [self._random.randrange(100, 40000) for _ in range(self._prompt_tokens)]
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(f"{self._count}", prompt, params, adapters)
        answer = answer or TimedAnswer()
        self.engine.submit(request, answer.take)
        return answer
