"""First come, first served. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection

from polydelta.engine.policies.policy import IsResident, Policy
from polydelta.engine.sequence import Sequence
from polydelta.engine.waiting import Flow, Key


class FirstComeFirstServed(Policy):
    """In the order of arrival, whoever asks for whatever."""

    def keys(self, flows: Collection[Flow], is_resident: IsResident) -> Callable[[Flow], Key]:
        return lambda flow: (0.0, flow.head.request.arrived)

    def num_ahead(self, sequence: Sequence, flows: Collection[Flow]) -> float:
        return float(sum(map(len, flows)))
