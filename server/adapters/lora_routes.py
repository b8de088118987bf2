"""`/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, as vLLM has them."""

from __future__ import annotations

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import PlainTextResponse

from polydelta.adapters_store.errors import UnknownAdapterError
from polydelta.adapters_store.reference import is_id
from polydelta.server.adapters.changes import Changes
from polydelta.server.adapters.errors import adapter_errors
from polydelta.server.adapters.publishing import Publishing
from polydelta.server.adapters.schemas import LoadLora, UnloadLora
from polydelta.server.errors import ApiError, shown
from polydelta.server.service import Service
from polydelta.server.tenants.access import operators_only
from polydelta.server.tenants.tenant import tenant_of


def lora_router(service: Service, publishing: Publishing, changes: Changes) -> APIRouter:
    router = APIRouter(tags=["adapters"], default_response_class=PlainTextResponse)

    @router.post("/v1/load_lora_adapter", dependencies=[Depends(operators_only)])
    async def load_lora_adapter(body: LoadLora, request: Request) -> str:
        """Takes an adapter over from a folder of this machine, below one of --adapter-root.

        It is a version like an uploaded one, checked and copied; the folder may change afterwards.
        """
        name = body.lora_name
        if not is_id(name):
            raise ApiError(
                400,
                f"lora_name: {shown(name)} is no adapter id: use 1 to 128 letters, digits, dots, "
                "hyphens and underscores, a letter or digit first.",
                "lora_name",
            )
        if not body.load_inplace and await to_thread.run_sync(_is_there, service, name):
            raise ApiError(
                400,
                f"lora_name: the adapter {name!r} has already been loaded: set load_inplace to "
                "true for a new version of it.",
                "lora_name",
            )
        await publishing.from_path(
            tenant_of(request), name, body.lora_path, None, param="lora_path"
        )
        return f"Success: LoRA adapter '{name}' added successfully."

    @router.post("/v1/unload_lora_adapter")
    def unload_lora_adapter(body: UnloadLora, request: Request) -> str:
        """Deletes all versions of an adapter; those in use go when their requests are done."""
        changes.delete(tenant_of(request), body.lora_name, defer=True)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    return router


def _is_there(service: Service, name: str) -> bool:
    """Raises ApiError when the catalog does not answer."""
    with adapter_errors("lora_name"):
        try:
            service.store.resolve(name)
        except UnknownAdapterError:
            return False
    return True
