"""Contents between the disk and the catalog."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from polydelta.adapters_store.catalog import Catalog
from polydelta.adapters_store.content import LocalContent
from polydelta.adapters_store.errors import StoreError
from polydelta.adapters_store.pending import PendingContents
from polydelta.adapters_store.records import AdapterFacts, AdapterRecord, Source

WITH_ROW, WITHOUT = "a" * 64, "b" * 64


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog(f"sqlite:///{tmp_path / 'catalog.db'}")
    facts = AdapterFacts("LORA", ("LowRank",), 1, 1, 1)
    catalog.add(AdapterRecord("kept", 0, WITH_ROW, facts, "", 1.0, Source.UPLOAD))
    yield catalog
    catalog.close()


@pytest.fixture
def content(tmp_path: Path) -> LocalContent:
    content = LocalContent(tmp_path / "content")
    for digest in (WITH_ROW, WITHOUT):
        content.path(digest).mkdir()
    return content


@pytest.fixture
def pending(tmp_path: Path, catalog: Catalog, content: LocalContent) -> PendingContents:
    return PendingContents(tmp_path / "pending", catalog, content, tmp_path / "packed")


def notes(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "pending").iterdir()} - {"lock"}


def test_a_content_is_noted_while_it_changes_and_stays_only_with_a_row(
    pending: PendingContents, content: LocalContent, tmp_path: Path
) -> None:
    (tmp_path / "packed" / WITHOUT).mkdir(parents=True)
    with pending.changing([WITH_ROW, WITHOUT]):
        assert notes(tmp_path) == {WITH_ROW, WITHOUT}
    assert notes(tmp_path) == set()
    assert content.path(WITH_ROW).exists()
    assert not content.path(WITHOUT).exists()
    assert not (tmp_path / "packed" / WITHOUT).exists()


def test_a_change_that_fails_leaves_no_content_without_a_row(
    pending: PendingContents, content: LocalContent, tmp_path: Path
) -> None:
    with pytest.raises(KeyError), pending.changing([WITHOUT]):
        raise KeyError
    assert not content.path(WITHOUT).exists()
    assert notes(tmp_path) == set()


def test_nothing_changes_where_no_note_can_be_made(
    pending: PendingContents, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", fail)
    with pytest.raises(StoreError, match="No space left"), pending.changing([WITH_ROW]):
        pytest.fail("the change was begun")


def test_what_was_not_noted_is_not_touched(
    pending: PendingContents, content: LocalContent, tmp_path: Path
) -> None:
    pending.settle_all()
    assert content.path(WITHOUT).exists()
    (tmp_path / "pending" / WITHOUT).touch()
    (tmp_path / "pending" / "something else").touch()
    pending.settle_all()
    assert not content.path(WITHOUT).exists()
    assert notes(tmp_path) == {"something else"}


def test_a_note_stays_until_the_content_could_be_removed(
    pending: PendingContents,
    content: LocalContent,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(digest: str) -> None:
        raise StoreError("the storage is gone")

    with monkeypatch.context() as broken:
        broken.setattr(content, "remove", fail)
        with pytest.raises(StoreError), pending.changing([WITHOUT]):
            pass
    assert notes(tmp_path) == {WITHOUT}
    pending.settle_all()
    assert notes(tmp_path) == set()
    assert not content.path(WITHOUT).exists()
