from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from polydelta.adapters_store import disk_tier
from polydelta.adapters_store.disk_tier import DiskTier
from polydelta.adapters_store.errors import (
    CompositionError,
    InvalidAdapterError,
    StoreError,
    TooLargeError,
    UnknownAdapterError,
)
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.formats.files import folder_digest
from polydelta.adapters_store.records import Part, Source
from polydelta.adapters_store.reference import AdapterName
from polydelta.adapters_store.store import AdapterStore, StoreConfig
from polydelta.adapters_store.upload.limits import UploadLimits
from polydelta.adapters_store.upload.publisher import Published, Publisher
from polydelta.adapters_store.upload.staging import StagedUpload

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Publish = Callable[..., Published]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """The operator's folders; what `adapter_files` writes is not below them."""
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


@pytest.fixture
def store(tmp_path: Path, own: Path) -> Iterator[AdapterStore]:
    store = AdapterStore(StoreConfig(tmp_path / "store", quota_bytes=6_000), FolderCatalog([own]))
    yield store
    store.close()


@pytest.fixture
def make_publisher(
    store: AdapterStore, adapter_files: Any, own: Path
) -> Callable[[UploadLimits], Publisher]:
    def make(limits: UploadLimits) -> Publisher:
        layout = adapter_files.layout
        tier = DiskTier(layout, torch.float32, store.packed_folder, store.content, 1 << 30)
        return Publisher(store, tier, layout, limits, [own])

    return make


@pytest.fixture
def publisher(make_publisher: Callable[[UploadLimits], Publisher]) -> Publisher:
    return make_publisher(UploadLimits(max_rank=8))


def send(publisher: Publisher, adapter_id: str, folder: Path, labels: Any = None) -> Published:
    """A folder's files, as a client does."""
    with publisher.begin() as upload:
        for name in (CONFIG, WEIGHTS):
            upload.open(name)
            upload.write((folder / name).read_bytes())
            upload.close()
        return publisher.publish(adapter_id, upload.finish(), labels)


@pytest.fixture
def publish(publisher: Publisher) -> Publish:
    return partial(send, publisher)


@pytest.fixture
def place(adapter_files: Any, own: Path) -> Callable[..., Path]:
    """Puts a LoRA into the operator's folder."""

    def place(adapter_id: str, **config: Any) -> Path:
        shutil.rmtree(own / adapter_id, ignore_errors=True)
        return Path(adapter_files.lora(adapter_id, **config).rename(own / adapter_id))

    return place


def assert_nothing(store: AdapterStore, *ids: str) -> None:
    """The ids were never given a version, nothing lies about, and contents have versions."""
    assert not store.catalog.known() & set(ids)
    assert {p.name for p in store.content.path("x").parent.iterdir()} == store.catalog.digests()
    assert not store.staging_folder.exists() or list(store.staging_folder.iterdir()) == []


# Uploads


def test_an_upload_is_a_version_with_all_that_is_known_of_it(
    publish: Publish, store: AdapterStore, adapter_files: Any
) -> None:
    folder = adapter_files.lora()
    published = publish("a", folder, {"team": "x"})
    assert (published.created, published.ignored) == (True, ())
    record = published.record
    assert record == store.find(AdapterName("a", 1))
    assert (record.digest, record.base) == (folder_digest(folder), "tiny")
    assert (record.source, record.labels) == (Source.UPLOAD, {"team": "x"})
    assert record.facts.format == "LORA"
    assert (record.facts.kinds, record.facts.rank, record.facts.modules) == (("LowRank",), 2, 1)
    assert record.facts.nbytes == sum(file.stat().st_size for file in folder.iterdir())
    assert store.content.fetch(record.digest).is_dir()


def test_other_content_under_an_id_is_a_new_version(
    publish: Publish, store: AdapterStore, adapter_files: Any
) -> None:
    for alpha in (1, 2, 3):
        assert publish("a", adapter_files.lora(lora_alpha=alpha)).created
    assert store.resolve("a").version == 3


def test_the_same_content_again_changes_nothing(
    publish: Publish, store: AdapterStore, adapter_files: Any
) -> None:
    folder = adapter_files.lora()
    first = publish("a", folder, {"team": "x"})
    again = publish("a", folder)
    assert (again.created, again.record) == (False, first.record)
    assert len(store.catalog.versions("a")) == 1
    assert list(store.staging_folder.iterdir()) == []


