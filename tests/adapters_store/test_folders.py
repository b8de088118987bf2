from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from polydelta.adapters_store.errors import UnknownAdapterError
from polydelta.adapters_store.folders import FolderCatalog
from polydelta.adapters_store.reference import AdapterRef


def make(root: Path, adapter_id: str, content: str = "{}") -> Path:
    folder = root / adapter_id
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(content)
    (folder / "adapter_model.safetensors").write_bytes(content.encode())
    return folder


def test_an_id_resolves_to_version_1_of_its_folder(tmp_path: Path) -> None:
    folder = make(tmp_path, "sql")
    ref = FolderCatalog([tmp_path]).resolve("sql")
    assert (ref, ref.path, ref.name) == (AdapterRef("sql", 1, folder), folder, "sql@1")


def test_an_unchanged_folder_keeps_its_version(tmp_path: Path) -> None:
    make(tmp_path, "sql")
    catalog = FolderCatalog([tmp_path])
    assert catalog.resolve("sql") == catalog.resolve("sql@1") == next(catalog.list())


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_rewritten_file_is_a_new_version_and_the_old_one_is_gone(
    tmp_path: Path, file: str
) -> None:
    folder = make(tmp_path, "sql")
    catalog = FolderCatalog([tmp_path])
    catalog.resolve("sql")
    (folder / file).write_text("something longer")
    assert catalog.resolve("sql").version == 2
    with pytest.raises(UnknownAdapterError, match="'sql@2'"):
        catalog.resolve("sql@1")


def test_a_replaced_file_of_the_same_size_and_time_is_a_new_version(tmp_path: Path) -> None:
    folder = make(tmp_path, "sql")
    catalog = FolderCatalog([tmp_path])
    catalog.resolve("sql")
    file = folder / "adapter_model.safetensors"
    stat = file.stat()
    (tmp_path / "new").write_bytes(b"!!")
    os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (tmp_path / "new").replace(file)
    assert catalog.resolve("sql").version == 2


def test_a_deleted_adapter_is_unknown_and_never_gets_its_old_number_for_new_content(
    tmp_path: Path,
) -> None:
    folder = make(tmp_path, "sql")
    catalog = FolderCatalog([tmp_path])
    catalog.resolve("sql")
    shutil.rmtree(folder)
    with pytest.raises(UnknownAdapterError, match="'sql'"):
        catalog.resolve("sql")
    make(tmp_path, "sql", "another one")
    assert catalog.resolve("sql").version == 2


def test_an_unknown_id_says_how_to_list_adapters(tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapterError, match=r"'nope'.*polydelta adapters list"):
        FolderCatalog([tmp_path]).resolve("nope")


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../secret",
        "sub/secret",
        "/etc",
        "sql/",
        "sql\n",
        "sql\x00",
        ".hidden",
        "-sql",
        "ü",
        "a" * 129,
        "sql@",
        "sql@0",
        "sql@-1",
        "sql@01",
        "sql@one",
        "sql@1@1",
        "sql@" + "9" * 30,
        "@1",
    ],
)
def test_a_name_outside_the_grammar_is_unknown_whatever_lies_on_disk(
    tmp_path: Path, name: str
) -> None:
    root = tmp_path / "root"
    make(tmp_path, "secret")
    for inside in ("sql", "sub/secret", ".hidden", "-sql", "ü", "a" * 129):
        make(root, inside)
    with pytest.raises(UnknownAdapterError):
        FolderCatalog([root]).resolve(name)


@pytest.mark.parametrize("name", ["a", "0", "A.b_c-d", "v1..2", "a" * 128])
def test_a_name_within_the_grammar_is_found(tmp_path: Path, name: str) -> None:
    make(tmp_path, name)
    assert FolderCatalog([tmp_path]).resolve(name).id == name


def test_of_the_same_id_the_first_root_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    make(second, "sql")
    make(first, "other")
    catalog = FolderCatalog([first, second])
    assert catalog.resolve("sql").path == second / "sql"
    make(first, "sql")
    assert catalog.resolve("sql") == AdapterRef("sql", 2, first / "sql")
    assert [ref.name for ref in catalog.list()] == ["other@1", "sql@2"]


def test_the_list_is_sorted_and_leaves_out_what_is_no_adapter(tmp_path: Path) -> None:
    for adapter_id in ("b", "a", "c"):
        make(tmp_path, adapter_id)
    make(tmp_path, ".tmp-upload")
    (tmp_path / "empty").mkdir()
    (tmp_path / "README.md").write_text("not an adapter")
    assert [ref.id for ref in FolderCatalog([tmp_path]).list()] == ["a", "b", "c"]


def test_the_list_looks_into_folders_only_as_they_are_asked_for(tmp_path: Path) -> None:
    for adapter_id in ("a", "b"):
        make(tmp_path, adapter_id)
    refs: Iterator[AdapterRef] = FolderCatalog([tmp_path]).list()
    assert next(refs).id == "a"
    shutil.rmtree(tmp_path / "b")
    assert list(refs) == []


def test_among_ten_thousand_folders_neither_start_nor_look_up_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10_000):
        (tmp_path / f"adapter-{number}").mkdir()
    make(tmp_path, "wanted")

    def refuse(path: object) -> None:
        raise AssertionError("the folders were listed")

    monkeypatch.setattr("os.scandir", refuse)
    monkeypatch.setattr("os.listdir", refuse)
    assert FolderCatalog([tmp_path]).resolve("wanted").version == 1


def test_folders_that_appear_later_are_found_without_a_restart(tmp_path: Path) -> None:
    catalog = FolderCatalog([tmp_path])
    make(tmp_path, "late")
    assert catalog.resolve("late").version == 1


@pytest.mark.parametrize("make_root", [lambda path: None, lambda path: path.write_text("file")])
def test_a_root_that_is_no_folder_is_an_error_that_names_it(tmp_path: Path, make_root) -> None:
    make_root(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"missing.*create it"):
        FolderCatalog([tmp_path, tmp_path / "missing"])


def test_threads_agree_on_versions_while_files_change(tmp_path: Path) -> None:
    folder = make(tmp_path, "sql")
    catalog = FolderCatalog([tmp_path])
    seen: list[list[int]] = [[] for _ in range(4)]

    def look(versions: list[int]) -> None:
        for _ in range(200):
            versions.append(catalog.resolve("sql").version)

    threads = [threading.Thread(target=look, args=(versions,)) for versions in seen]
    for thread in threads:
        thread.start()
    for rewrite in range(10):
        (folder / "adapter_config.json").write_text("{}" * rewrite)
    for thread in threads:
        thread.join()
    assert all(versions == sorted(versions) for versions in seen)
    last = catalog.resolve("sql")
    assert catalog.resolve("sql") == last
