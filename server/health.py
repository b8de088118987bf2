"""Probes: is the process up, is it ready, which version is it."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from polydelta.server.lifecycle import Lifecycle
from polydelta.server.service import Service
from polydelta.server.unavailable import RETRY_AFTER


def health_router(service: Service, lifecycle: Lifecycle) -> APIRouter:
    """`/health`, `/ping`, `/ready`, `/version`; none of them needs a key."""
    router = APIRouter(tags=["health"])

    @router.get("/health")
    @router.get("/ping")
    async def health() -> Response:
        """200 with an empty body while the engine runs, 503 once it is dead."""
        return Response(status_code=200 if service.engine.alive else 503)

    @router.get("/ready")
    async def ready() -> Response:
        """200 when requests are taken: not while the model loads, nor once a stop is asked for."""
        service.check_alive()
        if lifecycle.ready:
            return JSONResponse(lifecycle.describe())
        return JSONResponse(lifecycle.describe(), 503, headers={"Retry-After": str(RETRY_AFTER)})

    @router.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version("polydelta")}

    return router
