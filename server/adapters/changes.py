"""Changes to versions that the store has: deleted, labelled, rolled back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from polydelta.adapters_store.labels import check_labels
from polydelta.adapters_store.records import AdapterRecord
from polydelta.adapters_store.reference import AdapterName
from polydelta.server.adapters.errors import adapter_errors
from polydelta.server.errors import ApiError
from polydelta.server.tenants.access import to_change
from polydelta.server.tenants.tenant import Tenant

if TYPE_CHECKING:  # it imports torch, which the routes do not need
    from polydelta.adapters_store.store import AdapterStore


class Changes:
    """What may wait for the catalog or the disk. Every method raises ApiError: 403 for an adapter
    that is not the tenant's to change, 409 for one that is not the store's, but lies in a folder of
    the operator's."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store

    def delete(self, tenant: Tenant, name: str, defer: bool) -> list[AdapterRecord]:
        """One version or all of an id; see AdapterStore.delete."""
        with adapter_errors("id"):
            return self._store.delete(self.own(to_change(tenant, name)), defer, tenant.seen)

    def label(self, tenant: Tenant, name: str, labels: Mapping[str, str]) -> AdapterRecord:
        """The labels that a version has are replaced."""
        with adapter_errors("labels"):
            check_labels(labels)
        with adapter_errors("id"):
            return self._store.label(self.own(to_change(tenant, name)), labels)

    def roll_back(self, tenant: Tenant, name: str, version: int) -> tuple[AdapterRecord, bool]:
        """The newest version, and whether it was made now; see AdapterStore.rollback."""
        with adapter_errors("id"):
            wanted = replace(self.own(without_version(to_change(tenant, name))), version=version)
            self._store.find(wanted)
            before = self._store.catalog.newest(wanted.id)
            record = self._store.rollback(wanted.id, version)
            return record, before is None or before.version != record.version

    def own(self, name: AdapterName) -> AdapterName:
        """The name itself, unless it is that of an adapter in an operator's folder."""
        if not self._store.catalog.knows(name.id) and self._store.folders.find(name.id):
            raise ApiError(
                409,
                f"{name.id!r} is served from a folder of the operator's, which is only read here: "
                "change the folder itself, or upload the adapter under this id first.",
                "id",
            )
        return name


def without_version(name: AdapterName) -> AdapterName:
    """The name itself. Raises ApiError for one with a version."""
    if name.version is not None:
        raise ApiError(
            400, f"id: {str(name)!r} names one version: leave out '@{name.version}'.", "id"
        )
    return name
