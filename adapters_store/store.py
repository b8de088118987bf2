"""The adapter store: uploaded versions and the operator's folders under one set of names.

    DIR/catalog.db     one row for each version (or a database elsewhere)
    DIR/content/       files of each content, by sha256 (or a cache of an object store)
    DIR/packed/        packed forms of contents, by sha256: a cache
    DIR/staging/       uploads under way
    DIR/pending/       a note for each content that is being added or removed

A version appears when its row is committed, after its files are in their place; it goes when its
row does, before its files. What a crash leaves of either goes when the store is opened next.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from sqlalchemy import URL

from polydelta.adapters_store.allowance import Allowance
from polydelta.adapters_store.catalog import Catalog
from polydelta.adapters_store.composition import Share, Shares, check_addable, combine, part_gone
from polydelta.adapters_store.content import ContentStore, LocalContent, RemoteContent
from polydelta.adapters_store.errors import InUseError, StoreError, TooLargeError
from polydelta.adapters_store.file_lock import Presence
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.id_globs import EVERY_ID, matches
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.leases import Lease, Leases
from polydelta.adapters_store.pending import PendingContents
from polydelta.adapters_store.records import AdapterRecord, Source, VersionState
from polydelta.adapters_store.reference import AdapterName, AdapterRef, parse_name, unknown

logger = logging.getLogger(__name__)

# Uses are written to the catalog at most so often, in seconds.
FLUSH_SECONDS = 5.0


@dataclass(frozen=True)
class StoreConfig:
    """Where a store is, and how much it may hold."""

    folder: Path
    # Where contents lie, as fsspec names it; None for the folder itself.
    storage_url: str | None = None
    # The catalog, as SQLAlchemy names it; None for a file in the folder.
    catalog_url: str | None = None
    # Of all uploaded contents together.
    quota_bytes: int = 64 << 30


class AdapterStore:
    """Versions by name: looked up, leased, added, rolled back, deleted. Threads may share it."""

    def __init__(self, config: StoreConfig, folders: FolderCatalog) -> None:
        """Opens the store, and makes it if it is not there. Several processes may have it open;
        the first one sweeps what a crash has left. Raises StoreError."""
        try:
            config.folder.mkdir(parents=True, exist_ok=True)
            local = LocalContent(config.folder / "content")
            self._presence = Presence(config.folder / "open.lock")
        except OSError as error:
            raise StoreError(
                f"The store {str(config.folder)!r} cannot be used ({error.strerror}): name another "
                "folder with --store."
            ) from None
        self.folders = folders
        self._config = config
        try:
            self.content = _content(config, local)
            self.catalog = Catalog(config.catalog_url or _catalog_url(config.folder))
        except BaseException:
            self._presence.close()
            raise
        self._leases = Leases(self._on_idle)
        # Versions to delete when their last user has gone.
        self._doomed: set[AdapterRef] = set()
        self._on_deleted: list[Callable[[AdapterRef], None]] = []
        # Held while rows and leases change together.
        self._names = threading.RLock()
        self._reaper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-reaper")
        self._flushed = time.monotonic()
        # The latest one on the reaper's thread.
        self._flushing: Future[None] | None = None
        try:
            self._pending = PendingContents(
                config.folder / "pending", self.catalog, self.content, self.packed_folder
            )
            if self._presence.alone:
                self._finish_what_was_cut_off(local)
            self._presence.settle()
        except BaseException:
            self.catalog.close()
            self._presence.close()
            raise

    def close(self) -> None:
        """Leases may be released later still. Raises StoreError when uses cannot be written."""
        self._reaper.shutdown()
        try:
            self.flush()
        finally:
            self.catalog.close()
            self._presence.close()

    @property
    def packed_folder(self) -> Path:
        return self._config.folder / "packed"

    @property
    def staging_folder(self) -> Path:
        return self._config.folder / "staging"

    def on_deleted(self, tell: Callable[[AdapterRef], None]) -> None:
        """`tell` is called with each version that is gone, on any thread; it must not wait."""
        self._on_deleted.append(tell)

    def lease(self, wanted: Sequence[tuple[str | AdapterName, float]]) -> Lease:
        """The versions that names and weights mean now; none of them goes before the release.

        Raises UnknownAdapterError, and CompositionError for several that cannot be added up.
        """
        with self._names:
            self._flush_soon()
            found = [(self._resolve(name), weight) for name, weight in wanted]
            shares = [
                Share(share.ref, share.weight * weight)
                for resolved, weight in found
                for share in resolved.shares
            ]
            if len(shares) > 1 or any(share.weight != 1.0 for share in shares):
                for resolved, _ in found:
                    check_addable(resolved.ref.name, resolved.kinds())
            held = dict.fromkeys(
                [resolved.ref for resolved, _ in found] + [share.ref for share in shares]
            )
            name = " + ".join(
                resolved.ref.name if weight == 1.0 else f"{weight:g} {resolved.ref.name}"
                for resolved, weight in found
            )
            return self._leases.take(name, combine(shares), list(held))

    def users(self, record: AdapterRecord) -> int:
        """Requests that use a version now."""
        return self._leases.users(self.ref(record))

    def ref(self, record: AdapterRecord) -> AdapterRef:
        path = self.content.path(record.digest)
        # What is served from a folder has no digest before it is read.
        digest = None if record.source is Source.FOLDER else record.digest
        return AdapterRef(record.id, record.version, path, digest=digest)

    def check_room(self, allowance: Allowance | None = None) -> None:
        """Raises TooLargeError when nothing more can be added, however small."""
        if allowance is not None:
            allowance.check(self.catalog.contents(allowance.ids), more=1)
        total = self.catalog.total_bytes()
        if total >= self._config.quota_bytes:
            raise self._full(f"holds {total} bytes", allowance)

    def add(
        self,
        record: AdapterRecord,
        staged: Path,
        at_least: int = 1,
        allowance: Allowance | None = None,
    ) -> AdapterRecord:
        """Takes over a staged folder as a new version of `record.id`; it is ready at once.

        allowance: of whom it is added for, where that is not the operator.
        The record comes back with its version. Raises TooLargeError beyond a quota.
        """
        nbytes = record.facts.nbytes
        with self._pending.changing([record.digest]):
            if allowance is not None:
                allowance.check(self.catalog.contents(allowance.ids) | {record.digest: nbytes})
            known = self.catalog.has_digest(record.digest)
            total = self.catalog.total_bytes() + (0 if known else nbytes)
            if total > self._config.quota_bytes:
                raise self._full(f"would hold {total} bytes", allowance)
            self.content.add(record.digest, staged)
            return self.catalog.add(record, at_least)

    def mend(self, record: AdapterRecord, staged: Path) -> None:
        """Takes over a staged folder in place of what may be left of the same content."""
        with self._pending.changing([record.digest]):
            if self.catalog.has_digest(record.digest):
                self.content.add(record.digest, staged)

    def add_composition(self, record: AdapterRecord, at_least: int = 1) -> AdapterRecord:
        """Keeps a sum of other versions, none of which can be deleted from then on.

        The record comes back with its version. Raises UnknownAdapterError for a part that has been
        deleted meanwhile.
        """
        with self._names:
            for part in record.parts:
                found = self.catalog.find(part.id, part.version)
                if found is None or found.state is not VersionState.READY:
                    raise part_gone()
            return self.catalog.add(record, at_least)

    def rollback(self, adapter_id: str, version: int) -> AdapterRecord:
        """Makes the content of an older version the newest, as a version with a new number.

        Raises UnknownAdapterError.
        """
        name = AdapterName(adapter_id, version)
        with self._pending.changing([self.find(name).digest]), self._names:
            old = self.find(name)
            if old.state is not VersionState.READY:
                raise unknown(str(name))
            newest = self.catalog.newest(adapter_id)
            if newest is not None and newest.digest == old.digest:
                return newest
            fresh = replace(
                old,
                source=Source.COMPOSITION if old.parts else Source.ROLLBACK,
                created=time.time(),
                pinned=False,
                uses=0,
                last_used=None,
            )
            return self.catalog.add(fresh)

    def delete(
        self, name: AdapterName, defer: bool, seen: Sequence[str] = EVERY_ID
    ) -> list[AdapterRecord]:
        """Deletes one version, or all of an id. With `defer`, those in use go when they no longer
        are, and nobody new gets them meanwhile; without it nothing is deleted then.

        seen: globs of the ids that errors may name.
        The records as they are left; raises UnknownAdapterError, InUseError.
        """
        with self._names:
            records = [
                # Those that are being deleted, and are not in use, are as good as gone.
                record
                for record in self._named(name)
                if record.state is VersionState.READY or self.users(record)
            ]
            if not records:
                raise unknown(str(name))
            self._check_unneeded(records, seen)
            busy = [record for record in records if self.users(record)]
            if busy and not defer:
                raise InUseError(
                    f"{busy[0].name!r} is in use ({self.users(busy[0])} requests): try again when "
                    "they are done, or delete it with in_use=defer."
                )
            for record in records:
                self.catalog.change(record.id, record.version, state=VersionState.DELETING)
            for ref in map(self.ref, busy):
                self._doomed.add(ref)
                if not self._leases.users(ref):  # they were done just now, before it was doomed
                    self._on_idle(ref)
        idle = [record for record in records if record not in busy]
        self._remove(idle)
        return [*idle, *(replace(record, state=VersionState.DELETING) for record in busy)]

    def pin(self, name: AdapterName, pinned: bool) -> AdapterRecord:
        """Notes whether a version is to stay in the pool. Raises UnknownAdapterError."""
        record = self.find(name)
        return self.catalog.change(record.id, record.version, pinned=pinned)

    def label(self, name: AdapterName, labels: Mapping[str, str]) -> AdapterRecord:
        """Gives a version other labels. Raises UnknownAdapterError."""
        record = self.find(name)
        return self.catalog.change(record.id, record.version, labels=dict(labels))

    def find(self, name: AdapterName) -> AdapterRecord:
        """The uploaded version that a name means now. Raises UnknownAdapterError."""
        record = self._find(name)
        if record is None:
            raise unknown(str(name))
        return record

    def resolve(self, name: str | AdapterName) -> AdapterRef:
        """The version that a name means now, uploaded or in a folder. Raises
        UnknownAdapterError."""
        return self._resolve(name).ref

    def ids(self, ids: Sequence[str] = EVERY_ID) -> Iterator[str]:
        """Every id that has a version, uploaded or in a folder, of those that the globs mean;
        folders are looked into one by one, as they are asked for."""
        known, uploaded = self.catalog.known(ids), self.catalog.ready(ids)
        folders = {found for found in self.folders.ids() if matches(found, ids)}
        for adapter_id in sorted((uploaded | folders) - (known - uploaded)):
            if adapter_id in uploaded or self.folders.find(adapter_id) is not None:
                yield adapter_id

    def flush(self) -> None:
        """Writes the uses that were counted since the last time to the catalog. Raises StoreError;
        they are written the next time then."""
        self._flushed = time.monotonic()
        uploaded = [use for use in self._leases.take_uses() if use[0].digest is not None]
        if not uploaded:
            return
        try:
            self.catalog.count_uses(
                (ref.id, ref.version, count, when) for ref, count, when in uploaded
            )
        except BaseException:
            self._leases.put_back(uploaded)
            raise

    def try_to_flush(self) -> None:
        """As `flush`, for whoever can do without: a catalog on a full disk can still be read."""
        try:
            self.flush()
        except StoreError as error:
            logger.warning("uses of adapters will be written later: %s", error)

    def _flush_soon(self) -> None:
        """On a thread of its own: a catalog that cannot be written for a while can still be read,
        which is all that a request needs."""
        if time.monotonic() - self._flushed <= FLUSH_SECONDS:
            return
        if self._flushing is None or self._flushing.done():
            with contextlib.suppress(RuntimeError):  # the store is closed, which has flushed
                self._flushing = self._reaper.submit(self.try_to_flush)

    def _full(self, problem: str, allowance: Allowance | None) -> TooLargeError:
        if allowance is not None:  # what others have in it is not theirs to know
            return TooLargeError("The store has no room for more: ask its operator.")
        return TooLargeError(
            f"The store {problem}, but its quota is {self._config.quota_bytes}: delete versions "
            "that nobody needs."
        )

    def _resolve(self, name: str | AdapterName) -> _Resolved:
        wanted = parse_name(name) if isinstance(name, str) else name
        record = self._find(wanted)
        if record is None and not self.catalog.knows(wanted.id):
            ref = self.folders.resolve(wanted)
            return _Resolved(ref, (Share(ref),), lambda: inspect(ref.path).kinds)
        if record is None or record.state is not VersionState.READY:
            raise unknown(str(wanted))
        kinds = record.facts.kinds
        return _Resolved(self.ref(record), self._shares(record), lambda: kinds)

    def _find(self, name: AdapterName) -> AdapterRecord | None:
        if name.version is None:
            return self.catalog.newest(name.id)
        return self.catalog.find(name.id, name.version)

    def _shares(self, record: AdapterRecord) -> Shares:
        """What the engine computes for a version: itself, or the parts of a composition."""
        if not record.parts:
            return (Share(self.ref(record)),)
        shares: list[Share] = []
        for part in record.parts:
            found = self.catalog.find(part.id, part.version)
            if found is None:
                # Whoever may use the sum need not know of its parts.
                raise unknown(record.name)
            shares.append(Share(self.ref(found), part.weight))
        return tuple(shares)

    def _named(self, name: AdapterName) -> list[AdapterRecord]:
        if name.version is not None:
            return [self.find(name)]
        records = self.catalog.versions(name.id)
        if not records:
            raise unknown(str(name))
        return records

    def _check_unneeded(self, records: Sequence[AdapterRecord], seen: Sequence[str]) -> None:
        """Raises InUseError for a version that a saved composition is made of."""
        names = {(record.id, record.version) for record in records}
        for composition in self.catalog.compositions():
            for part in composition.parts:
                if (part.id, part.version) not in names:
                    continue
                if (composition.id, composition.version) not in names:
                    part_name = f"'{part.id}@{part.version}'"
                    if not matches(composition.id, seen):
                        raise InUseError(f"{part_name} is a part of somebody else's composition.")
                    raise InUseError(
                        f"{part_name} is a part of the composition {composition.name!r}: delete "
                        "that first."
                    )

    def _on_idle(self, ref: AdapterRef) -> None:
        if ref in self._doomed:
            # On a thread of its own: whoever released the last lease must not wait for a disk.
            # A store that is closed takes nothing more; the next one to open it finishes this.
            with contextlib.suppress(RuntimeError):
                self._reaper.submit(self._finish_deletion, ref)

    def _finish_deletion(self, ref: AdapterRef) -> None:
        try:
            record = self.catalog.find(ref.id, ref.version)
            self._doomed.discard(ref)
            if record is not None and record.state is VersionState.DELETING:
                self._remove([record])
        except (StoreError, OSError):
            logger.exception("deleting %s will be finished at the next start", ref.name)

    def _remove(self, records: Sequence[AdapterRecord]) -> None:
        """Versions that nobody can get any more: their rows, what is kept of them in memory, and
        files that no other version has."""
        with self._pending.changing({record.digest for record in records}):
            for record in records:
                self.catalog.remove(record.id, [record.version])
                for tell in self._on_deleted:
                    tell(self.ref(record))

    def _finish_what_was_cut_off(self, local: LocalContent) -> None:
        self._remove(self.catalog.in_state(VersionState.DELETING))
        self._pending.settle_all()
        local.sweep()
        shutil.rmtree(self.staging_folder, ignore_errors=True)
        for part in self.packed_folder.glob("*/.*.part"):
            part.unlink(missing_ok=True)


def _content(config: StoreConfig, local: LocalContent) -> ContentStore:
    return local if config.storage_url is None else RemoteContent(config.storage_url, local)


def _catalog_url(folder: Path) -> URL:
    """A URL of its own, so that a folder's name may have any characters."""
    return URL.create("sqlite", database=str(folder / "catalog.db"))


@dataclass(frozen=True)
class _Resolved:
    """What a name means now."""

    ref: AdapterRef
    shares: Shares
    kinds: Callable[[], Collection[str]]
