"""Requests that have not ended: the text of each, and what is handed out of it."""

from __future__ import annotations

from collections.abc import Iterator

from polydelta.engine.detokenizer import Detokenizer
from polydelta.engine.models.tokenizer import Tokenizer
from polydelta.engine.outputs import deliver, last_output, output_of
from polydelta.engine.request import FinishReason, RequestError
from polydelta.engine.runner import Runner
from polydelta.engine.scheduler import Scheduler
from polydelta.engine.sequence import SampledToken, Schedule, Sequence
from polydelta.engine.stats_recorder import StatsRecorder


class Answers:
    """For the engine's thread; others may ask how many there are."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int,
        scheduler: Scheduler,
        runner: Runner,
        recorder: StatsRecorder,
    ) -> None:
        """max_model_len: tokens of the longest prompt and answer."""
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._scheduler = scheduler
        self._runner = runner
        self._recorder = recorder
        self._sequences: dict[str, Sequence] = {}
        self._texts: dict[Sequence, Detokenizer] = {}

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """As it is now: they may end meanwhile."""
        return iter(list(self._sequences.values()))

    def add(self, sequence: Sequence) -> None:
        """To the scheduler; one with a prompt that cannot be served ends at once."""
        if problem := self._problem(sequence):
            self._recorder.finished(sequence, FinishReason.ERROR)
            deliver(sequence, last_output(sequence, FinishReason.ERROR, RequestError(problem)))
            return
        self._texts[sequence] = Detokenizer(self._tokenizer, sequence.request.sampling)
        self._sequences[sequence.id] = sequence
        self._recorder.arrived(sequence)
        self._scheduler.add(sequence)

    def hand_out(self, schedule: Schedule, tokens: list[SampledToken | None]) -> None:
        """tokens: what a step has sampled, of each that it computed; None where that is nothing."""
        for scheduled, token in zip(schedule, tokens, strict=True):
            if token is None:
                continue
            sequence = scheduled.sequence
            last = self._scheduler.is_full(sequence)
            step = self._texts[sequence].push(token.token_id, last)
            if step.finish_reason:
                self._scheduler.remove(sequence)
                self._forget(sequence)
                self._recorder.finished(sequence, step.finish_reason)
            deliver(sequence, output_of(sequence, token, step))

    def finish(
        self, sequence: Sequence, reason: FinishReason, error: RequestError | None = None
    ) -> None:
        """Ends a sequence that the scheduler no longer has."""
        self._forget(sequence)
        self._recorder.finished(sequence, reason, error)
        deliver(sequence, last_output(sequence, reason, error))

    def abort(self, request_id: str) -> None:
        """Ends one without a last output, unless it has ended."""
        if sequence := self._sequences.get(request_id):
            self._scheduler.remove(sequence)
            self._forget(sequence)
            self._recorder.finished(sequence, FinishReason.ABORT)

    def _problem(self, sequence: Sequence) -> str | None:
        """What is wrong with the prompt; None when it can be served."""
        if not sequence.num_prompt_tokens:
            return "The prompt has no tokens; an answer needs at least one to follow."
        if sequence.num_prompt_tokens < self._max_model_len:
            return None
        return (
            f"The prompt has {sequence.num_prompt_tokens} tokens, but the context window is "
            f"{self._max_model_len} tokens and an answer needs at least one of them."
        )

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.id], self._texts[sequence]
        self._runner.forget(sequence)
