"""A console whose tables are whole in logs too."""

from __future__ import annotations

import sys

from rich.console import Console

# Of the widest table there is.
LOG_COLUMNS = 150


def wide_console() -> Console:
    """As wide as the terminal; where there is none, wide enough."""
    return Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
