from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from polydelta.adapters_store import store as store_module
from polydelta.adapters_store.allowance import Allowance
from polydelta.adapters_store.errors import (
    CompositionError,
    InUseError,
    StoreError,
    TooLargeError,
    UnknownAdapterError,
)
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
from polydelta.adapters_store.reference import AdapterName, AdapterRef
from polydelta.adapters_store.store import AdapterStore, StoreConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TIMEOUT = 30

Open = Callable[..., AdapterStore]


def facts(nbytes: int, *kinds: str) -> AdapterFacts:
    return AdapterFacts("LORA", kinds or ("LowRank",), rank=1, modules=1, nbytes=nbytes)


def write(folder: Path, text: str) -> str:
    """The smallest files, and their digest."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_text(text)
    return content_digest(b"{}", text.encode())


def add(
    store: AdapterStore,
    adapter_id: str,
    text: str = "x",
    *kinds: str,
    at_least: int = 1,
    allowance: Allowance | None = None,
) -> AdapterRecord:
    """As the publisher does, without looking into the files."""
    staged = store.staging_folder / uuid.uuid4().hex
    digest = write(staged, text)
    record = AdapterRecord(
        adapter_id, 0, digest, facts(len(text), *kinds), "base", time.time(), Source.UPLOAD
    )
    return store.add(record, staged, at_least, allowance)


def compose(store: AdapterStore, adapter_id: str, *parts: Part) -> AdapterRecord:
    return store.add_composition(
        AdapterRecord(
            adapter_id, 0, "c" * 64, facts(0), "base", 1.0, Source.COMPOSITION, parts=parts
        )
    )


def text_of(store: AdapterStore, ref: AdapterRef) -> str:
    assert ref.digest is not None
    return (store.content.fetch(ref.digest) / WEIGHTS).read_text()


def lease(store: AdapterStore, *names: str | tuple[str, float]) -> Lease:
    return store.lease([name if isinstance(name, tuple) else (name, 1.0) for name in names])


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.005)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """The operator's."""
    (tmp_path / "folders").mkdir()
    return tmp_path / "folders"


@pytest.fixture
def open_store(root: Path, folders: Path) -> Iterator[Open]:
    stores: list[AdapterStore] = []

    def open_store(**config: Any) -> AdapterStore:
        stores.append(AdapterStore(StoreConfig(root, **config), FolderCatalog([folders])))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def store(open_store: Open) -> AdapterStore:
    return open_store()


@pytest.fixture
def told(store: AdapterStore) -> list[str]:
    """Names of versions that were told to be gone."""
    names: list[str] = []
    store.on_deleted(lambda ref: names.append(ref.name))
    return names


def contents(root: Path) -> set[str]:
    return {path.name for path in (root / "content").iterdir()}


# Names and leases


def test_an_id_means_the_newest_version_and_a_number_that_one(store: AdapterStore) -> None:
    for text in ("one", "two"):
        add(store, "a", text)
    assert [store.resolve(name).name for name in ("a", "a@1", "a@2")] == ["a@2", "a@1", "a@2"]
    assert [text_of(store, store.resolve(name)) for name in ("a", "a@1")] == ["two", "one"]


@pytest.mark.parametrize("name", ["b", "a@2", "a@0", "a@", "../a", ""])
def test_a_name_of_nothing_is_unknown(store: AdapterStore, name: str) -> None:
    add(store, "a")
    with pytest.raises(UnknownAdapterError, match=r"There is no adapter"):
        store.resolve(name)
    with pytest.raises(UnknownAdapterError):
        lease(store, name)


def test_a_lease_is_the_version_of_its_moment_after_a_new_upload(store: AdapterStore) -> None:
    add(store, "a", "one")
    old = lease(store, "a")
    add(store, "a", "two")
    new = lease(store, "a")
    assert (old.name, new.name) == ("a@1", "a@2")
    assert [text_of(store, each.shares[0].ref) for each in (old, new)] == ["one", "two"]


