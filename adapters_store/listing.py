"""All adapters there are, uploaded ones and the operator's folders together, as records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import merge
from itertools import islice

from polydelta.adapters_store.id_globs import EVERY_ID, matches
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.records import AdapterFacts, AdapterRecord, Source, VersionState
from polydelta.adapters_store.reference import AdapterName, AdapterRef
from polydelta.adapters_store.store import AdapterStore

# Records that `all` asks the catalog for at a time.
ALL_PAGE = 500


class AdapterListing:
    """Looks into folders as records are asked for, and into each again only when its files change.

    Threads may share it. Every method raises StoreError.
    """

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        # By id, of the version that was looked into last: the digest takes reading all of it.
        self._folders: dict[str, AdapterRecord] = {}

    def page(
        self,
        after: str,
        limit: int,
        labels: Mapping[str, str],
        kind: str | None,
        ids: Sequence[str] = EVERY_ID,
    ) -> list[AdapterRecord]:
        """The newest ready version of each id that comes after `after`, by id; at most `limit`.

        labels: those that a version must have; a folder has none. kind: one that it must have.
        ids: globs; other ids are left out.
        """
        uploaded = self._store.catalog.page(after, limit, labels, kind, ids)
        folders = iter(()) if labels else self._folder_records(after, kind, ids)
        return list(islice(merge(uploaded, folders, key=lambda record: record.id), limit))

    def all(self) -> Iterator[AdapterRecord]:
        """Everything that `page` has, page by page."""
        after = ""
        while records := self.page(after, ALL_PAGE, {}, None):
            yield from records
            after = records[-1].id

    def record(self, name: AdapterName) -> AdapterRecord:
        """The version that a name means now. Raises UnknownAdapterError."""
        if self._store.catalog.knows(name.id):
            return self._store.find(name)
        return self._folder_record(self._store.folders.resolve(name))

    def ref(self, record: AdapterRecord) -> AdapterRef:
        """What the engine knows the version by. Raises UnknownAdapterError when the files in its
        folder are no longer that version."""
        if self._store.catalog.knows(record.id):
            return self._store.ref(record)
        return self._store.folders.resolve(AdapterName(record.id, record.version))

    def versions(self, name: AdapterName) -> list[AdapterRecord]:
        """All versions of an id, oldest first. Raises UnknownAdapterError."""
        records = self._store.catalog.versions(name.id)
        return records or [self.record(name)]

    def _folder_records(
        self, after: str, kind: str | None, ids: Sequence[str]
    ) -> Iterator[AdapterRecord]:
        known = self._store.catalog.known(ids)
        for adapter_id in self._store.folders.ids():
            if adapter_id <= after or adapter_id in known or not matches(adapter_id, ids):
                continue
            ref = self._store.folders.find(adapter_id)
            if ref is None:
                continue
            record = self._folder_record(ref)
            if kind is None or kind in record.facts.kinds:
                yield record

    def _folder_record(self, ref: AdapterRef) -> AdapterRecord:
        known = self._folders.get(ref.id)
        if known is None or known.version != ref.version:
            known = self._folders[ref.id] = _look_into(ref)
        return known


def _look_into(ref: AdapterRef) -> AdapterRecord:
    summary = inspect(ref.path)
    times = [file[0] for file in ref.signature or () if file is not None]
    return AdapterRecord(
        id=ref.id,
        version=ref.version,
        digest=summary.digest,
        facts=AdapterFacts(
            summary.format,
            summary.kinds,
            max(summary.ranks, default=0),
            modules=summary.modules,
            nbytes=summary.bytes,
        ),
        # It is checked against the base model when it is first used.
        base="",
        created=max(times, default=0) / 1e9,
        source=Source.FOLDER,
        state=VersionState.INVALID if summary.problem else VersionState.READY,
        problem=summary.problem,
    )
