"""Whom a step lets in, and who makes way for it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from polydelta.engine.admission import Admission
from polydelta.engine.policies import Policy
from polydelta.engine.sequence import Sequence


class Entrance:
    """Of one step. Open to everybody until the first in line has to wait; after that only to those
    for whom others make way."""

    def __init__(
        self, policy: Policy, admission: Admission, running: Seq[Sequence], max_batch_size: int
    ) -> None:
        """running: as it changes during the step."""
        self._policy = policy
        self._admission = admission
        self._running = running
        self._max_batch_size = max_batch_size
        # Who may still be preempted for others; None as long as nobody had to wait.
        self._in_the_way: list[Sequence] | None = None

    @property
    def is_closed(self) -> bool:
        return self._in_the_way == []

    def who_makes_way(self, sequence: Sequence) -> Seq[Sequence] | None:
        """Those that must be preempted for the sequence to enter, mostly nobody; None where it has
        to wait."""
        prefix = self._admission.find_prefix(sequence)
        if self._in_the_way is None:
            if self._fits(sequence, prefix, ()):
                return ()
            self._in_the_way = self._policy.in_the_way(self._running, self.share)
        if any(one.account == sequence.account for one in self._running):
            return None
        for number in range(1, len(self._in_the_way) + 1):
            if self._fits(sequence, prefix, self._in_the_way[:number]):
                victims = self._in_the_way[:number]
                del self._in_the_way[:number]
                return victims
        return None

    def share(self, sequences: Seq[Sequence]) -> float:
        """What they hold together of the places or of the pool's pages, whichever is more."""
        return max(len(sequences) / self._max_batch_size, self._admission.share(sequences))

    def _fits(self, sequence: Sequence, prefix: list[int], without: Seq[Sequence]) -> bool:
        """Whether there is a place and room, without some of those that run.

        No room is kept for those that run to grow into: with a page for each, a pool that is too
        small preempted never instead of 52 times in 250 requests, and was as fast (465 and 468
        tokens a second), but first tokens came three times as late."""
        if len(self._running) - len(without) >= self._max_batch_size:
            return False
        freed = sum(self._admission.pages_of_own(one, prefix) for one in without)
        return self._admission.can_admit(sequence, prefix, freed)