def test_what_was_checked_once_is_not_read_again_under_another_id(
    publish: Publish, adapter_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter_files.lora()
    publish("a", folder)

    def refuse(*args: Any) -> None:
        raise AssertionError("it was read again")

    monkeypatch.setattr(disk_tier, "read_adapter", refuse)
    assert publish("b", folder).created


def test_older_content_is_a_new_version_not_the_old_one(
    publish: Publish, store: AdapterStore, adapter_files: Any
) -> None:
    one, two = adapter_files.lora("one"), adapter_files.lora("two")
    for folder in (one, two, one):
        publish("a", folder)
    digests = [record.digest for record in store.catalog.versions("a")]
    assert digests == [folder_digest(folder) for folder in (one, two, one)]


def test_the_same_content_mends_files_that_were_lost(
    publish: Publish, store: AdapterStore, adapter_files: Any
) -> None:
    folder = adapter_files.lora()
    digest = publish("a", folder).record.digest
    shutil.rmtree(store.content.path(digest))
    with pytest.raises(StoreError, match=r"upload it again"):
        store.content.fetch(digest)
    assert not publish("a", folder).created
    assert folder_digest(store.content.fetch(digest)) == digest


def test_labels_stay_unless_others_are_given(publish: Publish, adapter_files: Any) -> None:
    one, two = adapter_files.lora("one"), adapter_files.lora("two")
    publish("a", one, {"team": "x"})
    assert publish("a", two).record.labels == {"team": "x"}
    replaced = publish("a", two, {"env": "prod"})
    assert (replaced.created, replaced.record.name) == (False, "a@2")
    assert replaced.record.labels == {"env": "prod"}
    assert publish("a", one, {}).record.labels == {}


def test_many_who_send_the_same_make_one_version(
    publish: Publish, store: AdapterStore, adapter_files: Any
) -> None:
    folder, barrier = adapter_files.lora(), threading.Barrier(6)

    def send(_: int) -> bool:
        barrier.wait()
        return publish("a", folder).created

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(send, range(6))) == 1
    assert len(store.catalog.versions("a")) == 1
    assert list(store.staging_folder.iterdir()) == []


# Refusals


@pytest.mark.parametrize("adapter_id", ["", "../a", ".a", "a/b", "a@1", "a" * 129])
def test_an_id_outside_the_grammar_is_refused(
    publish: Publish, publisher: Publisher, store: AdapterStore, adapter_files: Any, adapter_id: str
) -> None:
    publish("part", adapter_files.lora())
    with pytest.raises(InvalidAdapterError, match=r"is no adapter id"):
        publish(adapter_id, adapter_files.lora())
    with pytest.raises(InvalidAdapterError, match=r"is no adapter id"):
        publisher.compose(adapter_id, [("part", 0.5)])
    assert_nothing(store, adapter_id)


def test_labels_that_are_not_accepted_are_refused(
    publish: Publish, publisher: Publisher, store: AdapterStore, adapter_files: Any
) -> None:
    with pytest.raises(InvalidAdapterError, match=r"labels: the key"):
        publish("a", adapter_files.lora(), {"": "x"})
    publish("part", adapter_files.lora())
    with pytest.raises(InvalidAdapterError, match=r"labels: the value"):
        publisher.compose("a", [("part", 0.5)], {"x": "\n"})
    assert_nothing(store, "a")


def test_a_rank_beyond_the_limit_is_refused_with_both_numbers(
    publish: Publish, store: AdapterStore, adapter_files: Any, make_lora_tensors: Any
) -> None:
    fits = adapter_files.write("fits", make_lora_tensors(rank=8), r=8)
    large = adapter_files.write("large", make_lora_tensors(rank=9), r=9)
    publish("fits", fits)
    with pytest.raises(InvalidAdapterError, match=r"rank 9, but .* up to 8"):
        publish("a", large)
    assert_nothing(store, "a")


def test_a_small_file_that_becomes_a_large_adapter_is_refused(
    make_publisher: Callable[[UploadLimits], Publisher], store: AdapterStore, adapter_files: Any
) -> None:
    # Of q_proj in three layers, each with 36 inputs and outputs.
    config = {"peft_type": "UNILORA", "r": 8, "theta_d_length": 1, "proj_seed": 1}
    tensors = {"base_model.unilora_theta_d": torch.ones(1)}
    folder = adapter_files.write("small", tensors, "SHIRA", **config)
    least = 2 * 3 * 8 * 72
    with pytest.raises(TooLargeError, match=r"becomes 1728 numbers .* takes up to 1727"):
        send(make_publisher(UploadLimits(max_file_bytes=least - 2)), "a", folder)
    assert_nothing(store, "a")
    published = send(make_publisher(UploadLimits(max_file_bytes=least)), "a", folder)
    assert published.record.facts.rank == 8


