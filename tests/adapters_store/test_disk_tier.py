from __future__ import annotations

import logging
import os
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from polydelta.adapters_store import disk_tier
from polydelta.adapters_store.content import LocalContent
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.disk_tier import DiskTier, FolderLoader
from polydelta.adapters_store.errors import InvalidAdapterError, StoreError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.formats.files import folder_digest
from polydelta.adapters_store.packed import PackedAdapter
from polydelta.adapters_store.reference import AdapterRef

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Open = Callable[..., DiskTier]


@pytest.fixture
def packed_folder(tmp_path: Path) -> Path:
    return tmp_path / ".packed"


@pytest.fixture
def content(tmp_path: Path) -> LocalContent:
    return LocalContent(tmp_path / ".content")


@pytest.fixture
def open_tier(adapter_files: Any, packed_folder: Path, content: LocalContent) -> Open:
    def open_tier(
        dtype: torch.dtype = torch.float32,
        capacity_bytes: int = 1 << 30,
        fingerprint: str = "tiny",
        weights_id: str = "",
        bits: int | None = None,
    ) -> DiskTier:
        layout = replace(adapter_files.layout, fingerprint=fingerprint, weights_id=weights_id)
        return DiskTier(layout, dtype, packed_folder, content, capacity_bytes, bits)

    return open_tier


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the versions that were read from their own files."""
    names: list[str] = []
    read = disk_tier.read_adapter

    def counting(ref: AdapterRef, layout: Any) -> Adapter:
        names.append(ref.name)
        return read(ref, layout)

    monkeypatch.setattr(disk_tier, "read_adapter", counting)
    return names


@pytest.fixture
def upload(adapter_files: Any, content: LocalContent) -> Callable[..., AdapterRef]:
    """A version whose files lie in the store."""

    def upload(adapter_id: str, **config: Any) -> AdapterRef:
        folder = adapter_files.lora(adapter_id, **config)
        digest = folder_digest(folder)
        content.add(digest, folder)
        return AdapterRef(adapter_id, 1, content.path(digest), digest=digest)

    return upload


def data(packed: PackedAdapter) -> list[bytes]:
    return [bytes(layer.data.numpy()) for layer in packed.layers]


def packed_files(folder: Path) -> set[str]:
    return {path.parent.name for path in folder.glob("*/*.packed")}


def test_the_second_load_comes_from_the_packed_file(
    open_tier: Open, upload: Callable[..., AdapterRef], reads: list[str]
) -> None:
    ref, tier = upload("one"), open_tier()
    first, second = tier.load(ref), tier.load(ref)
    assert reads == ["one@1"]
    assert data(first) == data(second)
    assert (second.digest, second.dtype) == (ref.digest, torch.float32)


def test_the_packed_file_is_there_after_a_restart(
    open_tier: Open, upload: Callable[..., AdapterRef], reads: list[str]
) -> None:
    ref = upload("one")
    open_tier().load(ref)
    assert data(open_tier().load(ref))
    assert reads == ["one@1"]


def test_what_is_loaded_is_what_a_reader_without_a_tier_packs(
    open_tier: Open, upload: Callable[..., AdapterRef], adapter_files: Any
) -> None:
    ref, tier = upload("one"), open_tier()
    plain = FolderLoader(adapter_files.layout, torch.float32).load(ref)
    assert data(tier.load(ref)) == data(tier.load(ref)) == data(plain)


def test_identical_content_is_packed_once_whatever_it_is_called(
    open_tier: Open, upload: Callable[..., AdapterRef], reads: list[str]
) -> None:
    ref, tier = upload("one"), open_tier()
    tier.load(ref)
    tier.load(replace(ref, id="other", version=7))
    assert reads == ["one@1"]


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.bfloat16},
        {"fingerprint": "other"},
        {"weights_id": "other"},
        {"bits": 8},
        {"bits": 4},
    ],
)
def test_another_base_dtype_or_number_of_bits_is_packed_anew_and_leaves_the_first(
    open_tier: Open, upload: Callable[..., AdapterRef], reads: list[str], other: dict[str, Any]
) -> None:
    ref = upload("one")
    first = open_tier().load(ref)
    packed = open_tier(**other).load(ref)
    assert packed.dtype == other.get("dtype", torch.float32)
    assert data(open_tier().load(ref)) == data(first)
    assert data(open_tier(**other).load(ref)) == data(packed)
    assert reads == ["one@1", "one@1"]


def test_it_holds_what_was_checked_and_packed_for_this_base(
    open_tier: Open, upload: Callable[..., AdapterRef]
) -> None:
    ref = upload("one")
    assert ref.digest is not None
    tier = open_tier()
    assert not tier.holds(ref.digest)
    tier.prepare(ref)
    assert tier.holds(ref.digest)
    assert not open_tier(fingerprint="other").holds(ref.digest)


def test_to_hold_a_content_it_need_not_be_read_but_be_whole_and_the_right_one(
    open_tier: Open,
    upload: Callable[..., AdapterRef],
    packed_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ref, tier = upload("one"), open_tier()
    tier.load(ref)
    assert ref.digest is not None
    monkeypatch.delattr(disk_tier, "read_packed")
    assert tier.holds(ref.digest)
    shutil.copytree(packed_folder / ref.digest, packed_folder / "another")
    assert not tier.holds("another")
    (file,) = (packed_folder / ref.digest).iterdir()
    os.truncate(file, file.stat().st_size - 1)
    assert not tier.holds(ref.digest)


def test_nothing_is_remembered_of_versions_whose_digest_is_known(
    open_tier: Open, upload: Callable[..., AdapterRef]
) -> None:
    ref, tier = upload("one"), open_tier()
    remembered = weakref.ref(ref)
    tier.load(ref)
    del ref
    assert remembered() is None


def test_a_damaged_packed_file_is_made_anew(
    open_tier: Open, upload: Callable[..., AdapterRef], reads: list[str], packed_folder: Path
) -> None:
    ref, tier = upload("one"), open_tier()
    first = data(tier.load(ref))
    (file,) = packed_folder.glob("*/*.packed")
    # In its place, and not written over, because it is mapped.
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1])
    assert data(tier.load(ref)) == first
    assert reads == ["one@1"] * 2
    assert file.read_bytes() == content


def test_a_packed_file_under_another_digest_is_not_believed(
    open_tier: Open, upload: Callable[..., AdapterRef], reads: list[str], packed_folder: Path
) -> None:
    one, two, tier = upload("one"), upload("two", lora_alpha=9), open_tier()
    tier.load(one)
    shutil.copytree(packed_folder / str(one.digest), packed_folder / str(two.digest))
    assert tier.load(two).digest == two.digest
    assert reads == ["one@1", "two@1"]


def test_least_recently_used_files_go_beyond_the_capacity(
    open_tier: Open, upload: Callable[..., AdapterRef], reads: list[str], packed_folder: Path
) -> None:
    refs = {name: upload(name, lora_alpha=number + 1) for number, name in enumerate("abcd")}
    open_tier().load(refs["a"])
    (file,) = packed_folder.glob("*/*.packed")
    tier = open_tier(capacity_bytes=2 * file.stat().st_size)

    def load(name: str, when: float) -> None:
        tier.load(refs[name])
        for used in packed_folder.glob(f"{refs[name].digest}/*"):
            os.utime(used, (when, when))

    for when, name in enumerate("abac"):
        load(name, when)
    assert packed_files(packed_folder) == {refs["a"].digest, refs["c"].digest}
    load("d", 5)
    assert packed_files(packed_folder) == {refs["c"].digest, refs["d"].digest}
    assert {path.name for path in packed_folder.iterdir()} == packed_files(packed_folder)
    load("b", 6)
    assert reads == ["a@1", "b@1", "c@1", "d@1", "b@1"]


def test_one_that_is_larger_than_the_capacity_is_served_all_the_same(
    open_tier: Open, upload: Callable[..., AdapterRef], adapter_files: Any
) -> None:
    tier = open_tier(capacity_bytes=0)
    one, two = upload("one"), upload("two", lora_alpha=9)
    plain = FolderLoader(adapter_files.layout, torch.float32)
    for ref in (one, two, one):
        assert data(tier.load(ref)) == data(plain.load(ref))


def test_what_was_loaded_outlives_its_file(
    open_tier: Open, upload: Callable[..., AdapterRef], packed_folder: Path
) -> None:
    ref, tier = upload("one"), open_tier()
    first, packed = data(tier.load(ref)), tier.load(ref)
    shutil.rmtree(packed_folder)
    assert data(packed) == first


def test_a_packed_folder_that_cannot_be_written_still_serves(
    open_tier: Open,
    upload: Callable[..., AdapterRef],
    reads: list[str],
    packed_folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    packed_folder.write_text("a file")
    ref, tier = upload("one"), open_tier()
    with caplog.at_level(logging.WARNING):
        assert data(tier.load(ref)) == data(tier.load(ref))
    assert reads == ["one@1"] * 2
    assert "could not be kept on disk" in caplog.text


def test_content_that_is_gone_is_a_store_error_unless_it_was_packed(
    open_tier: Open, upload: Callable[..., AdapterRef], content: LocalContent
) -> None:
    packed, lost, tier = upload("packed"), upload("lost", lora_alpha=9), open_tier()
    tier.load(packed)
    for ref in (packed, lost):
        assert ref.digest is not None
        content.remove(ref.digest)
    assert tier.load(packed).digest == packed.digest
    with pytest.raises(StoreError, match=r"upload it again"):
        tier.load(lost)


def test_content_that_the_disk_has_damaged_is_refused(
    open_tier: Open, upload: Callable[..., AdapterRef], packed_folder: Path
) -> None:
    ref = upload("one")
    weights = bytearray((ref.path / WEIGHTS).read_bytes())
    weights[-2] ^= 1
    (ref.path / WEIGHTS).write_bytes(weights)
    with pytest.raises(InvalidAdapterError, match=r"'one@1' are not those that were uploaded"):
        open_tier().load(ref)
    assert not packed_folder.exists()


def test_what_is_refused_is_not_packed(
    open_tier: Open, adapter_files: Any, packed_folder: Path
) -> None:
    tensors = {
        f"base_model.model.model.layers.1.self_attn.q_proj.lora_{side}.weight": tensor
        for side, tensor in {"A": torch.ones(2, 35), "B": torch.ones(36, 2)}.items()
    }
    folder = adapter_files.write("wrong", tensors)
    with pytest.raises(InvalidAdapterError):
        open_tier().prepare(AdapterRef("wrong", 1, folder))
    assert not packed_folder.exists()


def test_an_adapter_in_a_folder_is_packed_beside_the_others(
    open_tier: Open, adapter_files: Any, reads: list[str], packed_folder: Path
) -> None:
    folder = adapter_files.lora("one")
    ref, tier = FolderCatalog([adapter_files.root]).resolve("one"), open_tier()
    assert data(tier.load(ref)) == data(tier.load(ref))
    assert reads == ["one@1"]
    assert packed_files(packed_folder) == {folder_digest(folder)}


def test_a_folders_old_version_can_be_loaded_after_its_files_have_changed(
    open_tier: Open, adapter_files: Any, reads: list[str]
) -> None:
    adapter_files.lora("one")
    folders, tier = FolderCatalog([adapter_files.root]), open_tier()
    old = folders.resolve("one")
    first = data(tier.load(old))
    adapter_files.lora("one", lora_alpha=100)
    new = folders.resolve("one")
    assert data(tier.load(new)) != first
    assert data(tier.load(old)) == first
    assert reads == ["one@1", "one@2"]


def test_an_unchanged_folder_is_not_read_again_after_a_restart(
    open_tier: Open, adapter_files: Any, reads: list[str]
) -> None:
    adapter_files.lora("one")
    first = data(open_tier().load(FolderCatalog([adapter_files.root]).resolve("one")))
    assert data(open_tier().load(FolderCatalog([adapter_files.root]).resolve("one"))) == first
    assert reads == ["one@1"]
    adapter_files.lora("one", lora_alpha=100)
    changed = data(open_tier().load(FolderCatalog([adapter_files.root]).resolve("one")))
    assert changed != first
    assert reads == ["one@1", "one@1"]


def test_a_folders_old_version_that_was_never_loaded_is_refused_after_a_change(
    open_tier: Open, adapter_files: Any
) -> None:
    adapter_files.lora("one")
    old = FolderCatalog([adapter_files.root]).resolve("one")
    adapter_files.lora("one", lora_alpha=100)
    with pytest.raises(InvalidAdapterError, match=r"'one@1' have changed since it was asked for"):
        open_tier().load(old)
