"""From a finished upload to a version that can be asked for."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from polydelta.adapters_store.allowance import Allowance
from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.composition import part_gone, sum_digest
from polydelta.adapters_store.disk_tier import DiskTier
from polydelta.adapters_store.errors import InvalidAdapterError, UnknownAdapterError
from polydelta.adapters_store.labels import check_labels
from polydelta.adapters_store.records import AdapterFacts, AdapterRecord, Part, Source
from polydelta.adapters_store.reference import AdapterName, AdapterRef, check_id
from polydelta.adapters_store.store import AdapterStore
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.outline import check_growth, check_outline
from polydelta.adapters_store.upload.staging import StagedAdapter, StagedUpload, Staging

logger = logging.getLogger(__name__)

NO_LIMITS = UploadLimits(
    max_file_bytes=sys.maxsize, max_total_bytes=sys.maxsize, max_rank=sys.maxsize
)


@dataclass(frozen=True)
class Published:
    """What became of an upload."""

    record: AdapterRecord
    # False when the newest version already was what was sent.
    created: bool
    # Files that came along and are not kept.
    ignored: tuple[str, ...] = ()


class Publisher:
    """Makes versions. Threads may share it; adapters are checked one at a time, so that many large
    uploads do not fill the memory together.

    Every method raises InvalidAdapterError for what cannot be served, and StoreError.
    """

    def __init__(
        self,
        store: AdapterStore,
        tier: DiskTier,
        layout: BaseLayout,
        limits: UploadLimits,
        allowed_roots: Sequence[Path] = (),
    ) -> None:
        """allowed_roots: folders below which clients may name paths."""
        self._store = store
        self._tier = tier
        self._layout = layout
        self._limits = limits
        self._allowed_roots = [root.resolve() for root in allowed_roots]
        self._staging = Staging(store.staging_folder, limits)
        self._turn = threading.Lock()

    def begin(self) -> StagedUpload:
        """Where an upload's files go, one after the other."""
        return self._staging.begin()

    def publish(
        self,
        adapter_id: str,
        staged: StagedAdapter,
        labels: Mapping[str, str] | None = None,
        source: Source = Source.UPLOAD,
        allowance: Allowance | None = None,
    ) -> Published:
        """Checks an upload against the base model and makes it the newest version of an id.

        labels: None leaves those of the newest version. Nothing changes when that one has the same
        content; only labels are replaced then, and files that were lost or damaged. allowance: of
        whom it is made for, where that is not the operator. Raises TooLargeError beyond it, and
        beyond the store's quota.
        """
        check_id(adapter_id)
        labels = None if labels is None else check_labels(labels)
        facts = check_outline(staged.folder, self._limits)
        check_growth(staged.folder, self._layout, self._limits)
        with self._turn:
            # First of all: what cannot be served leaves the operator's folder what it is.
            self._check_numbers(adapter_id, staged)
            at_least = self._adopt(adapter_id)
            newest = self._store.catalog.newest(adapter_id)
            # A sum of one part with weight 1 has its part's digest, but no files.
            if newest is not None and newest.digest == staged.digest and not newest.parts:
                self._store.mend(newest, staged.folder)
                newest = self._relabelled(newest, labels)
                return Published(newest, created=False, ignored=staged.ignored)
            record = self._record(
                adapter_id, staged.digest, facts, source, _labels_after(newest, labels)
            )
            added = self._store.add(record, staged.folder, at_least, allowance)
        return Published(added, created=True, ignored=staged.ignored)

    def publish_path(
        self, adapter_id: str, path: str, labels: Mapping[str, str] | None = None
    ) -> Published:
        """As `publish`, of a folder on this machine that lies below one of the allowed roots."""
        folder = self._allowed(path)
        with self.begin() as upload:
            upload.take(folder, self._allowed_roots)
            return self.publish(adapter_id, upload.finish(), labels, Source.PATH)

    def compose(
        self,
        adapter_id: str,
        wanted: Sequence[tuple[str | AdapterName, float]],
        labels: Mapping[str, str] | None = None,
    ) -> Published:
        """Saves a weighted sum under a name of its own; its parts keep the versions of now.

        labels: as in `publish`. Nothing changes when the newest version is the same sum. Raises
        UnknownAdapterError for a part, CompositionError for what cannot be added up.
        """
        check_id(adapter_id)
        labels = None if labels is None else check_labels(labels)
        # The lease comes first: a sum that is refused leaves the operator's folders what they are.
        with self._turn, self._store.lease(wanted) as lease:
            for share in lease.shares:
                self._adopt(share.ref.id)
            parts = [(self._part(share.ref), share.weight) for share in lease.shares]
            record = self._composition(adapter_id, parts)
            at_least = self._adopt(adapter_id)
            newest = self._store.catalog.newest(adapter_id)
            if newest is not None and newest.parts == record.parts:
                return Published(self._relabelled(newest, labels), created=False)
            record = replace(record, labels=_labels_after(newest, labels))
            return Published(self._store.add_composition(record, at_least), created=True)

    def _part(self, ref: AdapterRef) -> AdapterRecord:
        try:
            return self._store.find(AdapterName(ref.id, ref.version))
        except UnknownAdapterError:
            raise part_gone() from None

    def _relabelled(self, record: AdapterRecord, labels: Mapping[str, str] | None) -> AdapterRecord:
        if labels is None or labels == record.labels:
            return record
        return self._store.label(AdapterName(record.id, record.version), labels)

    def _composition(
        self,
        adapter_id: str,
        parts: Sequence[tuple[AdapterRecord, float]],
    ) -> AdapterRecord:
        if not parts:
            raise InvalidAdapterError(
                "compose: the weights add up to nothing, which is the base model: ask for that."
            )
        facts = AdapterFacts(
            format="COMPOSITION",
            kinds=tuple(sorted({kind for part, _ in parts for kind in part.facts.kinds})),
            rank=sum(part.facts.rank for part, _ in parts),
            modules=max(part.facts.modules for part, _ in parts),
            nbytes=0,
        )
        digest = sum_digest([(part.digest, weight) for part, weight in parts])
        record = self._record(adapter_id, digest, facts, Source.COMPOSITION, {})
        saved = tuple(Part(part.id, part.version, weight) for part, weight in parts)
        return replace(record, parts=saved)

    def _record(
        self,
        adapter_id: str,
        digest: str,
        facts: AdapterFacts,
        source: Source,
        labels: Mapping[str, str],
    ) -> AdapterRecord:
        """A record without its version."""
        return AdapterRecord(
            id=adapter_id,
            version=0,
            digest=digest,
            facts=facts,
            base=self._layout.fingerprint,
            created=time.time(),
            source=source,
            labels=labels,
        )

    def _adopt(self, adapter_id: str) -> int:
        """An id that is served from a folder of the operator's moves into the store, so that its
        versions go on counting. Returns the lowest number for the next version."""
        if self._store.catalog.knows(adapter_id):
            return 1
        ref = self._store.folders.find(adapter_id)
        if ref is None:
            return 1
        try:
            # The operator's own folder: as large as it likes, and its links may lead anywhere.
            with Staging(self._store.staging_folder, NO_LIMITS).begin() as upload:
                upload.take(ref.path, [Path("/")])
                staged = upload.finish()
                facts = check_outline(staged.folder, NO_LIMITS)
                self._check_numbers(adapter_id, staged)
                if self._store.folders.find(adapter_id) != ref:
                    raise InvalidAdapterError("its files have changed while they were read")
                record = self._record(adapter_id, staged.digest, facts, Source.ADOPTED, {})
                self._store.add(record, staged.folder, at_least=ref.version)
        except InvalidAdapterError as error:
            logger.warning("the folder of %r is not a version of it: %s", adapter_id, error)
        return ref.version + 1

    def _check_numbers(self, adapter_id: str, staged: StagedAdapter) -> None:
        """Reads the adapter whole, as it is read for serving, and keeps its packed form."""
        if self._tier.holds(staged.digest):
            return
        ref = AdapterRef(adapter_id, 1, staged.folder, digest=staged.digest)
        # On a thread that ends, for the reason given in engine/build.py.
        with ThreadPoolExecutor(max_workers=1) as reading:
            reading.submit(self._tier.prepare, ref).result()

    def _allowed(self, path: str) -> Path:
        """The folder that a client names. Raises InvalidAdapterError, with the same words whether
        a folder outside is there or not."""
        resolved = _resolved(Path(path))
        if resolved is None or not any(
            resolved.is_relative_to(root) for root in self._allowed_roots
        ):
            raise InvalidAdapterError(
                f"path: {path[:200]!r} is not below a folder that clients may name: start the "
                "server with --adapter-root, or upload the files with POST /v1/adapters."
            )
        return resolved


def _labels_after(
    newest: AdapterRecord | None, labels: Mapping[str, str] | None
) -> Mapping[str, str]:
    """Those of a new version, when the client gives `labels` or None."""
    if labels is not None:
        return labels
    return {} if newest is None else newest.labels


def _resolved(path: Path) -> Path | None:
    """Where a client's path leads; None when it can lead nowhere."""
    if not path.is_absolute():
        return None
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # links in a circle, a zero byte, a lone surrogate
        return None