def test_a_sum_is_named_as_it_was_asked_for_and_computed_in_canonical_order(
    store: AdapterStore,
) -> None:
    for name in ("a", "b"):
        add(store, name)
    found = lease(store, ("b", 0.5), "a", ("b@1", 0.25))
    assert found.name == "0.5 b@1 + a@1 + 0.25 b@1"
    assert [share.name for share in found.shares] == ["a@1", "b@1*0.75"]
    assert {ref.name for ref in found.held} == {"a@1", "b@1"}
    assert store.users(store.find(AdapterName("b"))) == 1


def test_what_weighs_nothing_is_not_computed_but_held(store: AdapterStore) -> None:
    add(store, "a")
    found = lease(store, ("a", 0.0))
    assert (found.shares, [ref.name for ref in found.held]) == ((), ["a@1"])


def test_kinds_that_cannot_be_added_are_leased_alone_and_refused_in_a_sum(
    store: AdapterStore,
) -> None:
    add(store, "turn", "x", "Rotate")
    add(store, "a")
    assert lease(store, "turn").name == "turn@1"
    for wanted in (["turn", "a"], [("turn", 0.5)]):
        with pytest.raises(CompositionError, match=r"'turn@1' has deltas of kind Rotate"):
            lease(store, *wanted)  # type: ignore[misc]


def test_a_refused_sum_holds_nobody(store: AdapterStore) -> None:
    record = add(store, "a")
    with pytest.raises(UnknownAdapterError):
        lease(store, "a", "missing")
    with pytest.raises(CompositionError):
        lease(store, ("a", float("nan")))
    assert store.users(record) == 0


def test_a_folder_of_the_operators_is_leased_by_its_id(store: AdapterStore, folders: Path) -> None:
    write(folders / "own", "own")
    found = lease(store, "own")
    assert (found.name, found.shares[0].ref.path) == ("own@1", folders / "own")
    assert list(store.ids()) == ["own"]


def test_an_upload_goes_before_a_folder_of_the_same_id(store: AdapterStore, folders: Path) -> None:
    write(folders / "a", "folder")
    assert store.resolve("a").digest is None
    add(store, "a", "upload", at_least=2)
    assert store.resolve("a").name == "a@2"
    assert text_of(store, store.resolve("a")) == "upload"
    with pytest.raises(UnknownAdapterError):
        store.resolve("a@1")


def test_a_deleted_id_does_not_fall_back_to_the_folder(store: AdapterStore, folders: Path) -> None:
    write(folders / "a", "folder")
    add(store, "a")
    store.delete(AdapterName("a"), defer=False)
    for name in ("a", "a@1"):
        with pytest.raises(UnknownAdapterError):
            store.resolve(name)
    assert list(store.ids()) == []


def test_ids_are_those_of_uploads_and_folders_together(store: AdapterStore, folders: Path) -> None:
    for name in ("b", "both"):
        add(store, name)
    for name in ("a", "both", "c"):
        write(folders / name, name)
    (folders / "empty").mkdir()
    assert list(store.ids()) == ["a", "b", "both", "c"]


# Uploads


def test_identical_content_is_stored_once_and_goes_with_its_last_version(
    store: AdapterStore, root: Path
) -> None:
    records = [add(store, name, "same") for name in ("a", "b", "a")]
    assert contents(root) == {records[0].digest}
    store.delete(AdapterName("a"), defer=False)
    assert text_of(store, store.resolve("b")) == "same"
    store.delete(AdapterName("b"), defer=False)
    assert contents(root) == set()


def test_beyond_the_quota_an_upload_is_refused_and_leaves_nothing(
    open_store: Open, root: Path
) -> None:
    store = open_store(quota_bytes=10)
    kept = add(store, "a", "12345678")
    with pytest.raises(TooLargeError, match=r"would hold 11 bytes, but its quota is 10: delete"):
        add(store, "b", "123")
    assert contents(root) == {kept.digest}
    assert list(store.ids()) == ["a"]
    assert not store.catalog.knows("b")
    # The same content takes no more room, and what is deleted gives its room back.
    add(store, "b", "12345678")
    add(store, "c", "12")
    store.delete(AdapterName("c"), defer=False)
    add(store, "d", "ab")


