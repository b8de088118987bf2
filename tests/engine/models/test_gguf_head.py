"""The head of a GGUF file, against the library's writer and its reader."""

from __future__ import annotations

from pathlib import Path
from struct import pack

import gguf
import numpy as np
import pytest

from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.gguf_file import GgufFile
from polydelta.engine.models.gguf_head import read_head

ALIGNMENT = 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Every type of value, and tensors of odd shapes."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"a.{kind}", 100)
    writer.add_int64("a.negative", -(2**62))
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve \N{SNOWMAN}")
    writer.add_string("a.empty", "")
    writer.add_array("a.strings", ["", "Ġthe", "\N{SNOWMAN}"])
    writer.add_array("a.integers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -0.25])
    writer.add_custom_alignment(ALIGNMENT)
    random = np.random.default_rng(0)
    rows = random.standard_normal((7, 64), dtype=np.float32)
    writer.add_tensor("vector", rows[0, :5].copy())
    writer.add_tensor("half", rows.astype(np.float16)[:, :3].copy())
    for name, kind in (("eight", "Q8_0"), ("four", "Q4_1")):
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(rows, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_and_tensors_are_those_that_the_library_reads(path: Path) -> None:
    head, reader = read_head(path), gguf.GGUFReader(path)
    theirs = {name: field.contents() for name, field in reader.fields.items()}
    counts = {name: value for name, value in theirs.items() if name.startswith("GGUF.")}
    assert head.metadata == {n: value for n, value in theirs.items() if n not in counts}
    assert list(head.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        mine = head.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.kind == tensor.tensor_type
        assert mine.data.tobytes() == tensor.data.tobytes()


def test_a_file_cut_anywhere_in_its_head_is_one_clear_error(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in range(0, whole.index(b"four") + 4, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf is not a readable GGUF file"):
            GgufFile(cut)


def head_of(tmp_path: Path, *parts: bytes, version: int = 3, values: int = 0, tensors: int = 0):
    """A head of raw parts, read."""
    path = tmp_path / "raw.gguf"
    path.write_bytes(b"GGUF" + pack("<IQQ", version, tensors, values) + b"".join(parts) + bytes(64))
    return read_head(path)


def string(text: str) -> bytes:
    return pack("<Q", len(text.encode())) + text.encode()


def tensor(name: str, *sizes: int, kind: int = 0, offset: int = 0) -> bytes:
    form = f"<I{len(sizes)}QIQ"
    return string(name) + pack(form, len(sizes), *sizes, kind, offset)


def test_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its version is 1; 2 and 3 can be read"):
        head_of(tmp_path, version=1)


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    value = string("key") + pack("<IB", gguf.GGUFValueType.UINT8, 1)
    with pytest.raises(ValueError, match="two entries 'key'"):
        head_of(tmp_path, value, value, values=2)
    with pytest.raises(ValueError, match="two entries 'w'"):
        head_of(tmp_path, tensor("w", 3), tensor("w", 3), tensors=2)


@pytest.mark.parametrize("alignment", [0, 24])
def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path: Path, alignment: int) -> None:
    value = string("general.alignment") + pack("<II", gguf.GGUFValueType.UINT32, alignment)
    with pytest.raises(ValueError, match="no power of two"):
        head_of(tmp_path, value, values=1)


def test_an_unknown_type_of_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the type 77"):
        head_of(tmp_path, string("key") + pack("<I", 77), values=1)


@pytest.mark.parametrize(
    ("sizes", "kind"), [((0, 5), 0), ((2**40, 2**40), 0), ((33, 2), 8), ((5, 2), 99)]
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path: Path, sizes: tuple, kind: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        head_of(tmp_path, tensor("w", *sizes, kind=kind), tensors=1)


@pytest.mark.parametrize("count", [2**20, 2**63, 2**64 - 1])
def test_counts_beyond_the_end_of_the_file_take_no_memory(tmp_path: Path, count: int) -> None:
    for item in (gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING):
        array = string("key") + pack("<IIQ", gguf.GGUFValueType.ARRAY, item, count)
        path = tmp_path / "many.gguf"
        path.write_bytes(b"GGUF" + pack("<IQQ", 3, 0, 1) + array + bytes(7))
        with pytest.raises(ModelError, match=r"many\.gguf is not a readable GGUF file"):
            GgufFile(path)
