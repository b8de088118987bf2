"""What a parser can say of an adapter without reading its numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleOutline:
    """The delta of one module."""

    # The delta's kind, e.g. "LowRank".
    kind: str
    # 0 for kinds that have none.
    rank: int
