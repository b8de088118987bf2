"""What is read so that it can be converted, but not served."""

from __future__ import annotations

from collections.abc import Iterable

from polydelta.adapters_store.delta_kinds import NOT_SERVED
from polydelta.adapters_store.errors import InvalidAdapterError


def check_served(format: str, kinds: Iterable[str]) -> None:
    """format: an adapter's; kinds: of its deltas. Raises InvalidAdapterError for one that would
    cost what the base layer costs."""
    if NOT_SERVED.isdisjoint(kinds):
        return
    raise InvalidAdapterError(
        f"This {format} adapter has no exact form that is cheaper than the base layer itself, so "
        "it is not served: `polydelta adapters convert FOLDER OUT --rank R` writes the nearest "
        "LoRA and prints the error."
    )
