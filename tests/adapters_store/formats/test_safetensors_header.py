from __future__ import annotations

import json
from io import BytesIO
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from polydelta.adapters_store.formats.safetensors_header import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Header,
    StoredTensor,
    read_header,
)


def packed(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(content) if length is None else length).to_bytes(8, "little") + content + data


def read(content: bytes) -> Header:
    return read_header(BytesIO(content), len(content))


def entry(dtype: object = "F32", shape: object = (3,), begin: object = 0, end: object = 12) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_that_safetensors_wrote_is_read() -> None:
    tensors = {"b": torch.ones(3, 5), "a": torch.ones(7, dtype=torch.bfloat16), "c": torch.ones(())}
    header = read(save(tensors, {"format": "pt"}))
    assert header.metadata == {"format": "pt"}
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "a": ("BF16", (7,)),
        "b": ("F32", (3, 5)),
        "c": ("F32", ()),
    }
    assert sum(t.end - t.begin for t in header.tensors.values()) == 15 * 4 + 7 * 2 + 4


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(3, dtype=dtype)
        for dtype in (torch.bool, torch.uint8, torch.int16, torch.float16, torch.int64)
    ]
    + [torch.ones(3).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)],
    ids=lambda tensor: str(tensor.dtype),
)
def test_sizes_of_dtypes_are_those_of_torch(tensor: Tensor) -> None:
    (stored,) = read(save({"t": tensor})).tensors.values()
    assert DTYPE_BYTES[stored.dtype] == tensor.element_size()


def test_tensors_without_elements_take_no_room() -> None:
    header = read(packed({"a": entry(shape=[0, 5], end=0), "b": entry()}, bytes(12)))
    assert header.tensors["a"] == StoredTensor("F32", (0, 5), 0, 0)


def test_nothing_is_read_beyond_the_header() -> None:
    content = save({"a": torch.ones(100)})
    file = BytesIO(content)
    read_header(file, len(content))
    assert file.tell() == len(content) - 400


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**60, MAX_HEADER_BYTES + 1, 100])
def test_a_length_beyond_the_file_is_refused_before_it_is_read(length: int) -> None:
    class Unread(BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size == 8
            return super().read(size)

    content = packed({}, length=length)
    with pytest.raises(ValueError, match=f"claims {length} bytes"):
        read_header(Unread(content), len(content))


def test_a_length_beyond_the_limit_is_refused_though_the_file_has_it() -> None:
    # The size is what the caller says, so no such file is needed.
    content = packed({}, length=MAX_HEADER_BYTES + 1)
    with pytest.raises(ValueError, match=f"more than {MAX_HEADER_BYTES}"):
        read_header(BytesIO(content), 1 << 40)


def test_a_file_that_became_shorter_is_refused() -> None:
    content = packed({"a": entry()}, bytes(12))
    with pytest.raises(ValueError, match="became shorter"):
        read_header(BytesIO(content[:20]), len(content))


@pytest.mark.parametrize(
    "header",
    [b"[" * 500_000, b'{"a":' * 500_000, b"{" + b'"a":[],' * 400_000, b"[[" + b"[]," * 300_000],
    ids=["lists", "objects", "many lists", "a list of lists"],
)
def test_a_header_of_many_brackets_is_refused_before_it_is_parsed(
    header: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "polydelta.adapters_store.formats.safetensors_header.parse_json",
        lambda content: pytest.fail("it was parsed"),
    )
    if header.count(b"[") + header.count(b"{") <= 8 * MAX_TENSORS:
        header *= 2
    with pytest.raises(ValueError, match="more than"):
        read(packed(header))


def test_a_deep_header_within_the_count_is_refused() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        read(packed(b"[" * 100_000))


A = b'"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}'
HUGE = 10**400

REFUSED: dict[str, tuple[object, str]] = {
    "no JSON": (b"{'a': 1}", "not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "half a character": (b'{"\\ud800": 1}', "not valid JSON"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON number"),
    "a list": ([], r"\[\] instead of an object"),
    "a tensor twice": (b"{" + A + b"," + A + b"}", "'a' is there twice"),
    "a field twice": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "'dtype' is there twice"),
    "metadata of numbers": ({"__metadata__": {"n": 1}}, "only text"),
    "metadata as a list": ({"__metadata__": []}, "only text"),
    "no entry": ({"a": 3}, "is described by 3"),
    "a field too few": ({"a": {"dtype": "F32", "shape": [3]}}, "is described by"),
    "a field too many": ({"a": entry() | {"scale": 2}}, "is described by"),
    "an unknown dtype": ({"a": entry("F4")}, "dtype 'F4', which is not one of"),
    "a complex dtype": ({"a": entry("C64")}, "dtype 'C64', which is not one of"),
    "a dtype that is a list": ({"a": entry(["F32"])}, r"dtype \['F32'\]"),
    "a negative dimension": ({"a": entry(shape=[-3, -1])}, r"shape \[-3, -1\]"),
    "a fraction": ({"a": entry(shape=[3.0])}, r"shape \[3.0\]"),
    "a truth value": ({"a": entry(shape=[3, True])}, r"shape \[3, True\]"),
    "a shape that is text": ({"a": entry(shape="3")}, "shape '3'"),
    "nine dimensions": ({"a": entry(shape=[3] + [1] * 8)}, "up to 8 whole numbers"),
    "too many elements": ({"a": entry(shape=[2**40, 2**40])}, "shape"),
    "too many behind a zero": ({"a": entry(shape=[0, HUGE], end=0)}, "more than"),
    "one offset": ({"a": entry() | {"data_offsets": [0]}}, "instead of a begin and an end"),
    "negative offsets": ({"a": entry(begin=-12, end=0)}, r"data_offsets \[-12, 0\]"),
    "offsets that swap": ({"a": entry(begin=12, end=0)}, "takes 12 bytes"),
    "offsets of another shape": ({"a": entry(end=8)}, "takes 12 bytes"),
    "an end beyond the file": ({"a": entry(shape=[4], end=16)}, "which has 12"),
    "far beyond the file": ({"a": entry(begin=HUGE, end=HUGE + 12)}, "leaves a gap"),
    "a gap at the start": ({"a": entry(shape=[2], begin=4)}, "leaves a gap before it"),
    "a gap inside": (
        {"a": entry(shape=[1], end=4), "b": entry(shape=[1], begin=8)},
        "'b' leaves a gap",
    ),
    "an overlap": ({"a": entry(), "b": entry(shape=[1], begin=8)}, "'b' overlaps another one"),
    "the same place": ({"a": entry(), "b": entry()}, "'b' overlaps another one"),
    "data that nobody claims": ({"a": entry(shape=[2], end=8)}, "take 8 bytes, .* has 12"),
    "no tensors but data": ({}, "take 0 bytes"),
    "a long name": ({"a" * 300: entry()}, "too long"),
    "a name with a newline": ({"a\n": entry()}, "cannot be shown"),
    "a dimension of many digits": (b'{"a": {"dtype": 1' + b"0" * 5000 + b"}}", "not valid JSON"),
}


@pytest.mark.parametrize(("header", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_header_is_refused_with_what_is_wrong(header: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read(packed(header, bytes(12)))
    assert len(str(error.value)) < 500


def test_more_tensors_than_the_limit_are_refused() -> None:
    header = {f"t{number}": entry(shape=[0], end=0) for number in range(MAX_TENSORS + 1)}
    with pytest.raises(ValueError, match=f"lists {MAX_TENSORS + 1} tensors"):
        read(packed(header))
