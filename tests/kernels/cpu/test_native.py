"""The kernel that is compiled on the machine it runs on, and what happens where it cannot be."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch

from polydelta.kernels.cpu import native
from polydelta.kernels.cpu.native_deltas import NativeDelta, bind
from polydelta.kernels.delta_weights import LowRankBlock, LowRankWeights

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "polydelta"


def bound(b_t: list[list[float]]) -> NativeDelta:
    """A delta of rank 1 on one input: `y += x * b_t`."""
    library = native.load()
    assert library is not None
    block = LowRankBlock(0, 0, torch.tensor(b_t, dtype=torch.bfloat16))
    weights = LowRankWeights(torch.ones(1, 1, dtype=torch.bfloat16), (block,))
    return bind(library, weights)


@needs_compiler
def test_it_is_compiled_once_and_then_taken_from_the_cache(cache: Path) -> None:
    assert native.load() is not None
    (library,) = cache.glob("*.so")
    written = library.stat().st_mtime_ns
    assert native.load() is not None
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.load() is None


def test_a_compiler_that_fails_leaves_nothing_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "false")
    assert native.load() is None
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native.load() is None


@needs_compiler
def test_sums_are_rounded_to_the_nearest_bfloat16_as_torch_rounds_them() -> None:
    x = torch.tensor([[1.0]], dtype=torch.bfloat16)
    addends = torch.randn(4000).bfloat16()
    y = torch.randn(1, 4000).bfloat16()
    expected = (y.float() + addends.float()).bfloat16()
    bound([addends.tolist()]).add(y, x)
    assert torch.equal(y, expected)


@needs_compiler
def test_infinities_and_nans_stay_what_they_are() -> None:
    x = torch.tensor([[1.0]], dtype=torch.bfloat16)
    y = torch.tensor([[0.0, math.inf, math.nan, 3.0e38, 1.0]], dtype=torch.bfloat16)
    bound([[math.inf, 1.0, 1.0, 3.0e38, math.nan]]).add(y, x)
    assert y[0, :2].tolist() == [math.inf, math.inf]
    assert y[0, 3].item() == math.inf
    assert y[0, [2, 4]].isnan().all()


@needs_compiler
def test_loading_it_leaves_the_arithmetic_of_the_process_as_it_was() -> None:
    assert native.load() is not None
    smallest = 5e-324
    assert smallest * 3 / 3 == smallest > 0
