from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.importing.pickle_file import load_pickle


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_tensors_and_numbers_are_read(tmp_path: Path) -> None:
    content = {
        "t": torch.randn(2, 3),
        "p": torch.nn.Parameter(torch.tensor(0.5)),
        "n": [np.int64(3), 4, np.int32(5)],
        "size": torch.Size((2, 3)),
    }
    torch.save(content, tmp_path / "file.bin")
    read = load_pickle(tmp_path / "file.bin")
    assert torch.equal(read["t"], content["t"])
    assert read["p"].item() == 0.5
    assert (read["n"], read["size"]) == ([3, 4, 5], (2, 3))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numbers_of_older_and_newer_numpy_are_read(module: bytes, tmp_path: Path) -> None:
    """As torch saved them before its files were archives; the class is named in the pickle."""
    path = tmp_path / "file.bin"
    torch.save(np.int64(7), path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert content.count(b"numpy._core.multiarray") == 1
    path.write_bytes(content.replace(b"numpy._core.multiarray", module))
    assert load_pickle(path) == 7


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    torch.save({"t": Trap(made)}, tmp_path / "trap.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Trap(made), protocol=2))
    for name in ("trap.bin", "plain.bin"):
        with pytest.raises(
            InvalidAdapterError, match=rf"{name} is not read: it asks for \S+, which is run"
        ):
            load_pickle(tmp_path / name)
    assert not made.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02", b"text", b"\x00" * 99])
def test_a_damaged_file_is_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(content)
    with pytest.raises(
        InvalidAdapterError, match=r"file.bin is not read: it is no file that torch.save wrote"
    ):
        load_pickle(tmp_path / "file.bin")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterError, match=r"none.bin cannot be read"):
        load_pickle(tmp_path / "none.bin")
