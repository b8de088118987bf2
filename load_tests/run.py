"""One run of a load test: what the server is started with, and what it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from load_tests.made_adapters import AdapterSet
from load_tests.workload import Workload


@dataclass(frozen=True)
class Run:
    """One server and one workload."""

    name: str
    workload: Workload
    # Of the adapters, in turn, and which linear layers they change: a key of
    # `made_adapters.MODULES`.
    ranks: tuple[int, ...] = (8,)
    modules: str = "attention"
    # Options of `polydelta serve`, one after the other.
    server: tuple[str, ...] = ()
    # Closed loop: requests in flight, whenever the workload would have sent them; None: open loop.
    in_flight: int | None = None
    # Adapters that the server is started with, where that is more than the workload asks for.
    registered: int = 0
    # One token is asked of each of so many adapters before the clock starts, or of those that the
    # workload asks for, so that these are in host memory, as S-LoRA has them from the start. Takes
    # some 20 ms for each, and 100 the first time.
    visits: int | Literal["asked"] = 0
    # Of each tenant that the workload names. `api_key` is sent with what belongs to no tenant:
    # requests without one, and scrapes.
    tenant_keys: tuple[tuple[str, str], ...] = ()
    api_key: str | None = None
    # The first token's bound, and what the second throughput leaves out at both ends; seconds.
    slo_seconds: float = 6.0
    edge_seconds: float = 10.0

    @property
    def adapter_set(self) -> AdapterSet:
        """Adapters that the server is started with."""
        count = max(self.workload.adapters, self.registered)
        return AdapterSet(count, self.ranks, self.modules)
