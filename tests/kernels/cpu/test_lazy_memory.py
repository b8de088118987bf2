"""Memory that the system gives when it is written to."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.cpu.memory import lazy_zeros


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 4096), (30, 11, 24576)])
def test_it_is_zeros_that_can_be_written(shape: tuple[int, ...]) -> None:
    memory = lazy_zeros(shape)
    assert memory.shape == shape
    assert memory.dtype == torch.uint8
    assert memory.is_contiguous()
    assert not memory.any()
    memory.view(-1)[-1] = 7
    assert memory.sum() == 7


def test_it_may_be_seen_as_numbers_of_any_dtype() -> None:
    memory = lazy_zeros((4, 64))
    for dtype in torch.bfloat16, torch.float32, torch.int64:
        memory.view(dtype)[1].fill_(3)
        assert memory.view(dtype)[1].tolist() == [3] * (64 // dtype.itemsize)


def test_no_two_share_memory() -> None:
    first, second = lazy_zeros((100,)), lazy_zeros((100,))
    first.fill_(5)
    assert not second.any()


def test_a_view_keeps_it() -> None:
    view = lazy_zeros((100, 5000))[17:19, ::2]
    gc.collect()
    others = [lazy_zeros((100, 5000)).fill_(9) for _ in range(5)]
    view += 1
    assert view.sum() == 2 * 2500
    assert all(bool((other == 9).all()) for other in others)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="there is no /proc")
def test_what_is_not_written_takes_no_memory_and_what_is_dropped_gives_it_back() -> None:
    gc.collect()
    before, size = resident_bytes(), 1 << 30
    memory = lazy_zeros((1024, size // 1024))
    memory[3, :10] = 1
    assert resident_bytes() - before < 64 << 20
    memory[:128] = 1
    assert resident_bytes() - before > 120 << 20
    del memory
    gc.collect()
    assert resident_bytes() - before < 64 << 20


def test_it_is_the_pools_memory() -> None:
    pool = CpuKernels().zeros(2, 3, 64)
    assert pool.shape == (2, 3, 64)
    assert not pool.any()
