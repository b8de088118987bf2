"""One entry of an archive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Member:
    """A file, or a folder. Read in order: its chunks are there until the next one is asked for."""

    # As the archive has it; not checked.
    name: str
    # All but the last have CHUNK_BYTES; None for a folder.
    chunks: Iterator[bytes] | None
