"""What tests of our own bfloat16 kernels share: the library, or a reason why it cannot be had."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from polydelta.kernels.cpu import native
from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.native import NativeLibrary


@pytest.fixture(scope="session")
def decoder_library() -> NativeLibrary:
    library = native.load()
    if library is None:
        pytest.skip("there is no C compiler")
    if not library.computes_decoders:
        pytest.skip("the machine has no AVX512-BF16")
    return library


@pytest.fixture(scope="session")
def with_threads(decoder_library: NativeLibrary) -> Callable[[int], Bfloat16Kernels]:
    """Kernels whose pool has so many threads, made once for each number."""
    made: dict[int, Bfloat16Kernels] = {}

    def kernels(threads: int) -> Bfloat16Kernels:
        if threads not in made:
            made[threads] = Bfloat16Kernels(decoder_library, threads)
        return made[threads]

    return kernels


@pytest.fixture(scope="session")
def ours(with_threads: Callable[[int], Bfloat16Kernels]) -> Bfloat16Kernels:
    return with_threads(2)
