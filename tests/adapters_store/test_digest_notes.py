"""What is remembered of operators' folders from one process to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from polydelta.adapters_store.digest_notes import DigestNotes
from polydelta.adapters_store.reference import AdapterRef

DIGEST = "0123456789abcdef" * 4
LOOKS = ((1, 20, 3), (4, 500, 6))


def ref(folder: str = "one", looks: object = LOOKS) -> AdapterRef:
    return AdapterRef("one", 1, Path("/adapters") / folder, signature=looks)  # type: ignore[arg-type]


@pytest.fixture
def notes(tmp_path: Path) -> DigestNotes:
    return DigestNotes(tmp_path / "notes")


def test_a_note_is_found_again_by_path_and_looks(notes: DigestNotes, tmp_path: Path) -> None:
    notes.write(ref(), DIGEST)
    assert DigestNotes(tmp_path / "notes").find(ref()) == DIGEST
    assert notes.find(ref("another")) is None
    assert notes.find(ref(looks=((1, 20, 3), (4, 501, 6)))) is None
    assert notes.find(ref(looks=((1, 20, 3), None))) is None


def test_what_has_no_looks_has_no_note(notes: DigestNotes, tmp_path: Path) -> None:
    notes.write(ref(looks=None), DIGEST)
    assert not (tmp_path / "notes").exists()


@pytest.mark.parametrize("content", [b"", b"../../etc", DIGEST[:63].encode(), b"\xff" * 64])
def test_a_damaged_note_is_none(notes: DigestNotes, tmp_path: Path, content: bytes) -> None:
    notes.write(ref(), DIGEST)
    (file,) = (tmp_path / "notes").iterdir()
    file.write_bytes(content)
    assert notes.find(ref()) is None
    notes.write(ref(), DIGEST)
    assert notes.find(ref()) == DIGEST


def test_sweeping_leaves_notes_of_what_is_kept_and_nothing_else(
    notes: DigestNotes, tmp_path: Path
) -> None:
    other = DIGEST[::-1]
    notes.write(ref(), DIGEST)
    notes.write(ref("two"), other)
    (tmp_path / "notes" / "left.123").write_text(DIGEST)
    (tmp_path / "notes" / "binary").write_bytes(b"\xff")
    notes.sweep(lambda digest: digest == DIGEST)
    assert notes.find(ref()) == DIGEST
    assert notes.find(ref("two")) is None
    assert len(list((tmp_path / "notes").iterdir())) == 1
