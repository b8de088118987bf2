"""What the interpreter does not show: every kernel becomes machine code, and hot ones do not spill.

Compiled in other processes, in which the interpreter is off; no GPU is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polydelta.kernels.triton.shipped import MODULES

ROOT = Path(__file__).parents[3]


def compile_all(arch: int, folder: Path) -> list[dict[str, Any]]:
    """Nothing is taken from Triton's own cache."""
    result = folder / "resources.json"
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "COLUMNS": "200"}
    environment.pop("TRITON_INTERPRET", None)
    command = (sys.executable, "-m", "benchmarks.kernel_resources")
    run = subprocess.run(
        [*command, "--arch", str(arch), "--json", str(result)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.is_file(), run.stdout + run.stderr
    compiled: list[dict[str, Any]] = json.loads(result.read_text())
    return compiled


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, pytest.param(80, marks=pytest.mark.long)])
def test_every_kernel_compiles_and_hot_ones_do_not_spill(arch: int, tmp_path: Path) -> None:
    compiled = compile_all(arch, tmp_path)
    names = [f"{one['module']}: {one['name']}" for one in compiled]
    errors = [one["error"] for one in compiled if one["error"] is not None]
    assert not errors, "\n\n".join(errors)
    assert {one["module"] for one in compiled} == set(MODULES)
    assert len(set(names)) == len(names), "two configurations have the same name"
    spilling = [
        f"{name}: {one['spilled_bytes']} bytes"
        for name, one in zip(names, compiled, strict=True)
        if one["hot"] and one["spilled_bytes"]
    ]
    assert spilling == []
