"""Who waits, in queues of those that may stand for each other. Imports no torch."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain, count

from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.sequence import Sequence

# Smaller ones enter first.
Key = tuple[float, float]
# Account, adapters, priority.
FlowName = tuple[str, tuple[AdapterRef, ...], int]


class Flow:
    """Waiting requests of one account, for the same adapters and of the same priority, in the
    order of their arrival; those that were preempted come first."""

    def __init__(self, first: Sequence) -> None:
        self.account = first.account
        self.refs = tuple(first.adapter_refs)
        self.tenant = first.request.tenant
        self.priority = first.request.priority
        # An ordered set: requests in the middle leave, too.
        self._sequences: OrderedDict[Sequence, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    @property
    def head(self) -> Sequence:
        return next(iter(self._sequences))

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence] = None

    def add_first(self, sequence: Sequence) -> None:
        self._sequences[sequence] = None
        self._sequences.move_to_end(sequence, last=False)

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence]


class Line:
    """Flows that enter next, in their order."""

    def __init__(self, flows: list[Flow], key: Callable[[Flow], Key]) -> None:
        self.flows = flows
        self._key = key

    def in_turn(self) -> Iterator[Sequence]:
        """Heads of flows as they come to be first. Whoever is handed out may leave its flow before
        the next one is asked for: the one behind it has its turn, then, and otherwise none of its
        flow. Keys may grow meanwhile."""
        order = count()
        heap = [(self._key(flow), next(order), flow) for flow in self.flows]
        heapq.heapify(heap)
        while heap:
            before, _, flow = heapq.heappop(heap)
            now = self._key(flow)
            if now > before:
                heapq.heappush(heap, (now, next(order), flow))
                continue
            head = flow.head
            yield head
            if flow and flow.head is not head:
                heapq.heappush(heap, (self._key(flow), next(order), flow))


class WaitingQueue:
    """All flows."""

    def __init__(self) -> None:
        self._flows: dict[FlowName, Flow] = {}
        # Waiting sequences that need each adapter.
        self._needs: Counter[AdapterRef] = Counter()
        # Of the prompts.
        self.num_tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._flows.values()))

    def __bool__(self) -> bool:
        return bool(self._flows)

    def __iter__(self) -> Iterator[Sequence]:
        """Flow by flow."""
        return chain.from_iterable(self._flows.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._flows.get(flow_name(sequence), ())

    @property
    def flows(self) -> list[Flow]:
        return list(self._flows.values())

    def add(self, sequence: Sequence) -> None:
        """At its flow's end."""
        self._count(sequence, 1)
        self._flow_of(sequence).add(sequence)

    def add_first(self, sequence: Sequence) -> None:
        """Before all of its flow: it was preempted."""
        self._count(sequence, 1)
        self._flow_of(sequence).add_first(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._count(sequence, -1)
        name = flow_name(sequence)
        self._flows[name].remove(sequence)
        if not self._flows[name]:
            del self._flows[name]

    def needs(self, ref: AdapterRef) -> bool:
        return self._needs[ref] > 0

    def line(self, most: int, key: Callable[[Flow], Key]) -> Line:
        """The first flows, so many at most."""
        return Line(heapq.nsmallest(most, self._flows.values(), key=key), key)

    def _flow_of(self, sequence: Sequence) -> Flow:
        return self._flows.setdefault(flow_name(sequence), Flow(sequence))

    def _count(self, sequence: Sequence, by: int) -> None:
        self.num_tokens += by * sequence.num_prompt_tokens
        for ref in sequence.adapter_refs:
            self._needs[ref] += by
            if not self._needs[ref]:
                del self._needs[ref]


def flow_name(sequence: Sequence) -> FlowName:
    return sequence.account, tuple(sequence.adapter_refs), sequence.request.priority
