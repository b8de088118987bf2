"""Which of few configurations of a kernel is the fastest on this GPU.

`python -m benchmarks.gpu --sections tuning` times them, on launches like a busy server has, and
keeps the answers in the cache folder. Where nobody has measured, the first one is taken: nothing is
timed while requests wait.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import triton

# Whether kernels run in Triton's interpreter, on CPU tensors: it measures nothing.
INTERPRETED: bool = triton.knobs.runtime.interpret

Options = Mapping[str, int]


@dataclass(frozen=True)
class Tunable:
    """A kernel for one kind of launch, and the configurations that are worth a try."""

    # "attention, decode, head 128, bfloat16"
    name: str
    choices: tuple[Options, ...]

    def options(self) -> Options:
        """The one that was measured as the fastest here, else the first."""
        known = None if INTERPRETED else _read(_path()).get(self.name)
        return known if known in self.choices else self.choices[0]

    def remember(self, options: Options) -> None:
        """From now on, in every process that starts. Raises ValueError for what is not a choice,
        and OSError."""
        if options not in self.choices:
            raise ValueError(f"{dict(options)} is not among the choices of {self.name!r}")
        path = _path()
        table = {**_read(path), self.name: dict(options)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(table, file, indent=2)
        os.replace(file.name, path)
        _read.cache_clear()


@cache
def _read(path: Path) -> dict[str, Options]:
    """Name -> options; empty where there is no table, or one that is not understood."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


@cache
def _path() -> Path:
    """Of this user, this kind of GPU and this Triton."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    name = f"tuning-{gpu}-triton-{triton.__version__}.json".replace(" ", "-").replace("/", "-")
    return Path(root) / "polydelta" / name
