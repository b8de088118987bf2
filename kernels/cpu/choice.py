"""Which kernels a CPU gets."""

from __future__ import annotations

import torch

from polydelta.kernels.cpu import native
from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.kernels import CpuKernels

# Asked for once: when a thread of an engine leaves torch one thread (`Kernels.enter_thread`), all
# threads that begin later have no more.
_THREADS = torch.get_num_threads()


def cpu_kernels(dtype: torch.dtype) -> CpuKernels:
    """Our own for bfloat16 where the machine has a C compiler and AVX512-BF16; else torch's."""
    library = native.load()
    if dtype == torch.bfloat16 and library is not None and library.computes_decoders:
        return Bfloat16Kernels(library, _THREADS)
    return CpuKernels(library)