def test_a_store_has_room_until_its_quota_is_used_up(open_store: Open) -> None:
    store = open_store(quota_bytes=10)
    add(store, "a", "123456789")
    store.check_room()
    add(store, "b", "1")
    with pytest.raises(TooLargeError, match=r"holds 10 bytes, but its quota is 10: delete"):
        store.check_room()


def test_an_allowance_counts_each_content_of_its_ids_once(store: AdapterStore) -> None:
    mine = Allowance(("my-*", "x"), quota_bytes=10)
    add(store, "others", "0123456789")
    add(store, "my-a", "12345", allowance=mine)
    add(store, "my-b", "12345", allowance=mine)
    add(store, "x", "123", allowance=mine)
    # A sum has no files, though it may have the digest of one.
    compose(store, "my-sum", Part("my-a", 1, 1.0))
    with pytest.raises(TooLargeError, match="would take 18 bytes, but your quota is 10: delete"):
        add(store, "my-c", "0123456789", allowance=mine)
    with pytest.raises(TooLargeError, match="would take 11 bytes"):
        add(store, "my-c", "abc", allowance=mine)
    store.check_room(mine)
    add(store, "my-c", "ab", allowance=mine)
    with pytest.raises(TooLargeError, match="would take 11 bytes"):
        store.check_room(mine)
    # What the operator adds is not refused, but counts.
    add(store, "my-c", "operators'")
    store.delete(AdapterName("my-c"), defer=False)
    add(store, "my-c", "ab", allowance=mine)
    assert list(store.ids(mine.ids)) == ["my-a", "my-b", "my-c", "my-sum", "x"]


def test_an_allowance_without_a_quota_ends_with_the_store_in_silence(open_store: Open) -> None:
    store = open_store(quota_bytes=10)
    mine = Allowance(("my-*",))
    add(store, "others", "0123")
    for text in ("01234567", "012345678"):
        with pytest.raises(TooLargeError, match=r"^The store has no room for more: ask its"):
            add(store, "my-a", text, allowance=mine)
    add(store, "my-a", "abcdef", allowance=mine)
    with pytest.raises(TooLargeError, match=r"^The store has no room for more: ask its"):
        store.check_room(mine)


def test_a_conflict_names_what_may_be_seen(store: AdapterStore) -> None:
    add(store, "a")
    compose(store, "secret", Part("a", 1, 1.0))
    with pytest.raises(InUseError, match=r"^'a@1' is a part of somebody else's composition.$"):
        store.delete(AdapterName("a"), defer=True, seen=("a", "b*"))
    with pytest.raises(InUseError, match="'secret@1': delete that first"):
        store.delete(AdapterName("a"), defer=True, seen=("a", "s*"))


def test_contents_that_are_gone_are_mended_by_the_same_files(
    store: AdapterStore, tmp_path: Path
) -> None:
    record = add(store, "a", "text")
    shutil.rmtree(store.content.path(record.digest))
    write(tmp_path / "again", "text")
    store.mend(record, tmp_path / "again")
    assert text_of(store, store.ref(record)) == "text"


def test_contents_of_a_deleted_version_are_not_mended(
    store: AdapterStore, tmp_path: Path, root: Path
) -> None:
    record = add(store, "a", "text")
    store.delete(AdapterName("a"), defer=False)
    write(tmp_path / "again", "text")
    store.mend(record, tmp_path / "again")
    assert contents(root) == set()


