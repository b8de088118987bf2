from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import FORMATS, reader
from polydelta.adapters_store.formats.files import MAX_CONFIG_BYTES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def refusal(adapter_files: Any, folder: Path) -> str:
    """Why the folder is refused; nothing of the server's file system may be in it."""
    with pytest.raises(InvalidAdapterError) as error:
        adapter_files.read(folder)
    assert str(adapter_files.root) not in str(error.value)
    return str(error.value)


def test_an_adapter_has_the_id_and_version_of_its_ref(adapter_files: Any) -> None:
    adapter = adapter_files.read(adapter_files.lora("mine"))
    assert (adapter.id, adapter.version, adapter.kinds) == ("mine", 1, ("LowRank",))


def test_equal_content_has_equal_digests_whatever_its_name(adapter_files: Any) -> None:
    one = adapter_files.lora("one")
    two = adapter_files.lora("two")
    (two / WEIGHTS).write_bytes((one / WEIGHTS).read_bytes())
    assert adapter_files.read(one).digest == adapter_files.read(two).digest


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_change_of_either_file_changes_the_digest(file: str, adapter_files: Any) -> None:
    folder = adapter_files.lora()
    before = adapter_files.read(folder).digest
    if file == CONFIG:
        (folder / CONFIG).write_text((folder / CONFIG).read_text() + "\n")
    else:
        weights = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(weights[:-4] + bytes(4))
    assert adapter_files.read(folder).digest != before


@pytest.mark.parametrize("peft_type", [None, "NEW", "lora", ["LORA"], 3])
def test_a_format_that_is_not_read_is_refused_with_those_that_are(
    peft_type: object, adapter_files: Any
) -> None:
    message = refusal(adapter_files, adapter_files.lora(peft_type=peft_type))
    assert str(peft_type) in message
    assert all(name in message for name in FORMATS)


def test_a_folder_with_only_a_pickle_is_refused_with_the_remedy(adapter_files: Any) -> None:
    folder = adapter_files.lora()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    message = refusal(adapter_files, folder)
    assert "adapter_model.bin is a pickle" in message
    assert "safe_serialization=True" in message


@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_under_the_name_of_safetensors_is_refused_as_a_pickle(
    zipped: bool, adapter_files: Any
) -> None:
    folder = adapter_files.lora()
    if zipped:
        torch.save({"a": torch.ones(2)}, folder / WEIGHTS)
    else:
        (folder / WEIGHTS).write_bytes(pickle.dumps({"a": [1.0, 2.0]}))
    assert "pickle under another name" in refusal(adapter_files, folder)


@pytest.mark.parametrize("kept", [0, 4, 40, -1])
def test_a_truncated_weights_file_is_refused(kept: int, adapter_files: Any) -> None:
    folder = adapter_files.lora()
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    assert f"{WEIGHTS} is not a complete safetensors file" in refusal(adapter_files, folder)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(file: str, adapter_files: Any) -> None:
    folder = adapter_files.lora()
    (folder / file).unlink()
    assert refusal(adapter_files, folder).startswith(file)


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_folder_in_place_of_a_file_is_refused(file: str, adapter_files: Any) -> None:
    folder = adapter_files.lora()
    (folder / file).unlink()
    (folder / file).mkdir()
    assert f"{file} cannot be read" in refusal(adapter_files, folder)


def test_a_config_that_is_no_json_is_refused(adapter_files: Any) -> None:
    folder = adapter_files.lora()
    (folder / CONFIG).write_text("{'peft_type': 'LORA'}")
    assert "not valid JSON" in refusal(adapter_files, folder)


def test_a_config_of_more_than_the_limit_is_refused(adapter_files: Any) -> None:
    folder = adapter_files.lora()
    (folder / CONFIG).write_text((folder / CONFIG).read_text() + " " * MAX_CONFIG_BYTES)
    assert f"larger than {MAX_CONFIG_BYTES} bytes" in refusal(adapter_files, folder)


def test_files_that_change_while_they_are_read_are_not_mixed(
    adapter_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter_files.lora()

    def replaced_before(path: Path) -> bytes:
        (path / CONFIG).write_text((path / CONFIG).read_text() + " ")
        return (path / WEIGHTS).read_bytes()

    monkeypatch.setattr(reader, "read_weights_bytes", replaced_before)
    assert "have changed since it was asked for" in refusal(adapter_files, folder)
