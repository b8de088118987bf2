"""`/v1/models`: the base model, and each adapter as a model whose parent is the base."""

from __future__ import annotations

from fastapi import APIRouter, Request

from polydelta.server.adapters.errors import adapter_errors
from polydelta.server.openai.responses import ModelCard, ModelList
from polydelta.server.service import Service
from polydelta.server.tenants.tenant import tenant_of

OWNER = "polydelta"


def models_router(service: Service) -> APIRouter:
    router = APIRouter(tags=["openai"])

    # Plain functions: FastAPI runs them in a thread, where reading many folders holds up nobody.
    @router.get("/v1/models")
    def list_models(request: Request) -> ModelList:
        """The base model first, then the adapters as the catalog finds them now: those that the key
        may use."""
        with adapter_errors():
            ids = service.store.ids(tenant_of(request).seen)
            adapters = [_card(service, adapter_id) for adapter_id in ids]
        return ModelList(object="list", data=[_card(service, service.base_name), *adapters])

    @router.get("/v1/models/{name:path}")
    def show_model(name: str, request: Request) -> ModelCard:
        """One model by the name that requests use: the base, `adapter` or `adapter@version`."""
        service.resolve(tenant_of(request), name)
        return _card(service, name)

    return router


def _card(service: Service, name: str) -> ModelCard:
    base = service.base_name
    return ModelCard(
        id=name,
        object="model",
        created=service.started,
        owned_by=OWNER,
        root=name,
        parent=None if name == base else base,
        max_model_len=service.engine.max_model_len,
        permission=[],
    )
