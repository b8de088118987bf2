"""What is remembered of operators' folders from one process to the next."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
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


def test_a_folder_has_one_note_however_often_its_files_change(
    notes: DigestNotes, tmp_path: Path
) -> None:
    for size in range(20, 25):
        notes.write(ref(looks=((1, size, 3), None)), DIGEST)
    assert len(list((tmp_path / "notes").iterdir())) == 1
    assert notes.find(ref(looks=((1, 23, 3), None))) is None
    assert notes.find(ref(looks=((1, 24, 3), None))) == DIGEST


def test_threads_may_write_the_same_note_at_once(notes: DigestNotes, tmp_path: Path) -> None:
    digests = [letter * 64 for letter in "0123456789abcdef"]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda digest: notes.write(ref(), digest), digests * 10))
    assert notes.find(ref()) in digests
    assert len(list((tmp_path / "notes").iterdir())) == 1


def test_a_note_that_cannot_be_written_leaves_nothing(notes: DigestNotes, tmp_path: Path) -> None:
    notes.write(ref("another"), DIGEST)
    (another,) = (tmp_path / "notes").iterdir()
    another.unlink()
    another.mkdir()
    with pytest.raises(OSError, match=re.escape(another.name)):
        notes.write(ref("another"), DIGEST)
    assert list((tmp_path / "notes").iterdir()) == [another]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"../../etc",
        DIGEST.encode(),
        f"{DIGEST[:63]}\n{LOOKS}\n".encode(),
        f"{DIGEST}\n{LOOKS}".encode()[:-1],
        f"{DIGEST}\n{LOOKS}\n{LOOKS}\n".encode(),
        b"\xff" * 64,
    ],
)
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
    (tmp_path / "notes" / "left.part").write_text(f"{DIGEST}\n{LOOKS}\n")
    (tmp_path / "notes" / "binary").write_bytes(b"\xff")
    notes.sweep(lambda digest: digest == DIGEST)
    assert notes.find(ref()) == DIGEST
    assert notes.find(ref("two")) is None
    assert len(list((tmp_path / "notes").iterdir())) == 1


def test_of_too_many_notes_the_oldest_go(tmp_path: Path) -> None:
    notes = DigestNotes(tmp_path / "notes", max_notes=3)
    seen: set[Path] = set()
    for number in range(5):
        notes.write(ref(str(number)), DIGEST)
        (new,) = set((tmp_path / "notes").iterdir()) - seen
        seen.add(new)
        os.utime(new, (number, number))
    notes.sweep(lambda _: True)
    assert [notes.find(ref(str(number))) for number in range(5)] == [None] * 2 + [DIGEST] * 3
