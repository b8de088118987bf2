"""What is known of one version of an adapter without opening its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class VersionState(StrEnum):
    READY = "ready"
    # Deleted while somebody used it: it goes when the last of them is done.
    DELETING = "deleting"
    # In a folder of the operator's, and not fit to be served.
    INVALID = "invalid"


class Source(StrEnum):
    """How a version came to be."""

    UPLOAD = "upload"
    # Taken from a folder that a client named.
    PATH = "path"
    ROLLBACK = "rollback"
    # A weighted sum of other versions.
    COMPOSITION = "composition"
    # Served from a folder of the operator's, where it lies: not in the catalog.
    FOLDER = "folder"
    # Taken over from such a folder.
    ADOPTED = "adopted"


@dataclass(frozen=True)
class Part:
    """One version in a saved composition."""

    id: str
    version: int
    weight: float


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter's files say of it."""

    # "LORA", "SHIRA", or "COMPOSITION"
    format: str
    kinds: tuple[str, ...]
    # The largest; 0 when no delta has a rank.
    rank: int
    # Linear layers that it changes.
    modules: int
    # Of its files.
    nbytes: int


@dataclass(frozen=True)
class AdapterRecord:
    """One version of an adapter, as the catalog has it."""

    id: str
    version: int
    # sha256 of the content, in hex; of a composition, of its parts' digests and weights.
    digest: str
    facts: AdapterFacts
    # Fingerprint of the base model that it was checked against.
    base: str
    # Unix time.
    created: float
    source: Source
    labels: Mapping[str, str] = field(default_factory=dict)
    state: VersionState = VersionState.READY
    # Kept in the pool.
    pinned: bool = False
    # Requests so far, and when the latest one began, in Unix time.
    uses: int = 0
    last_used: float | None = None
    # Of a composition; empty for what has files of its own.
    parts: tuple[Part, ...] = ()
    # What would refuse it, when it is invalid.
    problem: str | None = None

    @property
    def name(self) -> str:
        return f"{self.id}@{self.version}"