def test_a_rollback_is_a_new_version_with_the_old_content(store: AdapterStore) -> None:
    add(store, "a", "one")
    store.label(AdapterName("a", 1), {"team": "x"})
    store.pin(AdapterName("a", 1), True)
    add(store, "a", "two")
    back = store.rollback("a", 1)
    assert (back.name, back.source, back.labels, back.pinned) == (
        "a@3",
        Source.ROLLBACK,
        {"team": "x"},
        False,
    )
    assert text_of(store, store.resolve("a")) == "one"
    assert store.rollback("a", 1) == store.rollback("a", 3) == back


@pytest.mark.parametrize(("adapter_id", "version"), [("a", 2), ("b", 1)])
def test_a_rollback_to_nothing_is_unknown(
    store: AdapterStore, adapter_id: str, version: int
) -> None:
    add(store, "a")
    with pytest.raises(UnknownAdapterError):
        store.rollback(adapter_id, version)


def test_a_rollback_to_what_is_being_deleted_is_unknown(store: AdapterStore) -> None:
    for text in ("one", "two"):
        add(store, "a", text)
    held = lease(store, "a@1")
    store.delete(AdapterName("a", 1), defer=True)
    with pytest.raises(UnknownAdapterError):
        store.rollback("a", 1)
    held.release()


def test_a_rollback_after_the_newest_was_deleted_gets_a_number_of_its_own(
    store: AdapterStore,
) -> None:
    for text in ("one", "two", "three"):
        add(store, "a", text)
    store.delete(AdapterName("a", 3), defer=False)
    assert store.resolve("a").version == 2
    assert store.rollback("a", 1).version == 4


# Deletion


def test_a_deleted_version_is_gone_with_its_files_and_told_once(
    store: AdapterStore, told: list[str], root: Path
) -> None:
    gone, kept = add(store, "a", "one"), add(store, "a", "two")
    for record in (gone, kept):
        (store.packed_folder / record.digest).mkdir(parents=True)
    assert store.delete(AdapterName("a", 1), defer=False) == [gone]
    assert told == ["a@1"]
    assert contents(root) == {path.name for path in store.packed_folder.iterdir()} == {kept.digest}
    assert store.resolve("a").version == 2
    with pytest.raises(UnknownAdapterError):
        store.delete(AdapterName("a", 1), defer=False)


def test_deleting_the_newest_gives_the_id_to_the_one_before(store: AdapterStore) -> None:
    for text in ("one", "two"):
        add(store, "a", text)
    store.delete(AdapterName("a", 2), defer=False)
    assert store.resolve("a").version == 1
    assert add(store, "a", "three").version == 3


def test_an_id_alone_deletes_all_its_versions_and_no_others(
    store: AdapterStore, told: list[str]
) -> None:
    for name in ("a", "b", "a"):
        add(store, name, uuid.uuid4().hex)
    store.delete(AdapterName("a"), defer=False)
    assert sorted(told) == ["a@1", "a@2"]
    assert list(store.ids()) == ["b"]
    assert add(store, "a").version == 3


def test_deleting_what_is_in_use_is_refused_and_deletes_nothing(
    store: AdapterStore, told: list[str]
) -> None:
    for text in ("one", "two"):
        add(store, "a", text)
    held = lease(store, "a@1")
    with pytest.raises(InUseError, match=r"'a@1' is in use \(1 requests\).*in_use=defer"):
        store.delete(AdapterName("a"), defer=False)
    assert [store.resolve(name).version for name in ("a@1", "a@2")] == [1, 2]
    held.release()
    store.delete(AdapterName("a"), defer=False)
    assert sorted(told) == ["a@1", "a@2"]


def test_a_deferred_deletion_waits_for_the_last_user_and_lets_nobody_in(
    store: AdapterStore, told: list[str], root: Path
) -> None:
    record = add(store, "a", "one")
    (store.packed_folder / record.digest).mkdir(parents=True)
    first, second = lease(store, "a"), lease(store, "a")
    (left,) = store.delete(AdapterName("a"), defer=True)
    assert left.state is VersionState.DELETING
    for name in ("a", "a@1"):
        with pytest.raises(UnknownAdapterError):
            lease(store, name)
    first.release()
    assert text_of(store, second.shares[0].ref) == "one"
    assert told == []
    second.release()
    wait_until(lambda: contents(root) == set())
    wait_until(lambda: not (store.packed_folder / record.digest).exists())
    assert told == ["a@1"]
    assert store.catalog.versions("a") == []
    assert add(store, "a").version == 2