def test_an_adapter_of_another_base_is_refused(
    publish: Publish, store: AdapterStore, adapter_files: Any
) -> None:
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.ones(2, 35),
        f"{module}.lora_B.weight": torch.ones(36, 2),
    }
    with pytest.raises(InvalidAdapterError, match=r"35"):
        publish("a", adapter_files.write("wrong", tensors))
    layers = {name.replace("layers.1", "layers.9"): t[:, :] for name, t in tensors.items()}
    with pytest.raises(InvalidAdapterError, match=r"layers.9"):
        publish("a", adapter_files.write("deep", layers))
    assert_nothing(store, "a")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(
    publish: Publish,
    store: AdapterStore,
    adapter_files: Any,
    make_lora_tensors: Any,
    value: float,
) -> None:
    tensors = make_lora_tensors()
    next(iter(tensors.values()))[1, 3] = value
    with pytest.raises(InvalidAdapterError, match=r"NaN or infinite"):
        publish("a", adapter_files.write("broken", tensors))
    assert_nothing(store, "a")


def test_beyond_the_quota_an_upload_is_refused(
    publish: Publish, store: AdapterStore, adapter_files: Any, make_lora_tensors: Any
) -> None:
    kept = publish("kept", adapter_files.lora())
    modules = [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]
    tensors = {name: t for m in modules for name, t in make_lora_tensors(m, rank=8).items()}
    with pytest.raises(TooLargeError, match=r"its quota is 6000"):
        publish("b", adapter_files.write("large", tensors, r=8))
    assert_nothing(store, "b")
    assert store.resolve("kept").digest == kept.record.digest


def test_a_refused_version_leaves_the_older_one(
    publish: Publish, store: AdapterStore, adapter_files: Any, make_lora_tensors: Any
) -> None:
    publish("a", adapter_files.lora())
    with pytest.raises(InvalidAdapterError):
        publish("a", adapter_files.write("large", make_lora_tensors(rank=9), r=9))
    assert [record.name for record in store.catalog.versions("a")] == ["a@1"]
    assert_nothing(store)


# Paths


def test_a_path_below_an_allowed_root_is_copied(
    publisher: Publisher, store: AdapterStore, place: Callable[..., Path]
) -> None:
    folder = place("there")
    (folder / "README.md").write_text("hello")
    published = publisher.publish_path("a", str(folder), {"team": "x"})
    assert (published.record.source, published.ignored) == (Source.PATH, ("README.md",))
    assert published.record.labels == {"team": "x"}
    digest = folder_digest(folder)
    shutil.rmtree(folder)
    assert folder_digest(store.content.fetch(digest)) == digest


def test_a_path_may_go_through_links_that_stay_below_a_root(
    publisher: Publisher, own: Path, place: Callable[..., Path]
) -> None:
    folder = place("there")
    (own / "link").symlink_to(folder)
    (own / "blobs").mkdir()
    (folder / WEIGHTS).rename(own / "blobs" / "0123")
    (folder / WEIGHTS).symlink_to(Path("..") / "blobs" / "0123")
    assert publisher.publish_path("a", str(own / "link")).created
    assert not publisher.publish_path("a", f"{own}/blobs/../there/").created


@pytest.mark.parametrize(
    "path",
    [
        "{tmp}/secret",
        "{own}/../secret",
        "{own}/link",
        "{own}/link/../secret",
        "{own}x",
        "own/there",
        "",
        ".",
        "/",
        "{tmp}",
        "{tmp}/missing",
        "{own}/loop/there",
        "{own}/loop",
        "/etc",
        "{own}/\0",
        "\0",
        "/\ud800",
        "{own}/\ud800",
        "~/there",
        "file://{own}/there",
        "/" + "x" * 5000,
    ],
)
def test_a_path_outside_the_roots_is_refused_in_the_same_words_whether_it_is_there(
    publisher: Publisher,
    store: AdapterStore,
    adapter_files: Any,
    own: Path,
    tmp_path: Path,
    path: str,
) -> None:
    adapter_files.lora("secret")
    adapter_files.lora("ownx")
    (own / "link").symlink_to(tmp_path / "secret")
    (own / "loop").symlink_to(own / "loop")
    with pytest.raises(InvalidAdapterError, match=r"is not below a folder .*--adapter-root"):
        publisher.publish_path("a", path.format(tmp=tmp_path, own=own))
    assert_nothing(store, "a")


