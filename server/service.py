"""What every route works with, in one place; made once by `create_app`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from polydelta.adapters_store.catalog import AdapterCatalog, AdapterRef
from polydelta.adapters_store.errors import UnknownAdapterError
from polydelta.server.errors import ApiError
from polydelta.server.metrics import Metrics

if TYPE_CHECKING:  # the engine imports torch, which the routes do not need
    from polydelta.engine.engine import Engine


@dataclass(frozen=True)
class Service:
    """The engine, the adapters that can be asked for, and what is measured."""

    engine: Engine
    catalog: AdapterCatalog
    metrics: Metrics
    # What clients call the base model.
    base_name: str
    # Unix time; the `created` of the model cards.
    started: int

    def check_alive(self) -> None:
        """Raises ApiError 503 once the engine has stopped."""
        if not self.engine.alive:
            raise ApiError(503, "The engine has stopped and takes no requests.")

    def resolve(self, name: str) -> AdapterRef | None:
        """The adapter that a `model` field names; None for the base model. Raises ApiError."""
        if name == self.base_name:
            return None
        try:
            return self.catalog.resolve(name)
        except UnknownAdapterError as error:
            raise ApiError(404, f"model: {error}", "model") from None
