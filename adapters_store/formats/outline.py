"""What a parser can say of an adapter without reading its numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleOutline:
    """The deltas of one module."""

    # The kind of the delta, e.g. "LowRank"; where there are several, of that which has the rank.
    kind: str
    # 0 for kinds that have none.
    rank: int
    # Kinds of the others.
    also: tuple[str, ...] = ()
    # Of its deltas together, at most, where neither the rank nor the file's tensors say so many.
    numbers: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.kind, *self.also
