"""The pages that sequences begin with a copy of. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PageCopy:
    """An adapter's last virtual tokens, where these do not fill a page, into the first page of a
    sequence that begins."""

    source: int
    target: int
    # Of the sequence, whose open page has them where the format is by page.
    slot: int
    num_tokens: int
