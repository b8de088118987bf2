from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polydelta.adapters_store.errors import StoreError
from polydelta.adapters_store.formats import adapter_folder
from polydelta.adapters_store.formats.adapter_folder import write_folder
from polydelta.adapters_store.reference import CONFIG_FILE, WEIGHTS_FILE

CONFIG = {"peft_type": "LORA", "r": 2}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor([7], dtype=torch.uint8)}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    write_folder(folder, CONFIG, TENSORS)
    assert json.loads((folder / CONFIG_FILE).read_text()) == CONFIG
    tensors = load_file(folder / WEIGHTS_FILE)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_folder(tmp_path / "out", CONFIG, TENSORS)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_a_folder_with_something_in_it_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(StoreError, match=r"is not empty.*name another"):
        write_folder(tmp_path, CONFIG, TENSORS)
    with pytest.raises(StoreError, match=r"cannot be looked into.*name another"):
        write_folder(tmp_path / "mine", CONFIG, TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_folder, "write_file", full)
    with pytest.raises(StoreError, match="No space left on device"):
        write_folder(tmp_path / "out", CONFIG, TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_folder, "check_free", lambda folder: None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(StoreError, match="cannot be written"):
        write_folder(tmp_path / "out", CONFIG, TENSORS)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
