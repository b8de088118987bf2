"""What a command has found out or written, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import ByteSize
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from polydelta.adapters_store.delta import Delta
    from polydelta.adapters_store.nearest_low_rank import Approximation


def facts_table(facts: Mapping[str, str | Text]) -> Table:
    """Names beside their values; strings are shown as they are, without markup."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(escape(name), escape(value) if isinstance(value, str) else value)
    return table


def human_size(nbytes: int) -> str:
    """Such as `1.5MiB`."""
    return ByteSize(nbytes).human_readable()


def truncation_error(total: float, changes: Mapping[str, Approximation[Delta]]) -> str:
    """By how much changes fall short of what they stand for: in total, and the worst module's.
    Rounding to a file's number format comes on top."""
    if not any(change.norm for change in changes.values()):
        return "none: exact but for rounding"
    worst = max(changes, key=lambda module: changes[module].error)
    return f"{total:.2%} of the change is beyond the ranks ({changes[worst].error:.2%} in {worst})"
