"""Who is refused when there is more to do than can be done in time. Imports no torch."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, takewhile

from polydelta.engine.policies import Policy
from polydelta.engine.request import ErrorKind, RequestError
from polydelta.engine.sequence import Sequence
from polydelta.engine.waiting import Flow, Key, WaitingQueue

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

    def refusal(self, sequence: Sequence, waiting: WaitingQueue, now: float) -> RequestError | None:
        """Why a request that comes now is not let into the queue; None where it is."""
        if not waiting:
            # Whatever the queue's speed was, it has ended.
            self._admitted.clear()
        slo = self._limits.ttft_slo
        if slo is None or len(self._admitted) < FEWEST_SEEN:
            return None
        wait = self._wait(self._policy.num_ahead(sequence, waiting.flows), now)
        seconds = wait + self._prefill(slo)
        return self._late(seconds, seconds - slo) if seconds > slo else None

    def late(self, waiting: WaitingQueue, now: float) -> list[tuple[Sequence, RequestError]]:
        """Those that wait and can no longer have their first token in time, and what to tell
        them."""
        slo = self._limits.ttft_slo
        if slo is None:
            return []
        deadline = now + self._prefill(slo) - slo
        return [
            (one, self._late(now - one.request.arrived + self._prefill(slo), 0.0))
            for flow in waiting.flows
            # Who is behind came later.
            for one in takewhile(lambda one: one.request.arrived < deadline, _never_run(flow))
        ]

    def excess(
        self, waiting: WaitingQueue, keys: Callable[[], Callable[[Flow], Key]], now: float
    ) -> list[tuple[Sequence, RequestError]]:
        """Those that are too many, after all who could have been let in, and what to tell them: who
        would enter last. keys: called where there are some."""
        most, most_tokens = self._limits.max_waiting, self._limits.max_waiting_tokens
        num, tokens = len(waiting), waiting.num_tokens
        if num <= (most or num) and tokens <= (most_tokens or tokens):
            return []
        found: list[tuple[Sequence, RequestError]] = []
        for one in _last_first(waiting.flows, keys()):
            if most is not None and num > most:
                problem = f"more than {most} requests wait."
            elif most_tokens is not None and tokens > most_tokens and num > 1:
                problem = f"the prompts of those that wait have more than {most_tokens} tokens."
            else:
                break
            found.append((one, self._full(problem, num, now)))
            num -= 1
            tokens -= one.num_prompt_tokens
        return found

    def seconds_to_deadline(self, waiting: WaitingQueue, now: float) -> float | None:
        """Until the next one is late; None where nobody will be."""
        slo = self._limits.ttft_slo
        if slo is None:
            return None
        oldest = (next(_never_run(flow), None) for flow in waiting.flows)
        arrived = min((one.request.arrived for one in oldest if one is not None), default=None)
        if arrived is None:
            return None
        return max(0.0, arrived + slo - self._prefill(slo) - now)

    def admitted(self, now: float, others_wait: bool) -> None:
        """A request was let in. Only where others had to stay, that tells how fast the queue is."""
        if others_wait:
            self._admitted.append(now)
        else:
            self._admitted.clear()

    def first_token(self, sequence: Sequence, now: float) -> None:
        if sequence.admitted_at is not None and not sequence.num_preemptions:
            seconds = now - sequence.admitted_at
            self._prefill_seconds += (1 - DECAY) * (seconds - self._prefill_seconds)

    def _prefill(self, slo: float) -> float:
        """What is expected from admission to first token. Half of the limit at most: who has
        waited less may always try, or no first token would ever tell that things are better."""
        return min(self._prefill_seconds, slo / 2)

    def _wait(self, ahead: float, now: float) -> float:
        """Seconds until so many have been let in; 0 where it is not known."""
        if len(self._admitted) < FEWEST_SEEN:
            return 0.0
        took = max(now, self._admitted[-1]) - self._admitted[0]
        return ahead * took / (len(self._admitted) - 1)

    def _late(self, seconds: float, retry_after: float) -> RequestError:
        return RequestError(
            f"The server is busy: the first token would come {seconds:.1f} s after the request, "
            f"and {self._limits.ttft_slo:g} s is its limit. Try again later.",
            ErrorKind.LATE,
            max(1.0, math.ceil(retry_after)),
        )

    def _full(self, problem: str, num_waiting: int, now: float) -> RequestError:
        return RequestError(
            f"The server is busy: {problem} Try again later.",
            ErrorKind.QUEUE_FULL,
            max(1.0, math.ceil(self._wait(num_waiting / 2, now))),
        )


def _never_run(flow: Flow) -> Iterator[Sequence]:
    """Without those that were preempted."""
    return (one for one in flow if one.admitted_at is None)


def _last_first(flows: Iterable[Flow], key: Callable[[Flow], Key]) -> Iterator[Sequence]:
    """Those that would enter last; where keys are equal, those that came last."""
    order = count()
    heap = []
    for flow in flows:
        if never_run := list(_never_run(flow)):
            last = never_run[-1]
            heap.append((-key(flow)[0], -last.request.arrived, next(order), never_run))
    heapq.heapify(heap)
    while heap:
        rank, _, number, left = heapq.heappop(heap)
        yield left.pop()
        if left:
            heapq.heappush(heap, (rank, -left[-1].request.arrived, number, left))
