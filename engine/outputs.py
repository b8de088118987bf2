"""What the engine hands out of a sequence."""

from __future__ import annotations

import logging

from polydelta.engine.detokenizer import TextStep
from polydelta.engine.request import FinishReason, RequestError, RequestOutput
from polydelta.engine.sequence import SampledToken, Sequence

logger = logging.getLogger(__name__)


def deliver(sequence: Sequence, output: RequestOutput) -> None:
    """A client that cannot take its output must not take the engine down with it."""
    try:
        sequence.on_output(output)
    except Exception:
        logger.warning("request %s could not take its output", sequence.id, exc_info=True)


def output_of(sequence: Sequence, token: SampledToken, step: TextStep) -> RequestOutput:
    """What one more token adds."""
    return RequestOutput(
        request_id=sequence.id,
        text=step.text,
        token_ids=(token.token_id,),
        logprobs=(token.logprob,) if token.logprob else (),
        cached_tokens=sequence.num_cached or 0,
        finish_reason=step.finish_reason,
        stop_reason=step.stop_reason,
        times=sequence.times if step.finish_reason else None,
    )


def last_output(
    sequence: Sequence,
    reason: FinishReason,
    error: RequestError | None = None,
) -> RequestOutput:
    """An end without a token."""
    return RequestOutput(
        request_id=sequence.id,
        text="",
        token_ids=(),
        finish_reason=reason,
        error=error,
        times=sequence.times,
    )
