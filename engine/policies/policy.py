"""The interface of an order in which waiting requests enter. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence as Seq
from typing import Protocol

from polydelta.engine.sequence import Sequence
from polydelta.engine.waiting import Flow, Key

# Whether all that a flow needs is in the pool already.
IsResident = Callable[[Flow], bool]
# What some that run hold together of the places or of the pool's pages, 0 to 1, whichever is more.
Share = Callable[[Seq[Sequence]], float]


class Policy(Protocol):
    """Is told what happens, and asked who comes first. What it does not care for, it leaves out."""

    def keys(self, flows: Collection[Flow], is_resident: IsResident) -> Callable[[Flow], Key]:
        """The place of each of the waiting flows; smaller keys enter first. What is charged later
        shows in the keys."""
        ...

    def num_ahead(self, sequence: Sequence, flows: Collection[Flow]) -> float:
        """How many of the waiting enter before one that comes now."""
        ...

    def queued(self, sequence: Sequence) -> None:
        """A request came, and waits."""

    def left_queue(self, sequence: Sequence) -> None:
        """It entered, or was given up."""

    def charge(self, sequence: Sequence, prompt_tokens: int, output_tokens: int) -> None:
        """What a step computes for it; tokens that are computed again are not charged again."""

    def victim(self, running: Seq[Sequence], share: Share) -> Sequence:
        """Who is preempted when those that run, in the order of their admission, need pages."""
        return running[-1]

    def in_the_way(self, running: Seq[Sequence], share: Share) -> list[Sequence]:
        """Who may be preempted, in this order, for accounts that wait and have nobody running, when
        nothing else would let them in. running: in the order of admission."""
        return []
