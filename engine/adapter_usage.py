"""How much each adapter is used: the busiest by name, all others together. Imports no torch.

Thousands of adapters would be thousands of series for whoever scrapes them, so only so many have a
name at a time. What is counted is never lost, nor counted twice: an adapter that loses its name
gives its counts to the others', and one that gets a name begins at zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace

# Requests after which an adapter's earlier ones count half, when it is decided who has a name.
HALF_LIFE = 10_000
# How many times as busy as the least busy with a name somebody without one must be to take it:
# names that changed with every request would tell nothing.
CLEARLY = 2.0
# Of adapters without a name, how many for each that has one are remembered.
CANDIDATES = 10
# Scores are scaled down before they are too large for floats.
LARGE = 1e100


@dataclass
class AdapterCounts:
    """Since the start, or since the adapter was given a name."""

    # That have come.
    requests: int = 0
    # Of those, how many found the adapter in the pool.
    hits: int = 0
    # From a request to its admission.
    queue_seconds: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    # Copies into the pool, what they took, and how often the pool let go of it.
    swap_ins: int = 0
    swap_in_seconds: float = 0.0
    swap_outs: int = 0

    def add(self, other: AdapterCounts) -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


@dataclass(frozen=True)
class AdapterUsageSnapshot:
    # By adapter id; the bare base model's are under "".
    named: Mapping[str, AdapterCounts] = field(default_factory=dict)
    others: AdapterCounts = field(default_factory=AdapterCounts)

    def total(self) -> AdapterCounts:
        """Of all adapters, and of the base model."""
        return _sum([*self.named.values(), self.others])


class AdapterUsage:
    """Belongs to the engine's thread."""

    def __init__(self, most_named: int) -> None:
        self._most_named = most_named
        self._named: dict[str, AdapterCounts] = {}
        self._others = AdapterCounts()
        # Requests lately, of adapters with and without a name. What a request weighs grows, which
        # is as good as letting all that were before shrink.
        self._scores: dict[str, float] = {}
        self._weight = 1.0

    def counts(self, adapter_id: str) -> AdapterCounts:
        """Where to count what an adapter does: its own counts, or those of all others."""
        return self._named.get(adapter_id, self._others)

    def use(self, adapter_id: str) -> AdapterCounts:
        """Takes note of a request, which may give the adapter a name; where to count it."""
        if adapter_id:
            self._score(adapter_id)
        if adapter_id not in self._named and self._deserves_a_name(adapter_id):
            self._named[adapter_id] = AdapterCounts()
        return self.counts(adapter_id)

    def snapshot(self) -> AdapterUsageSnapshot:
        named = {name: replace(counts) for name, counts in self._named.items()}
        return AdapterUsageSnapshot(named, replace(self._others))

    def _score(self, adapter_id: str) -> None:
        self._weight *= 2 ** (1 / HALF_LIFE)
        self._scores[adapter_id] = self._scores.get(adapter_id, 0.0) + self._weight
        if self._weight > LARGE:
            self._scores = {name: score / LARGE for name, score in self._scores.items()}
            self._weight /= LARGE
        most = CANDIDATES * self._most_named + 1
        if len(self._scores) > 2 * most:
            busiest = sorted(self._scores, key=self._scores.__getitem__, reverse=True)[:most]
            kept = {*busiest, *self._adapters_with_names(), adapter_id}
            self._scores = {name: self._scores[name] for name in kept}

    def _deserves_a_name(self, adapter_id: str) -> bool:
        """Makes room for it where it must."""
        if not adapter_id:
            return True
        rivals = self._adapters_with_names()
        if len(rivals) < self._most_named:
            return True
        if not rivals:
            return False
        idlest = min(rivals, key=self._scores.__getitem__)
        if self._scores[adapter_id] <= CLEARLY * self._scores[idlest]:
            return False
        self._others.add(self._named.pop(idlest))
        return True

    def _adapters_with_names(self) -> list[str]:
        return [name for name in self._named if name]


def _sum(each: Iterable[AdapterCounts]) -> AdapterCounts:
    total = AdapterCounts()
    for counts in each:
        total.add(counts)
    return total
