"""Any history of an adapter store leaves it sound."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from pathlib import Path

from hypothesis import settings, strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from polydelta.adapters_store.errors import InUseError, UnknownAdapterError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.formats.files import content_digest
from polydelta.adapters_store.leases import Lease
from polydelta.adapters_store.records import (
    AdapterFacts,
    AdapterRecord,
    Part,
    Source,
    VersionState,
)
from polydelta.adapters_store.reference import AdapterName
from polydelta.adapters_store.store import AdapterStore, StoreConfig

WEIGHTS = "adapter_model.safetensors"

ids = st.sampled_from(["a", "b"])
texts = st.sampled_from(["one", "two", "three"])
versions = st.integers(1, 5)


class Histories(RuleBasedStateMachine):
    leases = Bundle("leases")

    @initialize()
    def open(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.highest = {"a": 0, "b": 0}
        # The text of each version that was made.
        self.texts: dict[str, str] = {}
        self.gone: set[str] = set()
        self.held: list[Lease] = []
        self.reopen()

    def reopen(self) -> None:
        self.store = AdapterStore(StoreConfig(self.root), FolderCatalog([]))
        self.store.on_deleted(lambda ref: self.gone.add(ref.name))

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    def made(self, record: AdapterRecord, text: str | None) -> None:
        assert record.version > self.highest[record.id], "a number was given twice"
        self.highest[record.id] = record.version
        if text is not None:
            self.texts[record.name] = text

    @rule(adapter_id=ids, text=texts)
    def upload(self, adapter_id: str, text: str) -> None:
        staged = self.store.staging_folder / uuid.uuid4().hex
        staged.mkdir(parents=True)
        (staged / "adapter_config.json").write_text("{}")
        (staged / WEIGHTS).write_text(text)
        facts = AdapterFacts("LORA", ("LowRank",), 1, 1, len(text))
        digest = content_digest(b"{}", text.encode())
        record = AdapterRecord(adapter_id, 0, digest, facts, "base", 1.0, Source.UPLOAD)
        self.made(self.store.add(record, staged), text)

    @rule(adapter_id=ids, part=ids, version=versions)
    def compose(self, adapter_id: str, part: str, version: int) -> None:
        facts = AdapterFacts("COMPOSITION", ("LowRank",), 1, 1, 0)
        parts = (Part(part, version, 0.5),)
        found = self.store.catalog.find(part, version)
        if found is not None and found.parts:
            return  # saved ones are flat
        record = AdapterRecord(
            adapter_id, 0, "c" * 64, facts, "base", 1.0, Source.COMPOSITION, parts=parts
        )
        try:
            self.made(self.store.add_composition(record), None)
        except UnknownAdapterError:
            assert found is None or found.state is VersionState.DELETING

    @rule(adapter_id=ids, version=versions)
    def roll_back(self, adapter_id: str, version: int) -> None:
        newest = self.store.catalog.newest(adapter_id)
        try:
            record = self.store.rollback(adapter_id, version)
        except UnknownAdapterError:
            return
        if record != newest:
            self.made(record, self.texts.get(f"{adapter_id}@{version}"))

    @rule(target=leases, adapter_id=ids, version=st.none() | versions)
    def lease(self, adapter_id: str, version: int | None) -> Lease | None:
        name = str(AdapterName(adapter_id, version))
        try:
            held = self.store.lease([(name, 1.0)])
        except UnknownAdapterError:
            return None
        self.held.append(held)
        return held

    @rule(lease=consumes(leases))
    def release(self, lease: Lease | None) -> None:
        if lease is not None and lease in self.held:
            self.held.remove(lease)
            lease.release()

    @rule(adapter_id=ids, version=st.none() | versions, defer=st.booleans())
    def delete(self, adapter_id: str, version: int | None, defer: bool) -> None:
        before = self.store.catalog.versions(adapter_id)
        try:
            self.store.delete(AdapterName(adapter_id, version), defer)
        except UnknownAdapterError:
            assert all(version not in (None, record.version) for record in before)
        except InUseError:
            assert self.store.catalog.versions(adapter_id) == before

    @precondition(lambda self: not self.held)
    @rule()
    def stop_and_start(self) -> None:
        self.store.close()
        self.reopen()

    @rule()
    def crash_and_start(self) -> None:
        """Whoever held leases is gone with the process."""
        self.held.clear()
        self.store.close()
        self.reopen()

    @invariant()
    def every_ready_version_has_its_files(self) -> None:
        for adapter_id in self.highest:
            for record in self.store.catalog.versions(adapter_id):
                if record.state is VersionState.READY and not record.parts:
                    folder = self.store.content.fetch(record.digest)
                    assert (folder / WEIGHTS).read_text() == self.texts[record.name]

    @invariant()
    def no_content_is_without_a_version(self) -> None:
        end = time.monotonic() + 10
        while True:  # deferred deletions go on a thread of their own
            found = {folder.name for folder in (self.root / "content").iterdir()}
            if found <= self.store.catalog.digests():
                return
            assert time.monotonic() < end, "a content without a version"
            time.sleep(0.002)

    @invariant()
    def an_id_means_its_highest_ready_number(self) -> None:
        for adapter_id in self.highest:
            ready = [
                record.version
                for record in self.store.catalog.versions(adapter_id)
                if record.state is VersionState.READY
            ]
            newest = self.store.catalog.newest(adapter_id)
            assert (newest.version if newest else 0) == max(ready, default=0)

    @invariant()
    def what_is_leased_does_not_go(self) -> None:
        for lease in self.held:
            for ref in lease.held:
                assert ref.name not in self.gone
                assert self.store.catalog.find(ref.id, ref.version) is not None
            for share in lease.shares:
                assert share.ref.digest is not None
                folder = self.store.content.fetch(share.ref.digest)
                assert (folder / WEIGHTS).read_text() == self.texts[share.ref.name]

    @invariant()
    def what_was_deleted_and_is_not_leased_goes(self) -> None:
        held = {ref.name for lease in self.held for ref in lease.held}
        end = time.monotonic() + 10
        while any(
            record.name not in held for record in self.store.catalog.in_state(VersionState.DELETING)
        ):
            assert time.monotonic() < end, "a deleted version stays"
            time.sleep(0.002)

    @invariant()
    def parts_of_compositions_are_there(self) -> None:
        for composition in self.store.catalog.compositions():
            for part in composition.parts:
                found = self.store.catalog.find(part.id, part.version)
                assert found is not None
                assert found.state is VersionState.READY


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
