"""Compiles the C files beside it with the machine's C compiler, once, and calls them.

The library is kept in the user's cache folder, under a digest of its source, its flags and the
machine. Where there is no compiler, `load` returns None and torch computes instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

# Compiled as one, in this order.
_SOURCES = ("bfloat16.c", "low_rank.c", "deltas.c", "one_bit.c", "fusing.c")
_DELTAS = (
    "add_low_rank", "add_sparse", "add_columns", "add_rows", "add_kronecker", "add_circulant",
    "add_top_k", "add_one_bit", "scale", "rotate",
)  # fmt: skip
# Sums may be taken in any order, or no loop of them becomes vectors. Not -ffast-math: a library
# linked with it switches subnormal numbers off in the whole process when it is loaded.
_FLAGS = (
    "-O3",
    "-march=native",
    "-fassociative-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)


class NativeLibrary:
    """The loaded library and its workspace; for one thread at a time."""

    def __init__(self, path: Path) -> None:
        # PyDLL: the calls take microseconds, less than giving the interpreter's lock away and back.
        library = ctypes.PyDLL(str(path))
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
    source = b"".join(folder.joinpath(name).read_bytes() for name in _SOURCES)
    key = hashlib.sha256(source + " ".join((compiler, *_FLAGS, _machine())).encode()).hexdigest()
    path = _cache_folder() / f"kernels-{key[:16]}.so"
    try:
        if not path.is_file():
            _compile(compiler, source, path)
        return NativeLibrary(path)
    except (OSError, subprocess.CalledProcessError):
        return None


def _compile(compiler: str, source: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *_FLAGS, "-x", "c", "-", "-o", str(built)]
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