@pytest.mark.parametrize("make", ["missing", "file", "empty", "pipe", "link out"])
def test_a_folder_below_a_root_that_has_no_adapter_is_refused(
    publisher: Publisher,
    store: AdapterStore,
    adapter_files: Any,
    own: Path,
    place: Callable[..., Path],
    make: str,
) -> None:
    folder = place("there")
    match make:
        case "missing":
            shutil.rmtree(folder)
        case "file":
            shutil.rmtree(folder)
            folder.write_text("a file")
        case "empty":
            shutil.rmtree(folder)
            folder.mkdir()
        case _:
            (folder / WEIGHTS).unlink()
    if make == "pipe":
        os.mkfifo(folder / WEIGHTS)
    if make == "link out":
        (folder / WEIGHTS).symlink_to(adapter_files.lora("secret") / WEIGHTS)
    with pytest.raises(InvalidAdapterError):
        publisher.publish_path("a", str(folder))
    assert_nothing(store, "a")


def test_a_file_that_is_a_link_to_itself_is_refused(
    publisher: Publisher, store: AdapterStore, place: Callable[..., Path]
) -> None:
    folder = place("there")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)
    with pytest.raises(InvalidAdapterError):
        publisher.publish_path("a", str(folder))
    assert_nothing(store, "a")


def test_without_roots_no_path_is_taken(
    store: AdapterStore, adapter_files: Any, place: Callable[..., Path]
) -> None:
    layout = adapter_files.layout
    tier = DiskTier(layout, torch.float32, store.packed_folder, store.content, 1 << 30)
    with pytest.raises(InvalidAdapterError, match="--adapter-root"):
        Publisher(store, tier, layout, UploadLimits()).publish_path("a", str(place("there")))


# Folders of the operator's


def test_an_upload_over_a_folder_takes_it_over_and_its_numbers_go_on(
    publish: Publish, store: AdapterStore, adapter_files: Any, place: Callable[..., Path]
) -> None:
    place("a")
    store.resolve("a")
    digest = folder_digest(place("a", lora_alpha=7))
    assert store.resolve("a").version == 2
    published = publish("a", adapter_files.lora("new", lora_alpha=9))
    assert published.record.name == "a@3"
    old = store.find(AdapterName("a", 2))
    assert (old.digest, old.source) == (digest, Source.ADOPTED)
    assert store.resolve("a@2").digest == digest
    # A copy: what becomes of the folder is no longer of interest.
    place("a", lora_alpha=99)
    assert folder_digest(store.content.fetch(digest)) == digest
    assert store.rollback("a", 2).name == "a@4"


def test_who_leased_the_folders_version_goes_on_with_the_folders_files(
    publish: Publish, store: AdapterStore, adapter_files: Any, place: Callable[..., Path]
) -> None:
    folder = place("a")
    with store.lease([("a", 1.0)]) as held:
        publish("a", adapter_files.lora("new", lora_alpha=9))
        (share,) = held.shares
        assert share.ref.path == folder
        assert store.resolve("a@1").digest == folder_digest(folder)


def test_what_lies_in_the_folder_already_is_taken_over_and_is_no_new_version(
    publish: Publish, store: AdapterStore, place: Callable[..., Path]
) -> None:
    published = publish("a", place("a"))
    assert (published.created, published.record.name) == (False, "a@1")
    assert published.record.source is Source.ADOPTED


