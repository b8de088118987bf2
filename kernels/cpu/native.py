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

from polydelta.kernels.ops import LowRankWeights

_SOURCES = ("low_rank.c", "fusing.c")
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


class _Block(ctypes.Structure):
    _fields_ = (
        ("out_start", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("rank_start", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("b_t", ctypes.c_void_p),
        ("b_stride", ctypes.c_int64),
    )


class _LowRank(ctypes.Structure):
    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("a", ctypes.c_void_p),
        ("a_stride", ctypes.c_int64),
        ("num_blocks", ctypes.c_int64),
        ("blocks", ctypes.c_void_p),
    )


class NativeLowRank:
    """The compiled kernel, bound to one delta's weights (bfloat16). Keeps them alive."""

    def __init__(self, library: NativeLibrary, weights: LowRankWeights) -> None:
        self._library = library
        self._weights = weights
        self._blocks = (_Block * len(weights.blocks))(
            *(
                _Block(
                    block.out_start,
                    block.b_t.shape[1],
                    block.rank_start,
                    block.b_t.shape[0],
                    block.b_t.data_ptr(),
                    block.b_t.stride(0),
                )
                for block in weights.blocks
            )
        )
        rank, in_features = weights.a.shape
        self._delta = _LowRank(
            in_features,
            rank,
            weights.a.data_ptr(),
            weights.a.stride(0),
            len(weights.blocks),
            ctypes.addressof(self._blocks),
        )
        self._address = ctypes.addressof(self._delta)
        self._scratch_per_row = in_features + rank
        self._scratch_once = max(block.b_t.shape[1] for block in weights.blocks)

    def add(self, y: Tensor, x: Tensor) -> None:
        """y `[rows, out]` += `x @ A.T @ B.T` in place; columns of both are adjacent."""
        rows = x.shape[0]
        scratch = self._library.scratch(rows * self._scratch_per_row + self._scratch_once)
        self._library.add_low_rank(
            y.data_ptr(), y.stride(0), x.data_ptr(), x.stride(0), rows, self._address, scratch
        )


class NativeLibrary:
    """The loaded library and its workspace; for one thread at a time."""

    def __init__(self, path: Path) -> None:
        # PyDLL: the calls take microseconds, less than giving the interpreter's lock away and back.
        library = ctypes.PyDLL(str(path))
        self.add_low_rank = library.polydelta_add_low_rank
        integer, pointer = ctypes.c_int64, ctypes.c_void_p
        self.add_low_rank.argtypes = (
            pointer, integer, pointer, integer, integer, pointer, pointer,
        )  # fmt: skip
        self.add_low_rank.restype = None
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
