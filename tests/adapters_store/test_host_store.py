from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import pytest
import torch

from polydelta.adapters_store import disk_tier
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.disk_tier import FolderLoader
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.formats.files import folder_digest
from polydelta.adapters_store.host_store import HostStore
from polydelta.adapters_store.load_times import LoadTier
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.reference import AdapterRef

Open = Callable[..., HostStore]
TIMEOUT = 30


@pytest.fixture
def open_store(adapter_files: Any) -> Iterator[Open]:
    stores: list[HostStore] = []

    def open_store(capacity_bytes: int = 1 << 20, workers: int = 1) -> HostStore:
        loader = FolderLoader(adapter_files.layout, torch.float32)
        stores.append(HostStore(loader, capacity_bytes, workers))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


@pytest.fixture
def catalog(adapter_files: Any) -> FolderCatalog:
    return FolderCatalog([adapter_files.root])


class Gate:
    """Stands in for the reader: counts reads, and holds them until it is opened."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.started = threading.Event()
        self.opened = threading.Event()
        self._read = disk_tier.read_adapter

    def __call__(self, ref: AdapterRef, layout: Any) -> Adapter:
        self.reads.append(ref.name)
        self.started.set()
        assert self.opened.wait(TIMEOUT)
        return self._read(ref, layout)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(disk_tier, "read_adapter", gate)
    yield gate
    gate.opened.set()


def test_a_load_gives_the_packed_adapter(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any
) -> None:
    folder = adapter_files.lora("one")
    packed = open_store().load(catalog.resolve("one")).result(TIMEOUT)
    assert isinstance(packed, PackedAdapter)
    assert packed.digest == folder_digest(folder)
    assert packed.nbytes > 0


def test_load_returns_before_the_files_are_read(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    adapter_files.lora("one")
    future = open_store().load(catalog.resolve("one"))
    assert not future.done()
    gate.opened.set()
    assert future.result(TIMEOUT).nbytes > 0


def test_many_who_ask_share_one_load(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    adapter_files.lora("one")
    store, ref = open_store(), catalog.resolve("one")
    futures: list[Future[PackedAdapter]] = []
    threads = [threading.Thread(target=lambda: futures.append(store.load(ref))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gate.opened.set()
    assert len({id(future.result(TIMEOUT)) for future in futures}) == 1
    assert gate.reads == ["one@1"]


def test_a_kept_adapter_is_there_at_once_and_is_not_read_again(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    gate.opened.set()
    adapter_files.lora("one")
    store, ref = open_store(), catalog.resolve("one")
    first = store.load(ref).result(TIMEOUT)
    again = store.load(ref)
    assert again.done()
    assert again.result() is first
    assert gate.reads == ["one@1"]


def test_a_new_version_is_another_load(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any
) -> None:
    store = open_store()
    adapter_files.lora("one")
    old = store.load(catalog.resolve("one")).result(TIMEOUT)
    adapter_files.lora("one", lora_alpha=100)
    new = store.load(catalog.resolve("one")).result(TIMEOUT)
    assert old.digest != new.digest


def test_the_least_recently_used_goes_first_when_the_bytes_run_out(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    gate.opened.set()
    for name in ("a", "b", "c"):
        adapter_files.lora(name)
    size = open_store().load(catalog.resolve("a")).result(TIMEOUT).nbytes
    store = open_store(capacity_bytes=2 * size)
    gate.reads.clear()
    for name in ("a", "b", "a", "c", "a", "b"):
        store.load(catalog.resolve(name)).result(TIMEOUT)
    assert gate.reads == ["a@1", "b@1", "c@1", "b@1"]


def test_an_adapter_larger_than_the_store_is_handed_out_and_not_kept(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    gate.opened.set()
    adapter_files.lora("one")
    store, ref = open_store(capacity_bytes=1), catalog.resolve("one")
    assert store.load(ref).result(TIMEOUT).digest == store.load(ref).result(TIMEOUT).digest
    assert not store.holds(ref)
    assert len(gate.reads) == 2


def test_a_failed_load_says_why_and_the_next_one_tries_again(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    gate.opened.set()
    folder = adapter_files.lora("one")
    # A ref that names no files is of whatever files there are when it is loaded.
    store, ref = open_store(), AdapterRef("one", 1, folder)
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(InvalidAdapterError, match=r"not a complete safetensors file"):
        store.load(ref).result(TIMEOUT)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    assert store.load(ref).result(TIMEOUT).digest == folder_digest(folder)


def test_files_that_changed_since_a_version_was_named_are_not_served_as_it(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    gate.opened.set()
    folder = adapter_files.lora("one")
    old = catalog.resolve("one")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(InvalidAdapterError, match=r"'one@1' have changed since it was asked for"):
        open_store().load(old).result(TIMEOUT)
    assert open_store().load(catalog.resolve("one")).result(TIMEOUT).digest == folder_digest(folder)


def test_an_adapter_that_is_deleted_before_it_is_read_fails_by_name_of_the_file(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any
) -> None:
    folder = adapter_files.lora("one")
    ref = catalog.resolve("one")
    shutil.rmtree(folder)
    with pytest.raises(InvalidAdapterError, match=r"adapter_config.json cannot be read"):
        open_store().load(ref).result(TIMEOUT)


def test_a_failure_that_nobody_foresaw_reaches_the_caller(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter_files.lora("one")

    def out_of_memory(ref: AdapterRef, layout: Any) -> Adapter:
        raise MemoryError

    monkeypatch.setattr(disk_tier, "read_adapter", out_of_memory)
    with pytest.raises(MemoryError):
        open_store().load(catalog.resolve("one")).result(TIMEOUT)


def test_one_who_waits_cannot_cancel_the_load_of_the_others(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    adapter_files.lora("one")
    store, ref = open_store(), catalog.resolve("one")
    first, second = store.load(ref), store.load(ref)
    assert not first.cancel()
    gate.opened.set()
    assert second.result(TIMEOUT) is first.result(TIMEOUT)


def test_a_callback_may_load_another_adapter(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any
) -> None:
    adapter_files.lora("one")
    adapter_files.lora("two")
    store, chained = open_store(), threading.Event()
    store.load(catalog.resolve("one")).add_done_callback(
        lambda _: store.load(catalog.resolve("two")).add_done_callback(lambda _: chained.set())
    )
    assert chained.wait(TIMEOUT)


def test_closing_ends_every_load_and_refuses_new_ones(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    for name in ("a", "b", "c"):
        adapter_files.lora(name)
    store = open_store(workers=1)
    futures = [store.load(catalog.resolve(name)) for name in ("a", "b", "c")]
    assert gate.started.wait(TIMEOUT)
    closing = threading.Thread(target=store.close)
    closing.start()
    # Only those that have not begun are dropped; give `close` the time to drop them.
    closing.join(0.2)
    gate.opened.set()
    closing.join(TIMEOUT)
    assert not wait(futures, TIMEOUT).not_done
    assert futures[0].result().nbytes > 0
    for future in futures[1:]:
        with pytest.raises(RuntimeError, match=r"closed"):
            future.result()
    with pytest.raises(RuntimeError):
        store.load(catalog.resolve("a"))


def test_a_load_that_hangs_does_not_keep_close_for_ever(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    adapter_files.lora("one")
    store = open_store()
    future = store.load(catalog.resolve("one"))
    assert gate.started.wait(TIMEOUT)
    store.close(timeout=0.05)
    assert not future.done()
    # Whoever waits for it gets it all the same.
    gate.opened.set()
    assert future.result(TIMEOUT).nbytes > 0


def test_it_holds_what_has_been_loaded_and_not_what_is_loading(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    adapter_files.lora("one")
    store, ref = open_store(), catalog.resolve("one")
    assert not store.holds(ref)
    future = store.load(ref)
    assert gate.started.wait(TIMEOUT)
    assert not store.holds(ref)
    gate.opened.set()
    future.result(TIMEOUT)
    assert store.holds(ref)
    assert not store.holds(AdapterRef("one", 2, ref.path))


def test_to_have_an_adapter_once_more_takes_what_packed_ones_took_unless_it_is_kept(
    catalog: FolderCatalog, adapter_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kept", "gone"):
        adapter_files.lora(name)
    loader = FolderLoader(adapter_files.layout, torch.float32)
    store = HostStore(loader, capacity_bytes=1 << 20)
    kept, gone = map(catalog.resolve, ("kept", "gone"))
    store.load(kept).result(TIMEOUT)
    # Packing is paid once: only a load of what was packed says what the next one takes.
    assert store.reload_seconds(gone) == 0
    monkeypatch.setattr(time, "perf_counter", lambda: 10.0)
    for began in (9.25, 9.75):
        loader.times.ended(LoadTier.PACKED, began)
    assert store.reload_seconds(gone) == 0.5
    assert store.reload_seconds(kept) == 0
    store.forget(kept)
    assert store.reload_seconds(kept) == 0.5
    store.close()


def test_asking_whether_it_holds_an_adapter_is_no_use_of_it(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any
) -> None:
    for name in ("a", "b", "c"):
        adapter_files.lora(name)
    size = open_store().load(catalog.resolve("a")).result(TIMEOUT).nbytes
    store = open_store(capacity_bytes=2 * size)
    for name in ("a", "b"):
        store.load(catalog.resolve(name)).result(TIMEOUT)
    assert store.holds(catalog.resolve("a"))
    store.load(catalog.resolve("c")).result(TIMEOUT)
    assert [store.holds(catalog.resolve(name)) for name in ("a", "b", "c")] == [False, True, True]


def test_what_is_forgotten_is_read_again_and_gives_its_bytes_to_others(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    gate.opened.set()
    for name in ("a", "b", "c"):
        adapter_files.lora(name)
    size = open_store().load(catalog.resolve("a")).result(TIMEOUT).nbytes
    store = open_store(capacity_bytes=2 * size)
    gate.reads.clear()
    for name in ("a", "b"):
        store.load(catalog.resolve(name)).result(TIMEOUT)
    store.forget(catalog.resolve("b"))
    store.forget(catalog.resolve("b"))
    assert not store.holds(catalog.resolve("b"))
    store.load(catalog.resolve("c")).result(TIMEOUT)
    assert store.holds(catalog.resolve("a"))
    store.load(catalog.resolve("b")).result(TIMEOUT)
    assert gate.reads == ["a@1", "b@1", "c@1", "b@1"]


def test_what_was_handed_out_outlives_being_forgotten(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any
) -> None:
    adapter_files.lora("one")
    store, ref = open_store(), catalog.resolve("one")
    packed = store.load(ref).result(TIMEOUT)
    before = bytes(packed.layers[1].data.numpy())
    store.forget(ref)
    assert bytes(packed.layers[1].data.numpy()) == before


def test_forgetting_what_is_loading_does_not_disturb_those_who_wait(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    adapter_files.lora("one")
    store, ref = open_store(), catalog.resolve("one")
    future = store.load(ref)
    store.forget(ref)
    gate.opened.set()
    assert future.result(TIMEOUT).nbytes > 0


def test_what_is_forgotten_while_it_loads_is_handed_out_and_not_kept(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    adapter_files.lora("one")
    store, ref = open_store(), catalog.resolve("one")
    future = store.load(ref)
    assert gate.started.wait(TIMEOUT)
    store.forget(ref)
    gate.opened.set()
    assert future.result(TIMEOUT).nbytes > 0
    assert not store.holds(ref)
    store.load(ref).result(TIMEOUT)
    assert store.holds(ref), "only the load that was under way is not kept"


def test_what_is_asked_for_again_after_it_was_forgotten_is_kept_and_read_once(
    open_store: Open, catalog: FolderCatalog, adapter_files: Any, gate: Gate
) -> None:
    adapter_files.lora("one")
    store, ref = open_store(), catalog.resolve("one")
    first = store.load(ref)
    store.forget(ref)
    assert store.load(ref) is first
    gate.opened.set()
    first.result(TIMEOUT)
    assert store.holds(ref)
    assert gate.reads == ["one@1"]
