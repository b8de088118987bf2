"""Uploads and the operator's folders in one list."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polydelta.adapters_store import listing as module
from polydelta.adapters_store.errors import UnknownAdapterError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.formats.files import folder_digest
from polydelta.adapters_store.listing import AdapterListing
from polydelta.adapters_store.records import AdapterFacts, AdapterRecord, Source, VersionState
from polydelta.adapters_store.reference import AdapterName
from polydelta.adapters_store.store import AdapterStore, StoreConfig


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    """Its folders are those of `adapter_files`."""
    store = AdapterStore(StoreConfig(tmp_path / ".store"), FolderCatalog([tmp_path]))
    yield store
    store.close()


@pytest.fixture
def listing(store: AdapterStore) -> AdapterListing:
    return AdapterListing(store)


def add(store: AdapterStore, adapter_id: str, **labels: str) -> AdapterRecord:
    """A version in the catalog, without files."""
    facts = AdapterFacts("SHIRA", ("Sparse",), rank=0, modules=1, nbytes=7)
    return store.catalog.add(
        AdapterRecord(adapter_id, 0, "d" * 64, facts, "base", 1.0, Source.UPLOAD, labels)
    )


def names(records: list[AdapterRecord]) -> list[str]:
    return [record.name for record in records]


def all_of(listing: AdapterListing, **filters: Any) -> list[str]:
    return names(listing.page(**{"after": "", "limit": 100, "labels": {}, "kind": None} | filters))


def test_a_folder_is_a_record(listing: AdapterListing, adapter_files: Any) -> None:
    folder = adapter_files.lora("one", r=2)
    record = listing.record(AdapterName("one"))
    assert record == listing.record(AdapterName("one", 1))
    assert (record.name, record.source, record.state) == ("one@1", Source.FOLDER, "ready")
    assert record.digest == folder_digest(folder)
    assert record.facts.kinds == ("LowRank",)
    assert (record.facts.rank, record.facts.modules) == (2, 1)
    assert record.facts.nbytes == sum(file.stat().st_size for file in folder.iterdir())
    newest = max(file.stat().st_mtime for file in folder.iterdir())
    assert record.created == pytest.approx(newest, abs=1e-3)
    assert listing.ref(record).path == folder


def test_a_folder_that_cannot_be_served_is_listed_with_its_problem(
    listing: AdapterListing, adapter_files: Any
) -> None:
    folder = adapter_files.lora("broken")
    (folder / "adapter_model.safetensors").unlink()
    (record,) = listing.page("", 10, {}, None)
    assert record.state is VersionState.INVALID
    assert "adapter_model.safetensors is missing" in str(record.problem)
    assert record.digest == ""


def test_a_folder_is_looked_into_again_only_when_its_files_change(
    listing: AdapterListing, adapter_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def inspect(path: Path) -> Any:
        looked.append(path.name)
        return original(path)

    original = module.inspect
    monkeypatch.setattr(module, "inspect", inspect)
    adapter_files.lora("a")
    adapter_files.shira("b")
    first = listing.page("", 10, {}, None)
    assert listing.page("", 10, {}, None) == first
    assert looked == ["a", "b"]
    adapter_files.lora("a", lora_alpha=9)
    changed = listing.record(AdapterName("a"))
    assert (changed.version, looked) == (2, ["a", "b", "a"])
    assert changed.digest != first[0].digest
    with pytest.raises(UnknownAdapterError, match="no version 1"):
        listing.ref(first[0])


def test_uploads_and_folders_come_in_one_order_and_in_pages(
    listing: AdapterListing, store: AdapterStore, adapter_files: Any
) -> None:
    # By character, not as people sort: capitals, digits and signs are where they are in ASCII.
    for adapter_id in ("b", "B1", "b-2", "b.9"):
        adapter_files.lora(adapter_id)
    for adapter_id in ("b_1", "A", "b0", "b-10"):
        add(store, adapter_id)
    everything = ["A", "B1", "b", "b-10", "b-2", "b.9", "b0", "b_1"]
    assert all_of(listing) == [f"{adapter_id}@1" for adapter_id in everything]
    seen: list[str] = []
    while page := listing.page(seen[-1] if seen else "", 3, {}, None):
        assert len(page) == min(3, len(everything) - len(seen))
        seen += [record.id for record in page]
    assert seen == everything


def test_an_id_that_the_catalog_knows_is_not_listed_from_its_folder(
    listing: AdapterListing, store: AdapterStore, adapter_files: Any
) -> None:
    adapter_files.lora("a")
    add(store, "a")
    add(store, "a")
    assert all_of(listing) == ["a@2"]
    assert names(listing.versions(AdapterName("a"))) == ["a@1", "a@2"]
    assert listing.record(AdapterName("a")).source is Source.UPLOAD
    store.catalog.remove("a", [1, 2])
    assert all_of(listing) == []
    with pytest.raises(UnknownAdapterError):
        listing.record(AdapterName("a"))
    with pytest.raises(UnknownAdapterError):
        listing.versions(AdapterName("a"))


def test_a_page_is_filtered_by_kind_and_by_labels(
    listing: AdapterListing, store: AdapterStore, adapter_files: Any
) -> None:
    adapter_files.lora("a")
    adapter_files.shira("c")
    add(store, "b", team="x")
    assert all_of(listing, kind="Sparse") == ["b@1", "c@1"]
    assert all_of(listing, kind="Sparse", limit=1) == ["b@1"]
    assert all_of(listing, kind="LowRank") == ["a@1"]
    assert all_of(listing, labels={"team": "x"}) == ["b@1"]
    assert all_of(listing, labels={"team": "y"}) == []


def test_a_folder_that_goes_is_no_longer_listed(
    listing: AdapterListing, adapter_files: Any
) -> None:
    folder = adapter_files.lora("a")
    assert all_of(listing) == ["a@1"]
    shutil.rmtree(folder)
    assert all_of(listing) == []
    with pytest.raises(UnknownAdapterError):
        listing.record(AdapterName("a"))
