"""Who is refused when there is more to do than can be done in time. Imports no torch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from polydelta.engine.policies import Policy
from polydelta.engine.request import ErrorKind, RequestError
from polydelta.engine.sequence import Sequence
from polydelta.engine.waiting import WaitingQueue

# Admissions from a queue by which its speed is told, and how many of them are too few to tell.
MOST_SEEN, FEWEST_SEEN = 128, 8
# Of what was measured before, when a first token comes.
DECAY = 0.9


@dataclass(frozen=True)
class QueueLimits:
    """None: no limit."""

    # Seconds from a request to its first token.
    ttft_slo: float | None = None
    # Requests that wait for others, and tokens of all prompts that wait.
    max_waiting: int | None = None
    max_waiting_tokens: int | None = None


class Overload:
    """Tells, by what was measured, when the first token of a request would come.

    The wait for admission is told by the speed at which the queue was let in lately, and by who
    stands before; what follows until the first token, by what it took others. S-LoRA's early abort
    (arXiv 2311.03285) has the same aim.
    """

    def __init__(self, limits: QueueLimits, policy: Policy) -> None:
        self._limits = limits
        self._policy = policy
        # When waiting requests were let in lately while others had to wait, by time.monotonic.
        self._admitted: deque[float] = deque(maxlen=MOST_SEEN)
        # From admission to first token, in seconds.
        self._prefill_seconds = 0.0

    def refusal(
        self, sequence: Sequence, waiting: WaitingQueue, places: int
    ) -> RequestError | None:
        """Why a request that comes now is not let into the queue; None where it is.

        places: sequences that could run beside those that do."""
        most, most_tokens = self._limits.max_waiting, self._limits.max_waiting_tokens
        if most is not None and len(waiting) - places >= most:
            return self._full(f"{len(waiting)} requests wait already, and {most} may.", waiting)
        tokens = waiting.num_tokens + sequence.num_prompt_tokens
        if most_tokens is not None and waiting and tokens > most_tokens:
            return self._full(
                f"The prompts of those that wait would have {tokens} tokens with this one's "
                f"{sequence.num_prompt_tokens}, and may have {most_tokens}.",
                waiting,
            )
        slo = self._limits.ttft_slo
        if slo is None or len(waiting) < places:
            return None
        ahead = self._policy.num_ahead(sequence, waiting.flows)
        seconds = self._wait(ahead) + self._prefill_seconds
        return self._late(seconds, seconds - slo) if seconds > slo else None

    def late(self, waiting: WaitingQueue, now: float) -> Collection[tuple[Sequence, RequestError]]:
        """Those that wait and can no longer have their first token in time, and what to tell them.
        Of each flow at most one: who is behind it came later."""
        slo = self._limits.ttft_slo
        if slo is None:
            return ()
        deadline = now + self._prefill_seconds - slo
        return [
            (one, self._late(now - one.request.arrived + self._prefill_seconds, 0.0))
            for one in _oldest(waiting)
            if one.request.arrived < deadline
        ]

    def seconds_to_deadline(self, waiting: WaitingQueue, now: float) -> float | None:
        """Until the next one is late; None where nobody will be."""
        slo = self._limits.ttft_slo
        arrived = min((one.request.arrived for one in _oldest(waiting)), default=None)
        if slo is None or arrived is None:
            return None
        return max(0.0, arrived + slo - self._prefill_seconds - now)

    def admitted(self, now: float, others_wait: bool) -> None:
        """A request was let in. Only where others had to stay, that tells how fast the queue is."""
        if others_wait:
            self._admitted.append(now)
        else:
            self._admitted.clear()

    def first_token(self, sequence: Sequence, now: float) -> None:
        if sequence.admitted_at is not None:
            seconds = now - sequence.admitted_at
            self._prefill_seconds += (1 - DECAY) * (seconds - self._prefill_seconds)

    def _wait(self, ahead: float) -> float:
        """Seconds until so many have been let in; 0 where it is not known."""
        if len(self._admitted) < FEWEST_SEEN:
            return 0.0
        took = self._admitted[-1] - self._admitted[0]
        return ahead * took / (len(self._admitted) - 1)

    def _late(self, seconds: float, retry_after: float) -> RequestError:
        return RequestError(
            f"The server is busy: the first token would come {seconds:.1f} s after the request, "
            f"and {self._limits.ttft_slo:g} s is its limit. Try again later.",
            ErrorKind.LATE,
            max(1.0, math.ceil(retry_after)),
        )

    def _full(self, problem: str, waiting: WaitingQueue) -> RequestError:
        return RequestError(
            f"The server is busy: {problem} Try again later.",
            ErrorKind.QUEUE_FULL,
            max(1.0, math.ceil(self._wait(len(waiting) / 2))),
        )


def _oldest(waiting: WaitingQueue) -> Iterator[Sequence]:
    """Of each flow, the first of those that have never run."""
    for flow in waiting.flows:
        if (oldest := next((one for one in flow if one.admitted_at is None), None)) is not None:
            yield oldest
