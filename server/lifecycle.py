"""Where a server is between its start and its end; probes, routes and metrics ask here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

# Those who watch a server see it to its end, and what they ask is no request that was refused.
PROBES = frozenset({"/health", "/ping", "/ready", "/version", "/metrics"})


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    # A stop was asked for: what is under way may finish, nothing new begins.
    DRAINING = "draining"
    # What has not finished is being ended.
    STOPPED = "stopped"


@dataclass
class Lifecycle:
    """Changed by those who start and stop the server; any thread may read it."""

    state: State = State.LOADING
    # What is done while it loads.
    stage: str = "Starting"
    # Requests that have begun and whose answers have not ended; the event loop counts them.
    in_flight: int = 0

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.state is State.READY

    @property
    def ending(self) -> bool:
        """Whether a stop was asked for."""
        return self.state in (State.DRAINING, State.STOPPED)

    def report(self, stage: str, done: int, total: int | None) -> None:
        """How far the loading is."""
        self.stage = stage if total is None or total < 2 else f"{stage} ({done} of {total})"

    def describe(self) -> dict[str, str]:
        """The body of `/ready`."""
        shown = {"status": self.state.value}
        return shown | {"stage": self.stage} if self.state is State.LOADING else shown
