from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from itertools import count
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from polydelta.adapters_store import packed_file
from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Adapter, Invocation, Prefix, Prompt
from polydelta.adapters_store.packed import PackedAdapter, PackedLayer
from polydelta.adapters_store.packed_deltas import LowRankBlock, PackedDelta
from polydelta.adapters_store.packed_file import (
    MAGIC,
    UnreadableFileError,
    in_memory,
    packed_digest,
    read_packed,
    write_packed,
)
from polydelta.adapters_store.packed_tensors import (
    ALIGNMENT,
    PackedMatrix,
    PackedQuantizedMatrix,
    PackedVector,
)
from polydelta.adapters_store.packing import pack

Make = Callable[..., PackedAdapter]


@pytest.fixture
def make(
    adapter_files: Any,
    layout: BaseLayout,
    make_lora_tensors: Callable[..., Any],
) -> Make:
    """A packed adapter: a LoRA on two layers of three, SHiRA entries, both in one linear, these
    beside virtual tokens or switched on by tokens, virtual tokens alone, or nothing."""

    def make(kind: str = "mixed", dtype: torch.dtype = torch.float32) -> PackedAdapter:
        torch.manual_seed(3)
        shira = adapter_files.read(adapter_files.shira())
        modules = ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj")
        tensors = {name: t for m in modules for name, t in make_lora_tensors(m, rank=3).items()}
        targets = ["o_proj", "q_proj"]
        lora = adapter_files.read(adapter_files.write("lora", tensors, r=3, target_modules=targets))
        merged = dict(lora.modules)
        for module, deltas in shira.modules.items():
            merged[module] = (*merged.get(module, ()), *deltas)
        prefix = Prefix(torch.randn(layout.num_layers, 2, 5, layout.num_kv_heads, layout.head_dim))
        made = {
            "lora": lora.modules,
            "shira": shira.modules,
            "mixed": merged,
            "prefix": {**shira.modules, MODEL: (prefix,)},
            "prompt": {MODEL: (Prompt(torch.randn(7, layout.hidden_size)),)},
            "invocation": {**lora.modules, MODEL: (Invocation((3, 39, 3)),)},
            "nothing": {},
        }
        return pack(Adapter("id", 1, "d" * 64, "LORA", made[kind]), layout, dtype)

    return make