def test_of_an_id_that_is_deleted_those_in_use_are_deferred_and_the_others_go(
    store: AdapterStore, told: list[str]
) -> None:
    for text in ("one", "two", "three"):
        add(store, "a", text)
    held = lease(store, "a@2")
    left = store.delete(AdapterName("a"), defer=True)
    assert {record.name: record.state.value for record in left} == {
        "a@1": "ready",
        "a@2": "deleting",
        "a@3": "ready",
    }
    assert sorted(told) == ["a@1", "a@3"]
    held.release()
    wait_until(lambda: sorted(told) == ["a@1", "a@2", "a@3"])


def test_a_deferred_deletion_can_be_asked_for_again(store: AdapterStore, told: list[str]) -> None:
    add(store, "a")
    held = lease(store, "a")
    for _ in range(2):
        store.delete(AdapterName("a"), defer=True)
    with pytest.raises(InUseError):
        store.delete(AdapterName("a", 1), defer=False)
    held.release()
    wait_until(lambda: told == ["a@1"])


def test_identical_content_that_is_uploaded_meanwhile_outlives_a_deferred_deletion(
    store: AdapterStore, told: list[str]
) -> None:
    add(store, "a", "same")
    held = lease(store, "a")
    store.delete(AdapterName("a"), defer=True)
    new = add(store, "a", "same")
    assert new.version == 2
    held.release()
    wait_until(lambda: told == ["a@1"])
    assert text_of(store, store.resolve("a")) == "same"


def test_a_user_who_leaves_while_the_deletion_is_decided_does_not_keep_the_version(
    store: AdapterStore, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "a")
    held = lease(store, "a")
    change = store.catalog.change

    def slow(*args: Any, **values: Any) -> AdapterRecord:
        held.release()
        return change(*args, **values)

    monkeypatch.setattr(store.catalog, "change", slow)
    store.delete(AdapterName("a"), defer=True)
    wait_until(lambda: told == ["a@1"])
    assert store.catalog.versions("a") == []


def test_a_lease_may_be_released_after_the_store_is_closed(open_store: Open) -> None:
    store = open_store()
    add(store, "a")
    held = lease(store, "a")
    store.delete(AdapterName("a"), defer=True)
    store.close()
    held.release()
    assert open_store().catalog.versions("a") == []


