"""How much of a store one of those who share it may fill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polydelta.adapters_store.errors import TooLargeError


@dataclass(frozen=True)
class Allowance:
    """Of all contents of the versions whose ids are its own; each content counts once."""

    # Globs of the ids.
    ids: tuple[str, ...]
    # In bytes; None: as much as the store itself may hold.
    quota_bytes: int | None = None

    def check(self, contents: Mapping[str, int], more: int = 0) -> None:
        """contents: digest -> bytes; more: bytes besides them. Raises TooLargeError beyond it."""
        total = sum(contents.values()) + more
        if self.quota_bytes is not None and total > self.quota_bytes:
            raise TooLargeError(
                f"Your adapters would take {total} bytes, but your quota is {self.quota_bytes}: "
                "delete versions that you do not need."
            )
