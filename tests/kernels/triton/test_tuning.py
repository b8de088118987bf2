from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from polydelta.kernels.triton import tuning
from polydelta.kernels.triton.tuning import Tunable

NARROW, WIDE = {"num_warps": 4}, {"num_warps": 8}
KERNEL = Tunable("a kernel", (NARROW, WIDE))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    for cached in (tuning._read, tuning._path):
        cached.cache_clear()
    yield tmp_path
    for cached in (tuning._read, tuning._path):
        cached.cache_clear()


def table_of(folder: Path) -> Path:
    (path,) = (folder / "polydelta").iterdir()
    return path


def test_the_first_choice_is_taken_until_somebody_has_measured() -> None:
    assert KERNEL.options() == NARROW


def test_what_was_measured_is_kept_on_disk(cache_folder: Path) -> None:
    other = Tunable("another", (NARROW, WIDE))
    KERNEL.remember(WIDE)
    assert (KERNEL.options(), other.options()) == (WIDE, NARROW)
    other.remember(WIDE)
    tuning._read.cache_clear()
    assert (KERNEL.options(), other.options()) == (WIDE, WIDE)
    assert table_of(cache_folder).name.startswith("tuning-")


def test_a_choice_that_is_no_longer_there_is_not_taken() -> None:
    KERNEL.remember(WIDE)
    later = Tunable(KERNEL.name, ({"num_warps": 2}, NARROW))
    assert later.options() == {"num_warps": 2}


def test_what_is_not_a_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="is not among the choices of 'a kernel'"):
        KERNEL.remember({"num_warps": 64})


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a kernel": 3}', '{"a kernel": {"x": 1}}'])
def test_a_table_that_is_not_understood_is_as_if_there_were_none(
    content: str, cache_folder: Path
) -> None:
    KERNEL.remember(WIDE)
    table_of(cache_folder).write_text(content)
    tuning._read.cache_clear()
    assert KERNEL.options() == NARROW
    KERNEL.remember(WIDE)
    assert KERNEL.options() == WIDE


def test_the_interpreter_always_takes_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    KERNEL.remember(WIDE)
    monkeypatch.setattr(tuning, "INTERPRETED", True)
    assert KERNEL.options() == NARROW
