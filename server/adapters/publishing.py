"""New versions over HTTP: from a form, a folder of the server's machine, or other adapters.

The event loop never waits for a disk: files are written, checked and removed on other threads.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from anyio import CancelScope, CapacityLimiter, to_thread
from fastapi import Request

from polydelta.adapters_store.labels import check_labels
from polydelta.adapters_store.reference import check_id
from polydelta.server.adapters.errors import adapter_errors
from polydelta.server.adapters.form import UploadForm
from polydelta.server.adapters.multipart import read_parts
from polydelta.server.adapters.schemas import ComposePart
from polydelta.server.errors import ApiError
from polydelta.server.service import Service
from polydelta.server.tenants.access import (
    allowance_of,
    check_operator,
    check_parts,
    check_upload,
    check_uploads,
    looked_up,
)
from polydelta.server.tenants.tenant import Tenant

if TYPE_CHECKING:  # what checks an upload imports torch, which the routes do not need
    from polydelta.adapters_store.upload.publisher import Published
    from polydelta.adapters_store.upload.staging import StagedUpload

# Threads that write to the disk at the same time, for all uploads together.
DISK_THREADS = 8
# Forms that are taken at the same time. Each may fill --max-upload on the disk, and as much again
# while an archive is unpacked, before the store's quota is asked.
MAX_UPLOADS = 16

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Publishing:
    """Belongs to one event loop at a time. Every method raises ApiError."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._disk = CapacityLimiter(DISK_THREADS)
        # Adapters are checked one at a time anyway; those that wait hold no thread this way.
        self._checks = CapacityLimiter(1)
        self._uploads = 0

    def check_id(self, tenant: Tenant, adapter_id: str) -> str:
        """The id itself, when something can be published as it by the tenant."""
        with adapter_errors("id"):
            check_id(adapter_id)
        if adapter_id == self._service.base_name:
            raise ApiError(400, f"id: {adapter_id!r} is the base model: take another id.", "id")
        check_upload(tenant, adapter_id)
        return adapter_id

    async def from_form(
        self, tenant: Tenant, request: Request, adapter_id: str | None
    ) -> Published:
        """adapter_id: from the path; None when the form has to have it."""
        if adapter_id is not None:
            self.check_id(tenant, adapter_id)
        check_uploads(tenant)
        allowance = allowance_of(tenant)
        with adapter_errors("files"), self._admitted():
            await self._on_disk(self._service.store.check_room, allowance)
            async with self._staged() as upload:
                form = UploadForm(upload, self._on_disk, partial(self.check_id, tenant))
                async with aclosing(read_parts(request)) as pieces:
                    async for piece in pieces:
                        await form.take(piece)
                await form.end_part()
                target = _one_id(adapter_id, form.id)
                staged = await self._on_disk(upload.finish)
                publish = partial(self._service.publisher.publish, allowance=allowance)
                return await self._checked(publish, target, staged, form.labels)

    async def from_path(
        self,
        tenant: Tenant,
        adapter_id: str,
        path: str,
        labels: Mapping[str, str] | None,
        param: str = "path",
    ) -> Published:
        """From a folder of the server's machine, for operators. param: the request's field that has
        it."""
        check_operator(tenant, param)
        self._check(tenant, adapter_id, labels)
        with adapter_errors(param):
            return await self._checked(
                self._service.publisher.publish_path, adapter_id, path, labels
            )

    async def from_parts(
        self,
        tenant: Tenant,
        adapter_id: str,
        parts: Sequence[ComposePart],
        labels: Mapping[str, str] | None,
    ) -> Published:
        """A weighted sum of other adapters."""
        self._check(tenant, adapter_id, labels)
        with adapter_errors("compose"):
            wanted = [(looked_up(tenant, part.id), part.weight) for part in parts]

            def compose() -> Published:
                check_parts(tenant, self._service.store, (name for name, _ in wanted))
                return self._service.publisher.compose(adapter_id, wanted, labels)

            return await self._checked(compose)

    def _check(self, tenant: Tenant, adapter_id: str, labels: Mapping[str, str] | None) -> None:
        self.check_id(tenant, adapter_id)
        with adapter_errors("labels"):
            check_labels(labels or {})

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        if self._uploads >= MAX_UPLOADS:
            raise ApiError(
                503, f"{self._uploads} uploads are under way, which is all: try again in a while."
            )
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    @asynccontextmanager
    async def _staged(self) -> AsyncIterator[StagedUpload]:
        stack = ExitStack()
        try:
            yield await self._on_disk(lambda: stack.enter_context(self._service.publisher.begin()))
        finally:
            # Whatever has ended the request, its files go.
            with CancelScope(shield=True):
                await self._on_disk(stack.close)

    async def _on_disk(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        with _disk_errors():
            return await to_thread.run_sync(work, *args, limiter=self._disk)

    async def _checked(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        with _disk_errors():
            return await to_thread.run_sync(work, *args, limiter=self._checks)


def _one_id(from_path: str | None, from_form: str | None) -> str:
    """Raises ApiError when there is none, or two that differ."""
    adapter_id = from_form if from_path is None else from_path
    if adapter_id is None:
        raise ApiError(400, "id: this field is required.", "id")
    if from_form not in (None, adapter_id):
        raise ApiError(
            400, f"id: the form has {from_form!r}, but the path {from_path!r}: leave one out.", "id"
        )
    return adapter_id


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A full disk is not the client's fault, but the client should know."""
    try:
        yield
    except OSError as error:
        raise ApiError(
            503, f"The server's disk does not take the upload ({error.strerror})."
        ) from error
