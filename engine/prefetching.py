"""Adapters are brought to the host while those who need them still wait. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.adapter_entry import ResidencyState
from polydelta.engine.residency import Residency
from polydelta.engine.waiting import Flow

# Adapters on their way at a time: each takes host RAM until its turn.
MAX_PREFETCHED = 8


class Prefetching:
    """Starts loads, which are never waited for."""

    def __init__(self, residency: Residency[Any, Any]) -> None:
        self._residency = residency

    def unreadable(self, line: Seq[Flow]) -> AdapterRef | None:
        """An adapter that one of them needs, and that could not be loaded."""
        failed = ResidencyState.FAILED
        refs = (ref for flow in line for ref in flow.refs)
        return next((ref for ref in refs if self._residency.state(ref) is failed), None)

    def start(self, line: Seq[Flow]) -> None:
        """line: those that enter next, in their order."""
        for flow in line:
            for ref in flow.refs:
                # Whoever is first gets all that it needs: sums of which each has a part would wait
                # for each other for ever.
                if flow is line[0] and self._residency.num_on_their_way() >= MAX_PREFETCHED:
                    self._residency.drop_from_host(besides=flow.refs)
                if flow is line[0] or self._residency.num_on_their_way() < MAX_PREFETCHED:
                    self._residency.prefetch(ref)
