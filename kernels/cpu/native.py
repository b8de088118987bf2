"""Compiles the C files beside it with the machine's C compiler, once, and calls them.

The library is kept in the user's cache folder, under a digest of its source, its flags and the
machine. Where there is no compiler, `load` returns None and torch computes instead.

Every function takes one struct of numbers and pointers. Those that a decoder is made of share their
work among the threads of a pool; they are there on machines with AVX512-BF16 only.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from polydelta.kernels.cpu.arena import Arena

logger = logging.getLogger(__name__)

# Compiled as one, in this order.
_SOURCES = (
    "bfloat16.c", "low_rank.c", "quantized_low_rank.c", "deltas.c", "one_bit.c", "fusing.c",
)  # fmt: skip
_DECODER_SOURCES = (
    "threads.c", "lanes.c", "products.c", "quantized.c", "layers.c", "attention.c", "pages.c",
    "shrink_expand.c", "step_adapters.c", "groups.c", "kv_formats.c", "kv_ranged.c", "kv_rows.c",
    "kv_reading.c", "kv_select.c", "kv_stream.c", "kv_attend.c", "kv_store.c", "kv_notes.c",
    "kv_evict.c", "kv_spread.c", "kv_blocks.c", "kv_prompts.c",
)  # fmt: skip
_DELTAS = (
    "add_low_rank", "add_quantized_low_rank", "add_sparse", "add_columns", "add_rows",
    "add_kronecker", "add_circulant", "add_top_k", "add_one_bit", "add_bias", "scale", "rotate",
)  # fmt: skip
_DECODER = (
    "multiply", "multiply_quantized", "pack", "rms_norm", "embed_positions", "silu_mul", "add",
    "gather", "store_kv", "attend", "write_pages", "add_group", "multiply_group", "argmax",
    "store_tokens", "encode_pages", "note_tokens", "attend_kv", "clear_rows", "note_attention",
    "replace_tokens", "replay", "spread_heads", "attend_blocks",
)  # fmt: skip
# Sums may be taken in any order, or no loop of them becomes vectors. Not -ffast-math: a library
# linked with it switches subnormal numbers off in the whole process when it is loaded.
_FLAGS = (
    "-O3",
    "-march=native",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-pthread",
)


class Struct:
    """A struct in C of numbers and pointers, which take 8 bytes each, so that there are no gaps.
    Keeps alive what the pointers point to."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self._fields = fields
        self._memory = (ctypes.c_int64 * len(fields))(*map(_number, fields))
        self.address = ctypes.addressof(self._memory)

    @property
    def num_elements(self) -> int:
        """Of all tensors in it."""
        tensors = [field.numel() for field in self._fields if isinstance(field, Tensor)]
        structs = [field.num_elements for field in self._fields if isinstance(field, Struct)]
        return sum(tensors) + sum(structs)

    def assume(self, other: Struct) -> None:
        """Takes the fields of another struct of its kind, where it lies."""
        self._fields = other._fields
        ctypes.memmove(self.address, other.address, ctypes.sizeof(self._memory))


# A number, or what a pointer points to; None is NULL.
Field = int | float | Tensor | Struct | None


def _number(field: Field) -> int:
    match field:
        case None:
            return 0
        case Struct():
            return field.address
        case Tensor():
            return field.data_ptr()
        case float():
            return float_bits(field)
        case _:
            return field


def float_bits(value: float) -> int:
    """A double, as an integer of as many bits."""
    return int.from_bytes(struct.pack("<d", value), "little", signed=True)


class _Recorded(threading.local):
    """What a thread has called since it began to record; None where it does not. Another one may
    pack weights meanwhile."""

    calls: list[tuple[str, Struct]] | None = None


class NativePool:
    """Functions that share their work among threads; for one caller at a time."""

    def __init__(self, library: ctypes.CDLL, threads: int) -> None:
        library.polydelta_open_pool.restype = ctypes.c_void_p
        self._address = ctypes.c_void_p(library.polydelta_open_pool(ctypes.c_int64(threads)))
        # Not at the process's exit: another thread may be computing then.
        weakref.finalize(self, library.polydelta_close_pool, self._address).atexit = False
        self._functions = {name: getattr(library, f"polydelta_{name}") for name in _DECODER}
        self._arena = Arena()
        self._recorded = _Recorded()

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """What a function writes to."""
        return self._arena.empty(shape, dtype)

    def call(self, name: str, *fields: Field) -> None:
        """fields: of the function's struct in C, in their order."""
        if self._recorded.calls is not None:
            self._recorded.calls.append((name, Struct([self._arena.lasting(f) for f in fields])))
        memory = (ctypes.c_int64 * len(fields))(*map(_number, fields))
        self._functions[name](self._address, memory)

    def record(self, run: Callable[[], Tensor]) -> tuple[Struct, Tensor]:
        """What `run` calls, while it does so, for `replay`; and what it returns."""
        recorded: list[tuple[str, Struct]] = []
        self._recorded.calls = recorded
        try:
            result = run()
        finally:
            self._recorded.calls = None
        fields: list[Field] = []
        for name, task in recorded:
            function = ctypes.cast(self._functions[name], ctypes.c_void_p)
            fields += (function.value or 0, task)
        return Struct((len(recorded), Struct(fields))), result

    def replay(self, recording: Struct) -> None:
        self._functions["replay"](self._address, ctypes.c_void_p(recording.address))


