"""How a preempted sequence gets its KV back. Imports no torch."""

from __future__ import annotations

from enum import StrEnum


class PreemptionMode(StrEnum):
    """What becomes of the KV of a sequence that is preempted."""

    # It is computed again, but for what the prefix cache still has.
    RECOMPUTE = "recompute"
    # It is copied to host RAM, and back.
    SWAP = "swap"
