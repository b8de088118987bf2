"""Probes: is the process up, is it ready, which version is it."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Response

from polydelta.server.service import Service


def health_router(service: Service) -> APIRouter:
    """`/health`, `/ping`, `/ready`, `/version`; none of them needs a key."""
    router = APIRouter(tags=["health"])

    @router.get("/health")
    @router.get("/ping")
    async def health() -> Response:
        """200 with an empty body while the engine runs, 503 once it is dead."""
        return Response(status_code=200 if service.engine.alive else 503)

    @router.get("/ready")
    async def ready() -> dict[str, str]:
        """200 when requests are taken; the port opens only after the model has loaded."""
        service.check_alive()
        return {"status": "ready"}

    @router.get("/version")
    async def show_version() -> dict[str, str]:
        return {"version": version("polydelta")}

    return router
