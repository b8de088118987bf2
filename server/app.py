"""The HTTP application, put together: routes, errors, keys."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI

from polydelta.server.adapters.changes import Changes
from polydelta.server.adapters.lora_routes import lora_router
from polydelta.server.adapters.publishing import Publishing
from polydelta.server.adapters.routes import adapters_router
from polydelta.server.auth import BearerAuth
from polydelta.server.body_limits import BodyLimits
from polydelta.server.draining import Draining
from polydelta.server.errors import install_error_handlers
from polydelta.server.health import health_router
from polydelta.server.lifecycle import Lifecycle, State
from polydelta.server.metrics import CountRefusals, Metrics, metrics_router
from polydelta.server.openai.chat import chat_router
from polydelta.server.openai.completions import completions_router
from polydelta.server.openai.models import models_router
from polydelta.server.service import Service
from polydelta.server.settings import ServerSettings

if TYPE_CHECKING:  # these import torch, which the routes do not need
    from polydelta.adapters_store.store import AdapterStore
    from polydelta.adapters_store.upload.publisher import Publisher
    from polydelta.engine.engine import Engine


def create_app(
    engine: Engine,
    store: AdapterStore,
    publisher: Publisher,
    settings: ServerSettings,
    lifecycle: Lifecycle | None = None,
) -> FastAPI:
    """An application over an engine that the caller starts and shuts down.

    lifecycle: of the server around it; without one, it is always ready.
    """
    lifecycle = lifecycle or Lifecycle(State.READY)
    base_name = settings.served_model_name or engine.model_id
    service = Service(
        engine=engine,
        store=store,
        publisher=publisher,
        metrics=Metrics(
            engine,
            base_name,
            settings.dtype,
            settings.metrics_adapters,
            lambda: lifecycle.ready and engine.alive,
        ),
        base_name=base_name,
        started=int(time.time()),
    )
    store.on_deleted(engine.forget_adapter)
    app = FastAPI(title="PolyDelta", version=version("polydelta"))
    install_error_handlers(app)
    app.include_router(health_router(service, lifecycle))
    app.include_router(metrics_router(service.metrics))
    app.include_router(models_router(service))
    app.include_router(completions_router(service))
    app.include_router(chat_router(service))
    # One for both routers: they bound uploads and checks of the whole server.
    publishing, changes = Publishing(service), Changes(store)
    app.include_router(adapters_router(service, publishing, changes))
    app.include_router(lora_router(service, publishing, changes))
    # Each goes around those before it.
    app.add_middleware(BodyLimits)
    if settings.api_key or settings.tenants:
        keys = [key.get_secret_value() for key in settings.api_key]
        app.add_middleware(BearerAuth, operator_keys=keys, tenants=settings.tenants)
    app.add_middleware(Draining, lifecycle=lifecycle)
    # Around everything else, so that it sees whoever refuses.
    app.add_middleware(CountRefusals, refusals=service.metrics.refusals)
    return app
