"""The engine: a loop in its own thread that schedules, runs, and hands out tokens.

It never waits for a client, a disk or an adapter. Other threads talk to it through one queue of
commands, and it talks back through each request's `on_output`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InUseError
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.adapter_control import AdapterControl
from polydelta.engine.adapter_entry import AdapterPlace
from polydelta.engine.answers import Answers
from polydelta.engine.commands import Commands, EngineDeadError
from polydelta.engine.kv_setup import KVSetup
from polydelta.engine.models.tokenizer import Tokenizer
from polydelta.engine.request import (
    ErrorKind,
    FinishReason,
    GenerationRequest,
    OutputHandler,
    RequestError,
)
from polydelta.engine.runner import LaunchedStep, Runner
from polydelta.engine.scheduler import Scheduler
from polydelta.engine.sequence import Schedule, Sequence
from polydelta.engine.stats import EngineStats
from polydelta.engine.stats_recorder import StatsRecorder
from polydelta.engine.step_stats import StepClock, StepPhase

logger = logging.getLogger(__name__)

# How long whoever asks for counts waits for the step at hand, in seconds.
STATS_PATIENCE = 2.0

PLAIN = KVSetup()


@dataclass(frozen=True, eq=False)
class _StepUnderWay:
    schedule: Schedule
    step: LaunchedStep
    # By time.perf_counter, when it began to be scheduled.
    began: float


class Engine:
    """Submit requests from any thread; outputs come on the engine's own."""

    def __init__(
        self,
        model_id: str,
        tokenizer: Tokenizer,
        max_model_len: int,
        context_length: int,
        vocab_size: int,
        layout: BaseLayout,
        scheduler: Scheduler,
        adapters: AdapterControl,
        runner: Runner,
        recorder: StatsRecorder,
        wake: threading.Event,
        close: Callable[[], None],
        check_integrity: bool = False,
        kv_setup: KVSetup = PLAIN,
    ) -> None:
        """max_model_len: the longest sequence that is served, in tokens; context_length: that the
        model knows. close: called when the loop has ended, to let go of what loads adapters.
        kv_setup: how KV is stored and read, as the other parts were made to do it."""
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.context_length = context_length
        self.vocab_size = vocab_size
        # What an adapter must fit.
        self.layout = layout
        self.kv_setup = kv_setup
        self._scheduler = scheduler
        self._adapters = adapters
        self._runner = runner
        self._recorder = recorder
        self._stats = recorder.snapshot(scheduler)
        self._close = close
        self._check_integrity = check_integrity
        # Set whenever there may be something to do: a command, or an adapter that was loaded.
        self._wake = wake
        self._stopping = False
        self._answers = Answers(tokenizer, max_model_len, scheduler, runner, recorder)
        # Steps that were launched and whose tokens are not known yet, oldest first.
        self._under_way: deque[_StepUnderWay] = deque()
        self._last_completed = 0.0
        self._thread = threading.Thread(target=self._loop, name="polydelta-engine", daemon=True)
        self._commands = Commands(wake, self._thread.is_alive)

    @property
    def max_batch_size(self) -> int:
        """Sequences that run at the same time, at most."""
        return self._scheduler.max_batch_size

    @property
    def device(self) -> str:
        """Where the model runs: "cpu", or "cuda:0" and so on."""
        return str(self._runner.device)

    @property
    def pool_bytes(self) -> int:
        """What KV cache and resident adapters share."""
        return self._runner.pool_bytes

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def start(self) -> None:
        self._thread.start()

    def shutdown(self, timeout: float = 10.0) -> None:
        """Ends the loop after the step at hand; what still runs ends with FinishReason.ABORT."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def submit(self, request: GenerationRequest, on_output: OutputHandler) -> None:
        """Thread-safe. Raises EngineDeadError; what is wrong with one request comes back as its
        output, with FinishReason.ERROR."""
        sequence = Sequence(request.within(self.max_model_len), on_output)
        if not self._commands.give(lambda: self._answers.add(sequence)):
            raise EngineDeadError("The engine is not running.")

    def abort(self, request_id: str) -> None:
        """Thread-safe. Drops a request, without a last output; its pages are free at once."""
        self._commands.give(lambda: self._answers.abort(request_id))

    def load_adapter(self, ref: AdapterRef, pin: bool = False) -> Future[None]:
        """Thread-safe. Brings an adapter into the pool before anybody asks for it; with `pin`, it
        stays there. The future raises AdapterError, and EngineDeadError."""
        return self._commands.order(lambda done: self._adapters.load(ref, pin, done))

    def withdraw(self, order: Future[None]) -> None:
        """Thread-safe. Ends what `load_adapter` returned with AdapterError, unless it is done."""
        self._commands.give(lambda: self._adapters.withdraw(order))

    def unpin_adapter(self, ref: AdapterRef) -> Future[None]:
        """Thread-safe. Lets the pool evict an adapter again."""
        return self._commands.order(lambda done: self._adapters.unpin(ref, done))

    def evict_adapter(self, ref: AdapterRef) -> Future[None]:
        """Thread-safe. Takes an adapter out of the pool and host RAM; the future raises InUseError
        while it is used or pinned."""
        return self._commands.order(lambda done: self._evict_adapter(ref, done))

    def forget_adapter(self, ref: AdapterRef) -> None:
        """Thread-safe. A version was deleted: all memory that it has is freed."""
        self._commands.give(lambda: self._forget_adapter(ref))

    def adapter_place(self, ref: AdapterRef) -> AdapterPlace:
        """Thread-safe: where an adapter is at the moment."""
        return self._scheduler.adapter_place(ref)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended, orders that nobody took yet among them; any thread may
        ask."""
        return len(self._answers) + len(self._commands)

    def stats(self) -> EngineStats:
        """Thread-safe, but for the engine's own thread: waits until the step at hand is done, so
        that whatever a client has seen is counted. A loop that is stuck or has ended leaves the
        last picture that there was."""
        taken = threading.Event()
        if self._commands.give(lambda: self._take_stats(taken)):
            taken.wait(STATS_PATIENCE)
        return self._stats

    def _loop(self) -> None:
        try:
            self._runner.enter_thread()
            while not self._stopping:
                self._wake.clear()
                self._take_commands()
                if not self._step():
                    self._rest()
        except Exception:
            logger.exception("the engine's loop failed")
            failed = RequestError("The engine failed; see the server's log.", ErrorKind.SERVER)
            self._end_all(FinishReason.ERROR, failed)
        else:
            self._end_all(FinishReason.ABORT)
        finally:
            self._stopping = True
            self._close()

    def _step(self) -> bool:
        """One step; False when there was nothing to do.

        Where the runner computes beside this thread, the next step is scheduled and launched before
        the tokens of the last one are waited for.
        """
        if self._scheduler.must_know_tokens():
            self._complete_steps(0)
        clock = StepClock(self._recorder.phase)
        self._adapters.advance()
        schedule = self._scheduler.schedule()
        failures = self._scheduler.take_failures()
        for failure in failures:
            self._answers.finish(failure.sequence, FinishReason.ERROR, failure.error)
        if schedule:
            clock.ended(StepPhase.SCHEDULE)
            step = self._runner.launch(schedule, self._scheduler.bound_adapter)
            self._scheduler.advance(schedule)
            self._under_way.append(_StepUnderWay(schedule, step, clock.began))
            clock.ended(StepPhase.LAUNCH)
        completed = self._complete_steps(self._runner.steps_ahead if schedule else 0)
        return bool(schedule or failures or completed)

    def _complete_steps(self, left: int) -> bool:
        """Waits for tokens until so many steps are under way; whether there was one to wait for."""
        completed = len(self._under_way) > left
        while len(self._under_way) > left:
            clock = StepClock(self._recorder.phase)
            done = self._under_way.popleft()
            sampled = done.step.wait()
            clock.ended(StepPhase.WAIT)
            # Of those that have left since it was launched nobody wants another one.
            tokens = [
                None if item.sequence.has_left else token
                for item, token in zip(done.schedule, sampled, strict=True)
            ]
            self._scheduler.commit(done.schedule, tokens)
            now = time.perf_counter()
            self._recorder.step(done.schedule, tokens, now - max(done.began, self._last_completed))
            self._last_completed = now
            self._answers.hand_out(done.schedule, tokens)
            clock.ended(StepPhase.OUTPUT)
        return completed

    def _rest(self) -> None:
        """Nothing can run: waits for a command, an adapter to be loaded, or a deadline."""
        if self._check_integrity:
            self._scheduler.check_integrity()
        if not self._stopping:  # a shutdown just before `clear` would not wake it again
            self._wake.wait(self._scheduler.seconds_to_deadline())

    def _take_commands(self) -> None:
        while (command := self._commands.take()) is not None:
            command()

    def _take_stats(self, taken: threading.Event) -> None:
        self._stats = self._recorder.snapshot(self._scheduler)
        taken.set()

    def _evict_adapter(self, ref: AdapterRef, done: Future[None]) -> None:
        try:
            self._adapters.evict(ref)
        except InUseError as error:
            done.set_exception(error)
        else:
            self._runner.forget_adapter(ref)
            done.set_result(None)

    def _forget_adapter(self, ref: AdapterRef) -> None:
        self._adapters.forget(ref)
        self._runner.forget_adapter(ref)

    def _end_all(self, reason: FinishReason, error: RequestError | None = None) -> None:
        self._stopping = True
        self._commands.close()
        # After a failed step nothing is certain, but everybody gets an answer.
        while (command := self._commands.take()) is not None:
            _try_to(command)
        _try_to(self._adapters.close)
        for sequence in self._answers:
            _try_to(partial(self._answers.finish, sequence, reason, error))
        # Nobody is left, whatever the scheduler has.
        self._stats = replace(
            self._recorder.snapshot(self._scheduler),
            num_running=0,
            num_waiting=0,
            waiting_for_adapter=0,
            running_adapters=(),
            waiting_adapters=(),
        )


def _try_to(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:
        logger.exception("something failed while the engine was ending")
