"""What each of several customers was served, for an order that is fair between them.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024):
whoever has the lowest counter is served next. Who comes back to a queue in which it had nobody is
lifted to the lowest of those that wait: time in which one asks for nothing is not saved up.
"""

from __future__ import annotations

from collections import Counter
from typing import Generic, TypeVar

Customer = TypeVar("Customer")

# Customers without anybody waiting that are remembered beside the others.
MOST_IDLE = 1024


class VirtualCounters(Generic[Customer]):
    """Counters by customer, in tokens over weights."""

    def __init__(self) -> None:
        self._served: dict[Customer, float] = {}
        self._waiting: Counter[Customer] = Counter()
        # The last one who had somebody waiting: sets the floor when nobody has.
        self._last: Customer | None = None

    def __getitem__(self, customer: Customer) -> float:
        return self._served.get(customer, 0.0)

    def waiting(self, customer: Customer) -> int:
        return self._waiting[customer]

    def queued(self, customer: Customer) -> None:
        if customer not in self._waiting:
            self._served[customer] = max(self[customer], self._floor())
        self._waiting[customer] += 1

    def left_queue(self, customer: Customer) -> None:
        self._waiting[customer] -= 1
        if not self._waiting[customer]:
            del self._waiting[customer]
            self._last = customer
            self._forget_idle()

    def charge(self, customer: Customer, amount: float) -> None:
        self._served[customer] = self[customer] + amount

    def _floor(self) -> float:
        if self._waiting:
            return min(self[customer] for customer in self._waiting)
        return 0.0 if self._last is None else self[self._last]

    def _forget_idle(self) -> None:
        """Those at or below the floor: they would be lifted to it anyway."""
        if len(self._served) <= len(self._waiting) + MOST_IDLE:
            return
        floor = self._floor()
        self._served = {
            customer: served
            for customer, served in self._served.items()
            if customer in self._waiting or customer == self._last or served > floor
        }
