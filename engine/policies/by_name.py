"""The table of policies: a new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable

from polydelta.engine.policies.fair import Fair
from polydelta.engine.policies.fcfs import FirstComeFirstServed
from polydelta.engine.policies.policy import Policy
from polydelta.engine.policies.priority import ByPriority

POLICIES: dict[str, Callable[[], Policy]] = {
    "fair": Fair,
    "fcfs": FirstComeFirstServed,
    "priority": ByPriority,
}
