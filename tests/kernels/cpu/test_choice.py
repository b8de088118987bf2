"""Which kernels a CPU gets, and how many threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.choice import cpu_kernels
from polydelta.kernels.cpu.kernels import CpuKernels


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """Put back afterwards."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_float32_is_torchs() -> None:
    assert type(cpu_kernels(torch.float32)) is CpuKernels


@pytest.mark.usefixtures("torch_threads")
def test_a_second_engine_has_as_many_threads_as_the_first() -> None:
    first = cpu_kernels(torch.bfloat16)
    if not isinstance(first, Bfloat16Kernels):
        pytest.skip("there is no C compiler, or no AVX512-BF16")
    with ThreadPoolExecutor(1) as loop:
        loop.submit(first.enter_thread).result()
    with ThreadPoolExecutor(1) as building:
        second = building.submit(cpu_kernels, torch.bfloat16).result()
    assert isinstance(second, Bfloat16Kernels)
    assert second._threads == first._threads
