from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from polydelta.adapters_store.content import LocalContent, RemoteContent
from polydelta.adapters_store.errors import StoreError
from polydelta.adapters_store.formats.files import content_digest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

Stage = Callable[..., tuple[str, Path]]
Content = LocalContent | RemoteContent


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    """A finished upload: its digest and its folder."""

    def stage(text: str = "weights") -> tuple[str, Path]:
        folder = tmp_path / "staging" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text("{}")
        (folder / WEIGHTS).write_text(text)
        return content_digest(b"{}", text.encode()), folder

    return stage


@pytest.fixture
def local(tmp_path: Path) -> LocalContent:
    return LocalContent(tmp_path / "content")


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path / 'bucket'}/prefix/"
        return
    yield "memory://bucket/prefix"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def remote(url: str, local: LocalContent) -> RemoteContent:
    return RemoteContent(url, local)


@pytest.fixture(params=["local", "remote"])
def content(request: pytest.FixtureRequest, tmp_path: Path, local: LocalContent) -> Content:
    if request.param == "local":
        return local
    return RemoteContent(f"file://{tmp_path / 'bucket'}", local)


def objects(url: str) -> list[str]:
    """Names of all that lies in the object store."""
    filesystem, root = fsspec.core.url_to_fs(url)
    return sorted(path.rpartition("prefix/")[2] for path in filesystem.find(root))


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_what_is_added_is_fetched(content: Content, stage: Stage) -> None:
    digest, staged = stage()
    content.add(digest, staged)
    assert content.fetch(digest) == content.path(digest)
    assert files(content.path(digest)) == {CONFIG: "{}", WEIGHTS: "weights"}


def test_adding_what_is_there_changes_nothing(content: Content, stage: Stage) -> None:
    for _ in range(2):
        digest, staged = stage()
        content.add(digest, staged)
    assert files(content.fetch(digest)) == {CONFIG: "{}", WEIGHTS: "weights"}


def test_adding_what_is_there_leaves_the_files_to_those_who_read_them(
    local: LocalContent, stage: Stage
) -> None:
    digest, staged = stage()
    local.add(digest, staged)
    before = (local.path(digest) / WEIGHTS).stat()
    local.add(*stage())
    after = (local.path(digest) / WEIGHTS).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / WEIGHTS).unlink(),
        lambda folder: (folder / CONFIG).unlink(),
        lambda folder: (folder / WEIGHTS).write_text("weightz"),
        lambda folder: (folder / CONFIG).write_text(""),
        lambda folder: [file.unlink() for file in folder.iterdir()],
    ],
)
def test_adding_again_mends_what_the_disk_has_lost(
    content: Content, stage: Stage, damage: Callable[[Path], object]
) -> None:
    digest, staged = stage()
    content.add(digest, staged)
    damage(content.path(digest))
    content.add(*stage())
    assert files(content.fetch(digest)) == {CONFIG: "{}", WEIGHTS: "weights"}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_local_file_that_is_missing_is_named_by_its_content(
    local: LocalContent, stage: Stage, name: str
) -> None:
    digest, staged = stage()
    local.add(digest, staged)
    (local.path(digest) / name).unlink()
    with pytest.raises(StoreError, match=rf"{digest[:12]} are gone .*upload it again"):
        local.fetch(digest)


def test_what_was_never_added_cannot_be_fetched(content: Content) -> None:
    with pytest.raises(StoreError):
        content.fetch("0" * 64)


def test_a_fetch_that_fails_leaves_nothing(remote: RemoteContent, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"could not be fetched from the storage"):
        remote.fetch("0" * 64)
    assert list((tmp_path / "content").iterdir()) == []


def test_what_is_removed_is_gone_and_the_rest_stays(content: Content, stage: Stage) -> None:
    kept, staged = stage("kept")
    content.add(kept, staged)
    gone, staged = stage("gone")
    content.add(gone, staged)
    content.remove(gone)
    with pytest.raises(StoreError):
        content.fetch(gone)
    assert not content.path(gone).exists()
    assert files(content.fetch(kept))[WEIGHTS] == "kept"
    assert [path.name for path in content.path(kept).parent.iterdir()] == [kept]


def test_removing_what_is_not_there_is_done_already(content: Content) -> None:
    content.remove("0" * 64)


def test_what_is_removed_can_be_added_again(content: Content, stage: Stage) -> None:
    for _ in range(2):
        digest, staged = stage()
        content.add(digest, staged)
        content.remove(digest)
    content.add(*stage())
    assert files(content.fetch(digest))[WEIGHTS] == "weights"


def test_a_staged_folder_that_is_gone_is_a_store_error(content: Content, stage: Stage) -> None:
    digest, staged = stage()
    shutil.rmtree(staged)
    with pytest.raises(StoreError, match=r"could not be (written|sent)"):
        content.add(digest, staged)
    with pytest.raises(StoreError):
        content.fetch(digest)


def test_a_sweep_removes_only_what_is_no_content(local: LocalContent, stage: Stage) -> None:
    kept, staged = stage("kept")
    local.add(kept, staged)
    for name in (".gone-1", ".part-2"):
        shutil.copytree(local.path(kept), local.path(name))
    local.sweep()
    assert [path.name for path in local.path(kept).parent.iterdir()] == [kept]
    assert files(local.fetch(kept))[WEIGHTS] == "kept"


