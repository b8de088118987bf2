"""What a command has found out or written, for people."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ByteSize
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def facts_table(facts: Mapping[str, str | Text]) -> Table:
    """Names beside their values; strings are shown as they are, without markup."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(escape(name), escape(value) if isinstance(value, str) else value)
    return table


def human_size(nbytes: int) -> str:
    """Such as `1.5MiB`."""
    return ByteSize(nbytes).human_readable()