def test_a_folder_that_cannot_be_served_is_passed_over_but_its_number_is_taken(
    publish: Publish,
    store: AdapterStore,
    adapter_files: Any,
    place: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = place("a")
    (folder / WEIGHTS).write_bytes(b"no tensors")
    with caplog.at_level(logging.WARNING):
        assert publish("a", adapter_files.lora("new")).record.name == "a@2"
    assert "the folder of 'a' is not a version of it" in caplog.text
    with pytest.raises(UnknownAdapterError):
        store.resolve("a@1")
    assert_nothing(store)


def test_a_refused_upload_leaves_the_operators_folder_what_it_is(
    publish: Publish,
    store: AdapterStore,
    adapter_files: Any,
    make_lora_tensors: Any,
    place: Callable[..., Path],
) -> None:
    place("a")
    tensors = make_lora_tensors()
    next(iter(tensors.values()))[0, 0] = float("nan")
    with pytest.raises(InvalidAdapterError):
        publish("a", adapter_files.write("broken", tensors))
    assert_nothing(store, "a")
    place("a", lora_alpha=7)
    assert store.resolve("a").digest is None


# Compositions


def test_the_operators_own_folder_may_be_larger_than_what_clients_may_send(
    publish: Publish, store: AdapterStore, adapter_files: Any, own: Path
) -> None:
    rank = 12  # of 8 that clients may send
    module = "model.layers.1.self_attn.q_proj"
    tensors = {
        f"base_model.model.{module}.lora_A.weight": torch.zeros(rank, 36),
        f"base_model.model.{module}.lora_B.weight": torch.zeros(36, rank),
    }
    adapter_files.write("a", tensors, r=rank).rename(own / "a")
    assert publish("a", adapter_files.lora("upload")).record.version == 2
    assert store.find(AdapterName("a", 1)).facts.rank == rank


def test_a_folder_that_changes_while_it_is_read_is_not_taken_over_as_what_it_was(
    publish: Publish,
    store: AdapterStore,
    adapter_files: Any,
    place: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place("a", lora_alpha=1)
    leased = store.resolve("a")
    take = StagedUpload.take

    def change_first(upload: StagedUpload, folder: Path, roots: Any) -> None:
        place("a", lora_alpha=7)
        take(upload, folder, roots)

    monkeypatch.setattr(StagedUpload, "take", change_first)
    added = publish("a", adapter_files.lora("upload")).record
    assert added.version > leased.version
    assert [record.version for record in store.catalog.versions("a")] == [added.version]


def test_the_same_number_from_a_folder_and_from_the_catalog_is_not_the_same_version(
    publish: Publish, store: AdapterStore, adapter_files: Any, place: Callable[..., Path]
) -> None:
    """Another server on the same catalog may have given it to other content."""
    place("a")
    of_the_folder = store.resolve("a")
    publish("b", adapter_files.lora("upload"))
    record = store.find(AdapterName("b", 1))
    assert store.ref(replace(record, id="a")) != of_the_folder


@pytest.fixture
def parts(publish: Publish, adapter_files: Any) -> None:
    """Versions `lora@1` and `shira@1`."""
    publish("lora", adapter_files.lora())
    publish("shira", adapter_files.shira())


@pytest.mark.usefixtures("parts")
def test_a_sum_is_saved_with_the_versions_of_now(
    publisher: Publisher, store: AdapterStore, publish: Publish, adapter_files: Any
) -> None:
    published = publisher.compose("sum", [("shira", 0.5), ("lora@1", -2.0)], {"team": "x"})
    record = published.record
    assert (published.created, record.name, record.source) == (True, "sum@1", Source.COMPOSITION)
    assert record.parts == (Part("lora", 1, -2.0), Part("shira", 1, 0.5))
    assert (record.facts.kinds, record.facts.rank) == (("LowRank", "Sparse"), 2)
    assert (record.facts.nbytes, record.labels, record.base) == (0, {"team": "x"}, "tiny")
    publish("lora", adapter_files.lora("new", lora_alpha=9))
    with store.lease([("sum", 1.0)]) as held:
        assert [share.name for share in held.shares] == ["lora@1*-2.0", "shira@1*0.5"]


@pytest.mark.usefixtures("parts")
def test_the_same_sum_however_written_is_the_same_version(
    publisher: Publisher, store: AdapterStore
) -> None:
    publisher.compose("sum", [("lora", 0.75), ("shira", 1.0)], {"team": "x"})
    again = publisher.compose("sum", [("shira", 1.0), ("lora", 0.5), ("lora@1", 0.25)])
    assert (again.created, again.record.name, again.record.labels) == (
        False,
        "sum@1",
        {"team": "x"},
    )
    other = publisher.compose("sum", [("lora", 0.75), ("shira", 2.0)])
    assert (other.created, other.record.name, other.record.labels) == (
        True,
        "sum@2",
        {"team": "x"},
    )
    assert len(store.catalog.versions("sum")) == 2


@pytest.mark.usefixtures("parts")
def test_the_same_sum_with_other_labels_gets_those(publisher: Publisher) -> None:
    publisher.compose("sum", [("lora", 0.5)], {"team": "x"})
    again = publisher.compose("sum", [("lora", 0.5)], {"team": "y"})
    assert (again.created, again.record.labels) == (False, {"team": "y"})


def test_an_upload_over_a_sum_of_the_same_content_is_a_version_of_its_own(
    publish: Publish, publisher: Publisher, store: AdapterStore, adapter_files: Any
) -> None:
    folder = adapter_files.lora("one")
    publish("one", folder)
    publisher.compose("sum", [("one", 1.0)])
    published = publish("sum", folder)
    assert published.created
    assert (published.record.version, published.record.parts) == (2, ())
    assert store.delete(AdapterName("sum", 1), defer=False)
    assert store.delete(AdapterName("one"), defer=False)
    assert store.content.fetch(published.record.digest).is_dir()


@pytest.mark.usefixtures("parts")
def test_a_sum_of_sums_is_saved_flat(publisher: Publisher) -> None:
    publisher.compose("inner", [("lora", 0.5), ("shira", 1.0)])
    outer = publisher.compose("outer", [("inner", 2.0), ("lora", 1.0)])
    assert outer.record.parts == (Part("lora", 1, 2.0), Part("shira", 1, 2.0))


@pytest.mark.usefixtures("parts")
def test_a_sum_may_take_the_name_of_its_part(publisher: Publisher, store: AdapterStore) -> None:
    published = publisher.compose("lora", [("lora", 0.5)])
    assert published.record.name == "lora@2"
    assert published.record.parts == (Part("lora", 1, 0.5),)
    assert publisher.compose("lora", [("lora", 0.5)]).record.parts == (Part("lora", 1, 0.25),)


def test_folders_that_are_parts_are_taken_over(
    publisher: Publisher, store: AdapterStore, place: Callable[..., Path]
) -> None:
    digest = folder_digest(place("own-one"))
    published = publisher.compose("sum", [("own-one", 0.5)])
    assert published.record.parts == (Part("own-one", 1, 0.5),)
    place("own-one", lora_alpha=99)
    with store.lease([("sum", 1.0)]) as held:
        assert held.shares[0].ref.digest == digest


@pytest.mark.usefixtures("parts")
def test_a_sum_under_the_name_of_a_folder_goes_on_with_its_numbers(
    publisher: Publisher, store: AdapterStore, place: Callable[..., Path]
) -> None:
    place("a")
    assert publisher.compose("a", [("lora", 0.5)]).record.name == "a@2"
    assert store.find(AdapterName("a", 1)).source is Source.ADOPTED


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        ([("own-one", 1.0), ("missing", 1.0)], UnknownAdapterError),
        ([("lora@2", 1.0)], UnknownAdapterError),
        ([("own-one", float("nan"))], CompositionError),
        ([("lora", 1.0), ("lora", -1.0)], InvalidAdapterError),
        ([], InvalidAdapterError),
    ],
)
def test_a_refused_sum_leaves_nothing_and_the_operators_folders_what_they_are(
    publisher: Publisher,
    store: AdapterStore,
    place: Callable[..., Path],
    wanted: list[tuple[str, float]],
    error: type[Exception],
) -> None:
    place("own-one")
    place("sum")
    with pytest.raises(error):
        publisher.compose("sum", wanted)
    assert_nothing(store, "sum", "own-one")
    assert store.users(store.find(AdapterName("lora"))) == 0


def test_a_folder_that_cannot_be_served_is_no_part(
    publisher: Publisher, store: AdapterStore, place: Callable[..., Path]
) -> None:
    (place("own-one") / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises((UnknownAdapterError, InvalidAdapterError)):
        publisher.compose("sum", [("own-one", 0.5)])
    assert_nothing(store, "sum", "own-one")


@pytest.mark.usefixtures("parts")
def test_a_part_that_is_deleted_while_the_sum_is_made_is_refused(
    publisher: Publisher, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = store.find

    def find_then_delete(name: AdapterName) -> Any:
        record = find(name)
        if name.id == "lora":
            monkeypatch.undo()
            store.delete(name, defer=True)
        return record

    monkeypatch.setattr(store, "find", find_then_delete)
    with pytest.raises(UnknownAdapterError, match="a part has been deleted"):
        publisher.compose("sum", [("lora", 0.5), ("shira", 0.5)])
    assert not store.catalog.knows("sum")