class NativeLibrary:
    """The loaded library and its workspace; for one thread at a time."""

    def __init__(self, path: Path) -> None:
        # PyDLL: the calls take microseconds, less than giving the interpreter's lock away and back.
        library = ctypes.PyDLL(str(path))
        self._path = path
        # Whether the machine has what the kernels of a decoder need.
        self.computes_decoders = hasattr(library, "polydelta_open_pool")
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        # By what they are called in C: y, its stride, x, its stride, rows, columns of x, a struct
        # with the delta, scratch.
        self.deltas = {name: getattr(library, f"polydelta_{name}") for name in _DELTAS}
        for function in self.deltas.values():
            function.argtypes = (
                pointer, integer, pointer, integer, integer, integer, pointer, pointer,
            )  # fmt: skip
            function.restype = None
        self._unpack_signs = library.polydelta_unpack_signs
        self._unpack_signs.argtypes = (pointer, pointer, integer, integer, integer)
        self._unpack_signs.restype = None
        # By the bytes of an element.
        self._scatters = {2: library.polydelta_scatter_16, 4: library.polydelta_scatter_32}
        for scatter in self._scatters.values():
            scatter.argtypes = (pointer, pointer, pointer, integer)
            scatter.restype = None
        self._scratch = torch.empty(0)

    def open_pool(self, threads: int) -> NativePool:
        """What a decoder is made of, where `computes_decoders`. threads: the caller's included."""
        return NativePool(ctypes.CDLL(str(self._path)), threads)

    def scratch(self, count: int) -> int:
        """Address of room for `count` floats, valid until the next call."""
        if self._scratch.numel() < count:
            self._scratch = torch.empty(count)
        return self._scratch.data_ptr()

    def unpack_signs(self, bits: Tensor, in_features: int) -> Tensor:
        """bits: `OneBitWeights.bits` -> `[out, in]` bfloat16, 1 and -1."""
        signs = torch.empty(len(bits), in_features, dtype=torch.bfloat16)
        self._unpack_signs(
            signs.data_ptr(), bits.data_ptr(), bits.stride(0), len(bits), in_features
        )
        return signs

    def scatter(self, memory: Tensor, places: Tensor, values: Tensor) -> None:
        """`memory[places] = values`, for 2 or 4 bytes an element; the quicker the more the places
        ascend. memory: `[*]`; places: `[n]` int32, each within it; values: `[n]`; all dense."""
        self._scatters[values.element_size()](
            memory.data_ptr(), places.data_ptr(), values.data_ptr(), len(places)
        )


def load() -> NativeLibrary | None:
    """The library, compiled if it is not in the cache; None where it cannot be had."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    folder = files("polydelta.kernels.cpu")
    files_of = {name: folder.joinpath(name).read_bytes() for name in _SOURCES + _DECODER_SOURCES}
    decoder = b"".join(files_of[name] for name in _DECODER_SOURCES)
    source = b"".join(files_of[name] for name in _SOURCES)
    source += b"\n#if defined(__AVX512BF16__) && defined(__linux__)\n" + decoder + b"#endif\n"
    key = hashlib.sha256(source + " ".join((compiler, *_FLAGS, _machine())).encode()).hexdigest()
    path = _cache_folder() / f"kernels-{key[:16]}.so"
    try:
        if not path.is_file():
            _compile(compiler, source, path)
        return NativeLibrary(path)
    except subprocess.CalledProcessError as error:
        logger.warning(
            "%s cannot compile our kernels, torch computes: %s", compiler, error.stderr.decode()
        )
    except OSError as error:
        logger.warning("our kernels cannot be kept or loaded, torch computes: %s", error)
    return None


def _compile(compiler: str, source: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *_FLAGS, "-x", "c", "-", "-lm", "-o", str(built)]
        subprocess.run(command, input=source, check=True, capture_output=True)
        built.replace(path)  # another process may be at it too: whoever is last wins, whole


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "polydelta"


def _machine() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
