"""What every route works with, in one place; made once by `create_app`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polydelta.adapters_store.leases import Lease
from polydelta.adapters_store.reference import AdapterRef
from polydelta.server.adapters.errors import adapter_errors
from polydelta.server.errors import ApiError
from polydelta.server.metrics import Metrics
from polydelta.server.tenants.access import looked_up
from polydelta.server.tenants.limits import Budgets
from polydelta.server.tenants.tenant import Tenant

if TYPE_CHECKING:  # these import torch, which the routes do not need
    from polydelta.adapters_store.store import AdapterStore
    from polydelta.adapters_store.upload.publisher import Publisher
    from polydelta.engine.engine import Engine


@dataclass(frozen=True)
class Service:
    """The engine, the adapters that can be asked for, and what is measured."""

    engine: Engine
    store: AdapterStore
    publisher: Publisher
    metrics: Metrics
    # What clients call the base model.
    base_name: str
    # Unix time; the `created` of the model cards.
    started: int
    # What tenants may still have.
    budgets: Budgets = field(default_factory=Budgets)

    def check_alive(self) -> None:
        """Raises ApiError 503 once the engine has stopped."""
        if not self.engine.alive:
            raise ApiError(503, "The engine has stopped and takes no requests.")

    def resolve(self, tenant: Tenant, name: str) -> AdapterRef | None:
        """The adapter that a name means to a tenant now; None for the base model. Raises
        ApiError."""
        if name == self.base_name:
            return None
        with adapter_errors("model"):
            return self.store.resolve(looked_up(tenant, name))

    async def lease(
        self, tenant: Tenant, model: str, adapters: Sequence[tuple[str, float]]
    ) -> Lease:
        """The adapters that a tenant's `model` and `adapters` mean, in use until it is released.

        Raises ApiError.
        """
        if model == self.base_name and not adapters:
            return Lease(model, (), (), lambda: None)
        if model != self.base_name and adapters:
            raise ApiError(
                400,
                f"model: with the field adapters it must be the base model, {self.base_name!r}; "
                "put the adapter into the list.",
                "model",
            )
        with adapter_errors("adapters" if adapters else "model"):
            named = adapters or [(model, 1.0)]
            wanted = [(looked_up(tenant, name), weight) for name, weight in named]
            # The catalog is a database: the loop does not wait for it.
            return await asyncio.to_thread(self.store.lease, wanted)
