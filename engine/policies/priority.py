"""By the priority that requests ask for. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence as Seq

from polydelta.engine.policies.policy import IsResident, Policy, Share
from polydelta.engine.sequence import Sequence
from polydelta.engine.waiting import Flow, Key

# Waiting so long is worth one level of priority: nobody waits for ever.
SECONDS_A_LEVEL = 60.0


class ByPriority(Policy):
    """Lower numbers first, and those of one number in the order of arrival.

    Out of pages, the last number is preempted first, and of that the youngest.
    """

    def keys(self, flows: Collection[Flow], is_resident: IsResident) -> Callable[[Flow], Key]:
        return lambda flow: (_rank(flow.head), flow.head.request.arrived)

    def num_ahead(self, sequence: Sequence, flows: Collection[Flow]) -> float:
        # A flow's own requests differ in their arrival alone, and all have come before.
        return float(sum(len(flow) for flow in flows if _rank(flow.head) <= _rank(sequence)))

    def victim(self, running: Seq[Sequence], share: Share) -> Sequence:
        return max(reversed(running), key=_rank)


def _rank(sequence: Sequence) -> float:
    return sequence.request.arrived + SECONDS_A_LEVEL * sequence.request.priority