def described(value: Any) -> Any:
    """All that is known of packed data, as what can be compared: they are equal only as objects."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, bytes(value.flatten().view(torch.uint8).numpy())
    if is_dataclass(value):
        return type(value), [described(getattr(value, field.name)) for field in fields(value)]
    return [described(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "kind", ["lora", "shira", "mixed", "prefix", "prompt", "invocation", "nothing"]
)
def test_what_is_read_is_what_was_packed_bit_for_bit(
    make: Make, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    packed = make(kind, dtype)
    write_packed(packed, tmp_path / "new" / "folder" / "file")
    read = read_packed(tmp_path / "new" / "folder" / "file")
    assert described(read) == described(packed)
    assert (read.nbytes, read.bytes_per_layer) == (packed.nbytes, packed.bytes_per_layer)
    assert (read.traits, read.fusable) == (packed.traits, packed.fusable)


def made_up(kind: Any, numbers: Any) -> Any:
    """An object of a kind of packed data, every number in it another one."""
    match kind:
        case _ if is_dataclass(kind):
            return kind(*(made_up(hint, numbers) for hint in get_type_hints(kind).values()))
        case _ if kind is int:
            return next(numbers)
        case _ if kind is bool:
            return next(numbers) % 2 == 0
        case UnionType():
            # One after the other.
            kinds = get_args(kind)
            return made_up(kinds[next(numbers) % len(kinds)], numbers)
        case _ if kind is torch.dtype:
            return (torch.float32, torch.int64, torch.bfloat16)[next(numbers) % 3]
        case _:
            # Two of a tuple of any length.
            hints = [get_args(kind)[0] if hint is ... else hint for hint in get_args(kind)]
            return tuple(made_up(hint, numbers) for hint in hints)


def test_every_kind_of_packed_delta_survives_whatever_it_says(tmp_path: Path) -> None:
    numbers = count(1)
    layers = tuple(
        PackedLayer(
            torch.randint(256, (size * ALIGNMENT,), dtype=torch.uint8),
            tuple(made_up(kind, numbers) for kind in get_args(PackedDelta)),
        )
        for size in (3, 0, 5)
    )
    packed = PackedAdapter("d" * 64, torch.bfloat16, layers)
    write_packed(packed, tmp_path / "file")
    read = read_packed(tmp_path / "file")
    assert described(read) == described(packed)
    inner = {type(part) for layer in read.layers for delta in layer.deltas for part in parts(delta)}
    matrices = {PackedMatrix, PackedQuantizedMatrix}
    assert inner >= {*get_args(PackedDelta), *matrices, LowRankBlock, PackedVector}


def parts(value: Any) -> list[Any]:
    """All objects within one."""
    if is_dataclass(value):
        return [value, *(p for field in fields(value) for p in parts(getattr(value, field.name)))]
    return [part for one in value for part in parts(one)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("kind", ["mixed", "prefix", "prompt"])
def test_data_in_the_file_is_aligned_as_in_the_pool(make: Make, tmp_path: Path, kind: str) -> None:
    packed = make(kind)
    write_packed(packed, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    assert content.startswith(MAGIC)
    assert (len(content) - packed.nbytes) % ALIGNMENT == 0
    data = [layer.data for layer in packed.layers]
    if packed.prefix is not None:
        data.append(packed.prefix.values)
    assert content.endswith(b"".join(bytes(piece.numpy()) for piece in data))


def test_what_was_read_outlives_its_file(make: Make, tmp_path: Path) -> None:
    packed = make("prefix")
    write_packed(packed, tmp_path / "file")
    read = read_packed(tmp_path / "file")
    (tmp_path / "file").unlink()
    assert described(read) == described(packed)


def test_writing_to_what_was_read_does_not_change_the_file(make: Make, tmp_path: Path) -> None:
    packed = make()
    write_packed(packed, tmp_path / "file")
    read_packed(tmp_path / "file").layers[1].data.zero_()
    assert described(read_packed(tmp_path / "file")) == described(packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixed", "prefix", "prompt", "invocation"])
def test_in_memory_it_is_equal_and_in_one_piece(
    make: Make, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    packed = make(kind, dtype)
    write_packed(packed, tmp_path / "file")
    read = read_packed(tmp_path / "file")
    for whole in (in_memory(packed), in_memory(read)):
        assert described(whole) == described(packed)
        pieces = [layer.data for layer in whole.layers]
        if whole.prefix is not None:
            pieces.append(whole.prefix.values)
        assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1
        # Nothing beside it, and everything within: a copy of it would be one copy.
        assert pieces[0].untyped_storage().nbytes() == whole.nbytes
    assert in_memory(read) is read


@pytest.mark.parametrize("kind", ["shira", "prefix", "prompt"])
def test_a_file_that_is_cut_anywhere_is_unreadable(make: Make, tmp_path: Path, kind: str) -> None:
    write_packed(make(kind), tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    rest = list(range(300, len(content) - 70, 13))
    for end in (*range(300), *rest, *range(len(content) - 70, len(content))):
        (tmp_path / "cut").write_bytes(content[:end])
        with pytest.raises(UnreadableFileError):
            read_packed(tmp_path / "cut")


@pytest.mark.parametrize("kind", ["mixed", "prefix"])
def test_a_file_that_goes_on_is_unreadable(make: Make, tmp_path: Path, kind: str) -> None:
    write_packed(make(kind), tmp_path / "file")
    with open(tmp_path / "file", "ab") as file:
        file.write(b"\0")
    with pytest.raises(UnreadableFileError, match="bytes of data instead of"):
        read_packed(tmp_path / "file")


@pytest.mark.parametrize("kind", ["shira", "prefix", "invocation"])
def test_a_damaged_byte_before_the_data_makes_the_file_unreadable(
    make: Make, tmp_path: Path, kind: str
) -> None:
    packed = make(kind)
    write_packed(packed, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    header = content[: len(content) - packed.nbytes].rstrip(b"\0")
    chance = random.Random(5)
    for place in (*range(80), *chance.sample(range(80, len(header)), 300)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(UnreadableFileError):
            read_packed(tmp_path / "damaged")


@pytest.mark.parametrize("kind", ["shira", "prefix", "prompt"])
def test_damaged_data_makes_the_file_unreadable(make: Make, tmp_path: Path, kind: str) -> None:
    packed = make(kind, torch.bfloat16)
    write_packed(packed, tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    chance = random.Random(6)
    start = len(content) - packed.nbytes
    for place in (*chance.sample(range(start, len(content)), 200), len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(UnreadableFileError, match="damaged"):
            read_packed(tmp_path / "damaged")
    # A block that was never written.
    (tmp_path / "damaged").write_bytes(content[: start + 64] + bytes(packed.nbytes - 64))
    with pytest.raises(UnreadableFileError, match="damaged"):
        read_packed(tmp_path / "damaged")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 4096,
        b"{}",
        MAGIC,
        MAGIC + b"\xff" * 40,
        MAGIC + b"\0" * 4096,
        MAGIC[:-2] + b"0\n" + b"\0" * 4096,
    ],
)
def test_a_foreign_file_is_unreadable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UnreadableFileError):
        read_packed(tmp_path / "file")


def test_a_file_of_another_version_is_unreadable(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr(packed_file, "MAGIC", MAGIC.replace(b"packed", b"folded"))
        write_packed(make(), tmp_path / "file")
    with pytest.raises(UnreadableFileError, match="of another version"):
        read_packed(tmp_path / "file")


def test_what_is_no_file_is_unreadable(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing" / "file"):
        with pytest.raises(UnreadableFileError):
            read_packed(path)


def test_the_digest_is_told_from_the_header_and_only_of_a_whole_file(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_packed(make(), tmp_path / "file")
    whole = (tmp_path / "file").read_bytes()
    (tmp_path / "short").write_bytes(whole[:-1])
    (tmp_path / "long").write_bytes(whole + b"x")
    (tmp_path / "damaged").write_bytes(whole.replace(b'"digest"', b'"digesT"'))

    def no_memory(nbytes: int) -> None:
        raise AssertionError("its layers were read")

    monkeypatch.setattr(packed_file, "_memory", no_memory)
    assert packed_digest(tmp_path / "file") == make().digest
    for name in ("short", "long", "damaged", "missing"):
        with pytest.raises(UnreadableFileError):
            packed_digest(tmp_path / name)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there_before(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("older")
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="No space left"):
        write_packed(make(), tmp_path / "file")
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"file"}
    assert (tmp_path / "file").read_text() == "older"


def test_a_write_that_is_interrupted_leaves_nothing(make: Make, tmp_path: Path) -> None:
    packed = make()

    class Interrupted:
        def __init__(self) -> None:
            self.asked = False

        def numpy(self) -> Any:
            if self.asked:
                raise KeyboardInterrupt
            # For the sum in the header.
            self.asked = True
            return np.zeros(1, np.uint8)

        def numel(self) -> int:
            return 1

    layer = PackedLayer(Interrupted(), ())  # type: ignore[arg-type]
    broken = PackedAdapter(packed.digest, packed.dtype, (*packed.layers, layer))
    with pytest.raises(KeyboardInterrupt):
        write_packed(broken, tmp_path / "packed" / "file")
    assert list((tmp_path / "packed").iterdir()) == []
