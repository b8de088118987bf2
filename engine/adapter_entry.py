"""Where an adapter is, and what is known of it. Imports no torch."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

from polydelta.adapters_store.errors import AdapterError
from polydelta.adapters_store.traits import AdapterTraits
from polydelta.engine.host_adapter import AdapterPages, HostAdapter

# An adapter in host RAM, and in the pool, ready for the kernels: only the runner looks inside.
Packed = TypeVar("Packed", bound=HostAdapter)
Bound = TypeVar("Bound")


class ResidencyState(Enum):
    ON_DISK = "on disk"
    LOADING_TO_HOST = "loading to host"
    ON_HOST = "on host"
    RESIDENT = "resident"
    FAILED = "failed"


@dataclass(frozen=True)
class AdapterPlace:
    """Where an adapter is."""

    state: ResidencyState
    # Of the pool.
    pages: int = 0
    # Sequences that run with it.
    users: int = 0


@dataclass(frozen=True)
class ResidentAdapter:
    """An adapter in the pool."""

    id: str
    version: int
    pages: int


@dataclass
class AdapterEntry(Generic[Packed, Bound]):
    state: ResidencyState = ResidencyState.ON_DISK
    loading: Future[Packed] | None = None
    # Kept from the end of the load until it is in the pool.
    packed: Packed | None = None
    error: AdapterError | None = None
    # Known once it was loaded.
    digest: str = ""
    traits: AdapterTraits = field(default_factory=AdapterTraits)
    nbytes: int = 0
    size: AdapterPages = field(default_factory=AdapterPages)
    pages: list[int] = field(default_factory=list)
    bound: Bound | None = None
    # Seconds to have it back, where its bytes do not tell: virtual tokens may be computed.
    cost: float | None = None
    # Sequences that run with it, and a pin; idle when 0.
    users: int = 0
    uses: int = 0
    pinned: bool = False
    # The version was deleted: it goes when its last user does.
    doomed: bool = False