def test_the_object_store_has_the_files_under_the_digest(
    remote: RemoteContent, url: str, stage: Stage
) -> None:
    digest, staged = stage()
    remote.add(digest, staged)
    assert objects(url) == [f"{digest}/{CONFIG}", f"{digest}/{WEIGHTS}"]
    remote.remove(digest)
    assert objects(url) == []


def test_an_emptied_cache_is_read_through(
    remote: RemoteContent, local: LocalContent, stage: Stage
) -> None:
    digest, staged = stage()
    remote.add(digest, staged)
    local.remove(digest)
    assert files(remote.fetch(digest)) == {CONFIG: "{}", WEIGHTS: "weights"}
    assert [path.name for path in local.path(digest).parent.iterdir()] == [digest]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_cache_that_lost_a_file_is_read_through(
    remote: RemoteContent, local: LocalContent, stage: Stage, name: str
) -> None:
    digest, staged = stage()
    remote.add(digest, staged)
    (local.path(digest) / name).unlink()
    assert files(remote.fetch(digest)) == {CONFIG: "{}", WEIGHTS: "weights"}


def test_another_machine_with_an_empty_cache_has_it_too(
    remote: RemoteContent, url: str, stage: Stage, tmp_path: Path
) -> None:
    digest, staged = stage()
    remote.add(digest, staged)
    other = RemoteContent(url, LocalContent(tmp_path / "other"))
    assert other.fetch(digest) == tmp_path / "other" / digest
    assert files(other.path(digest))[WEIGHTS] == "weights"


def test_what_is_cached_is_fetched_without_asking(
    remote: RemoteContent, url: str, stage: Stage
) -> None:
    digest, staged = stage()
    remote.add(digest, staged)
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.rm(f"{root.rstrip('/')}/{digest}", recursive=True)
    assert files(remote.fetch(digest))[WEIGHTS] == "weights"


def test_a_remote_file_that_was_damaged_is_refused_by_its_digest(
    remote: RemoteContent, local: LocalContent, url: str, stage: Stage
) -> None:
    digest, staged = stage()
    remote.add(digest, staged)
    local.remove(digest)
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.pipe_file(f"{root.rstrip('/')}/{digest}/{WEIGHTS}", b"weightz")
    with pytest.raises(StoreError, match=r"not those that were uploaded: upload it again"):
        remote.fetch(digest)
    assert list(local.path(digest).parent.iterdir()) == []
    # As it says.
    remote.add(*stage())
    local.remove(digest)
    assert files(remote.fetch(digest))[WEIGHTS] == "weights"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_remote_file_that_is_missing_is_a_store_error(
    remote: RemoteContent, local: LocalContent, url: str, stage: Stage, name: str
) -> None:
    digest, staged = stage()
    remote.add(digest, staged)
    local.remove(digest)
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.rm(f"{root.rstrip('/')}/{digest}/{name}")
    with pytest.raises(StoreError, match=r"could not be fetched"):
        remote.fetch(digest)
    assert list(local.path(digest).parent.iterdir()) == []


def test_threads_that_fetch_the_same_at_once_all_have_it(
    tmp_path: Path, local: LocalContent, stage: Stage
) -> None:
    # fsspec's memory gives all readers of a file one position in it.
    remote = RemoteContent(f"file://{tmp_path / 'bucket'}", local)
    digest, staged = stage("weights" * 5000)
    remote.add(digest, staged)
    for _ in range(5):
        local.remove(digest)
        with ThreadPoolExecutor(8) as threads:
            folders = set(threads.map(remote.fetch, [digest] * 8))
        assert folders == {local.path(digest)}
        assert files(local.path(digest))[WEIGHTS] == "weights" * 5000
    assert [path.name for path in local.path(digest).parent.iterdir()] == [digest]


class BrokenDriver:
    """A driver whose every call fails as it likes."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*args: Any, **options: Any) -> Any:
            raise ConnectionError("s3cret")

        return fail


def test_a_driver_that_fails_is_a_store_error_that_keeps_its_words_to_itself(
    remote: RemoteContent, local: LocalContent, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_files", BrokenDriver())
    digest, staged = stage()
    for what, call in {
        "sent to": lambda: remote.add(digest, staged),
        "fetched from": lambda: remote.fetch(digest),
        "removed from": lambda: remote.remove(digest),
    }.items():
        with pytest.raises(StoreError, match=rf"could not be {what} the storage") as failed:
            call()
        assert "s3cret" not in str(failed.value)
    # Nothing is cached that is not in the storage.
    assert not local.holds(digest)


def test_a_cache_that_cannot_be_written_is_a_store_error(
    remote: RemoteContent, local: LocalContent, stage: Stage
) -> None:
    digest, staged = stage()
    remote.add(digest, staged)
    root = local.path(digest).parent
    shutil.rmtree(root)
    root.write_text("a file")
    with pytest.raises(StoreError, match=r"could not be fetched"):
        remote.fetch(digest)


@pytest.mark.parametrize("url", ["nonsense://bucket/prefix"])
def test_a_url_without_a_driver_says_what_to_install(url: str, local: LocalContent) -> None:
    with pytest.raises(StoreError, match=r"storage .* cannot be used .*polydelta\[s3\]"):
        RemoteContent(url, local)