def test_a_deletion_that_fails_in_the_background_is_finished_at_the_next_start(
    open_store: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    record = add(store, "a")
    held = lease(store, "a")
    store.delete(AdapterName("a"), defer=True)

    def fail(*args: Any) -> None:
        raise StoreError("the disk is gone")

    with monkeypatch.context() as broken:
        broken.setattr(store.catalog, "remove", fail)
        held.release()
        store.close()
    assert "deleting a@1 will be finished at the next start" in caplog.text
    again = open_store()
    assert again.catalog.versions("a") == []
    assert not again.content.path(record.digest).exists()


# Compositions


def test_a_composition_is_its_parts_times_its_weight(store: AdapterStore) -> None:
    for name in ("a", "b"):
        add(store, name)
    compose(store, "sum", Part("a", 1, 0.5), Part("b", 1, -1.0))
    found = lease(store, ("sum", 2.0), "a")
    assert found.name == "2 sum@1 + a@1"
    assert [share.name for share in found.shares] == ["a@1*2.0", "b@1*-2.0"]
    assert {ref.name for ref in found.held} == {"sum@1", "a@1", "b@1"}


def test_a_composition_keeps_its_parts_versions(store: AdapterStore) -> None:
    add(store, "a", "one")
    compose(store, "sum", Part("a", 1, 0.5))
    add(store, "a", "two")
    assert [share.name for share in lease(store, "sum").shares] == ["a@1*0.5"]


@pytest.mark.parametrize("defer", [False, True])
def test_a_part_of_a_composition_cannot_be_deleted_before_it(
    store: AdapterStore, defer: bool
) -> None:
    for text in ("one", "two"):
        add(store, "a", text)
    compose(store, "sum", Part("a", 1, 0.5))
    for name in (AdapterName("a", 1), AdapterName("a")):
        with pytest.raises(InUseError, match=r"'a@1' is a part of the composition 'sum@1'"):
            store.delete(name, defer)
    store.delete(AdapterName("a", 2), defer)
    store.delete(AdapterName("sum"), defer)
    store.delete(AdapterName("a"), defer)
    assert list(store.ids()) == []


def test_an_id_that_is_a_composition_of_its_own_versions_can_be_deleted_whole(
    store: AdapterStore,
) -> None:
    add(store, "a")
    compose(store, "a", Part("a", 1, 0.5))
    store.delete(AdapterName("a"), defer=False)
    assert list(store.ids()) == []


def test_a_composition_that_is_being_deleted_still_keeps_its_parts(store: AdapterStore) -> None:
    add(store, "a")
    compose(store, "sum", Part("a", 1, 0.5))
    held = lease(store, "sum")
    store.delete(AdapterName("sum"), defer=True)
    with pytest.raises(InUseError, match=r"composition 'sum@1'"):
        store.delete(AdapterName("a"), defer=True)
    held.release()


def test_what_is_gone_or_going_cannot_become_a_part(store: AdapterStore) -> None:
    add(store, "a")
    held = lease(store, "a")
    store.delete(AdapterName("a"), defer=True)
    for part in (Part("a", 1, 0.5), Part("missing", 1, 0.5)):
        with pytest.raises(UnknownAdapterError, match="a part has been deleted"):
            compose(store, "sum", part)
    assert not store.catalog.knows("sum")
    held.release()


def test_a_composition_is_rolled_back_to_its_parts(store: AdapterStore) -> None:
    add(store, "a")
    compose(store, "sum", Part("a", 1, 0.5))
    add(store, "sum", "merged")
    back = store.rollback("sum", 1)
    assert (back.name, back.source) == ("sum@3", Source.COMPOSITION)
    assert [share.name for share in lease(store, "sum").shares] == ["a@1*0.5"]


# Uses


def test_uses_are_written_when_they_are_flushed_and_when_the_store_is_closed(
    open_store: Open, folders: Path
) -> None:
    write(folders / "own", "own")
    store = open_store()
    add(store, "a")
    before = time.time()
    for _ in range(3):
        lease(store, "a").release()
    lease(store, "own").release()
    assert store.find(AdapterName("a")).uses == 0
    store.flush()
    found = store.find(AdapterName("a"))
    assert found.uses == 3
    assert found.last_used is not None
    assert before <= found.last_used <= time.time()
    lease(store, "a").release()
    store.close()
    assert open_store().find(AdapterName("a")).uses == 4


def test_leases_flush_uses_now_and_then(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "a")
    lease(store, "a").release()
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", 0.0)
    lease(store, "a").release()
    wait_until(lambda: store.find(AdapterName("a")).uses >= 1)


def test_a_lease_does_not_wait_for_a_catalog_that_others_write_to(
    store: AdapterStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "a")
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", 0.0)
    with closing(sqlite3.connect(root / "catalog.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        # With a flush on its way, these would wait for 10 s and then fail.
        for _ in range(3):
            lease(store, "a").release()
        other.rollback()
    store.close()
    with closing(sqlite3.connect(root / "catalog.db")) as catalog:
        assert catalog.execute("SELECT uses FROM polydelta_versions").fetchall() == [(3,)]


def test_uses_that_cannot_be_written_are_written_the_next_time(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(uses: Any) -> None:
        raise StoreError("the catalog is away")

    add(store, "a")
    lease(store, "a").release()
    with monkeypatch.context() as away:
        away.setattr(store.catalog, "count_uses", fail)
        with pytest.raises(StoreError, match="away"):
            store.flush()
        away.setattr(store_module, "FLUSH_SECONDS", 0.0)
        lease(store, "a").release()
        wait_until(lambda: "written later: the catalog is away" in caplog.text)
    store.flush()
    assert store.find(AdapterName("a")).uses == 2


def test_leases_start_no_flush_while_one_is_under_way(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_end = threading.Event(), threading.Event()
    written: list[int] = []

    def write_slowly(uses: Any) -> None:
        began.set()
        may_end.wait(TIMEOUT)
        written.extend(count for *_, count, _ in uses)

    add(store, "a")
    lease(store, "a").release()
    monkeypatch.setattr(store.catalog, "count_uses", write_slowly)
    monkeypatch.setattr(store_module, "FLUSH_SECONDS", 0.0)
    lease(store, "a").release()
    assert began.wait(TIMEOUT)
    for _ in range(5):
        lease(store, "a").release()
    may_end.set()
    store.close()
    # One in the background, and the last one.
    assert len(written) == 2
    assert sum(written) == 7


def test_uses_of_a_version_that_is_gone_are_nobodys(store: AdapterStore) -> None:
    add(store, "a")
    lease(store, "a").release()
    store.delete(AdapterName("a"), defer=False)
    store.flush()
    assert store.catalog.versions("a") == []


# Opening


def test_what_a_crash_has_left_is_swept_when_the_store_is_opened(
    open_store: Open, root: Path
) -> None:
    store = open_store()
    kept, doomed = add(store, "kept", "one"), add(store, "doomed", "two")
    store.catalog.change("doomed", 1, state=VersionState.DELETING)
    store.close()
    write(root / "content" / ("0" * 64), "its row was never committed")
    for digest in ("0" * 64, kept.digest):
        (root / "pending" / digest).touch()
    write(root / "content" / ("1" * 64), "never noted: perhaps of another catalog")
    write(root / "content" / ".part-1", "half")
    write(root / "staging" / "upload", "half")
    for digest in (kept.digest, doomed.digest):
        (root / "packed" / digest).mkdir(parents=True)
        (root / "packed" / digest / "file.packed").touch()
        (root / "packed" / digest / ".half.part").touch()
    again = open_store()
    assert contents(root) == {kept.digest, "1" * 64}
    assert [path.name for path in (root / "pending").iterdir()] == ["lock"]
    assert [path.name for path in (root / "packed").rglob("*")] == [kept.digest, "file.packed"]
    assert not (root / "staging").exists()
    assert again.catalog.versions("doomed") == []
    assert text_of(again, again.resolve("kept")) == "one"
    assert add(again, "doomed").version == 2


def test_who_opens_a_store_that_is_open_sweeps_nothing(open_store: Open, root: Path) -> None:
    first = open_store()
    add(first, "a", "one")
    held = lease(first, "a")
    first.delete(AdapterName("a"), defer=True)
    write(root / "content" / ("0" * 64), "its row comes in a moment")
    (root / "pending" / ("0" * 64)).touch()
    write(root / "staging" / "upload", "half")
    second = open_store()
    assert len(contents(root)) == 2
    assert (root / "staging" / "upload").exists()
    assert len(second.catalog.versions("a")) == 1
    assert add(second, "a", "two").version == 2
    assert first.resolve("a").version == 2
    held.release()


WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.store import AdapterStore, StoreConfig
from test_store import add

store = AdapterStore(StoreConfig(Path(sys.argv[1])), FolderCatalog([]))
print("open", flush=True)
sys.stdin.readline()
for number in range(10):
    add(store, "a", f"text {number % 3}")
store.close()
"""


def test_processes_that_upload_at_the_same_time_lose_nothing(open_store: Open, root: Path) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", WORKER, str(root), str(Path(__file__).parent)]
    workers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "open\n"
    for worker in workers:
        worker.communicate("\n", timeout=50)
        assert worker.returncode == 0
    store = open_store()
    records = store.catalog.versions("a")
    assert [record.version for record in records] == list(range(1, 21))
    assert contents(root) == {record.digest for record in records}
    assert len(contents(root)) == 3


def test_a_store_that_cannot_be_opened_can_be_opened_once_it_is_mended(
    open_store: Open, root: Path
) -> None:
    root.mkdir()
    (root / "catalog.db").write_text("not a database" * 100)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"catalog cannot be opened"):
            open_store()
    with pytest.raises(StoreError, match=r"storage .* cannot be used"):
        open_store(storage_url="nonsense://bucket")
    (root / "catalog.db").unlink()
    add(open_store(), "a")


def test_a_sweep_that_fails_does_not_keep_the_store_locked(
    open_store: Open, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise StoreError("the storage is gone")

    with monkeypatch.context() as broken:
        broken.setattr(AdapterStore, "_finish_what_was_cut_off", fail)
        with pytest.raises(StoreError):
            open_store()
    open_store()


def test_a_folder_that_cannot_be_a_store_is_a_store_error_that_names_the_option(
    open_store: Open, root: Path
) -> None:
    root.write_text("a file")
    with pytest.raises(StoreError, match=r"cannot be used .*--store"):
        open_store()


@pytest.mark.parametrize("name", ["with space", "what?mode=ro", "a#b%20c", "ü@:"])
def test_the_stores_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    store = AdapterStore(StoreConfig(tmp_path / name), FolderCatalog([]))
    add(store, "a")
    store.close()
    with sqlite3.connect(tmp_path / name / "catalog.db") as database:
        assert database.execute("SELECT count(*) FROM polydelta_versions").fetchone() == (1,)


def test_files_in_an_object_store_are_read_through(
    open_store: Open, tmp_path: Path, root: Path
) -> None:
    url = f"file://{tmp_path / 'bucket'}"
    store = open_store(storage_url=url)
    record = add(store, "a", "one")
    store.close()
    shutil.rmtree(root / "content")
    again = open_store(storage_url=url)
    assert text_of(again, again.resolve("a")) == "one"
    again.delete(AdapterName("a"), defer=False)
    assert not (tmp_path / "bucket" / record.digest).exists()


# Several at once


def test_a_leased_version_is_there_while_others_upload_and_delete(store: AdapterStore) -> None:
    add(store, "a", "0")
    stop, broken = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                with lease(store, "a") as held:
                    text_of(store, held.shares[0].ref)
            except UnknownAdapterError:
                continue  # between two uploads
            except Exception as error:
                broken.append(error)
                return

    def write_and_delete(number: int) -> None:
        for round_ in range(12):
            record = add(store, "a", f"{number} {round_ % 3}")
            store.delete(AdapterName("a", record.version), defer=True)

    with ThreadPoolExecutor(5) as threads:
        readers = [threads.submit(read) for _ in range(3)]
        writers = [threads.submit(write_and_delete, number) for number in range(2)]
        for writer in writers:
            writer.result(TIMEOUT)
        stop.set()
        for reader in readers:
            reader.result(TIMEOUT)
    assert broken == []
    wait_until(lambda: store.catalog.in_state(VersionState.DELETING) == [])
    assert [record.name for record in store.catalog.versions("a")] == ["a@1"]


def test_many_who_delete_the_same_version_delete_it_once(
    store: AdapterStore, told: list[str]
) -> None:
    add(store, "a")
    barrier = threading.Barrier(6)

    def delete(_: int) -> bool:
        barrier.wait()
        try:
            store.delete(AdapterName("a", 1), defer=False)
        except UnknownAdapterError:
            return False
        return True

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(delete, range(6))) == 1
    assert told == ["a@1"]
