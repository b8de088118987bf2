"""Which kernels a CPU gets."""

from __future__ import annotations

import torch

from polydelta.kernels.cpu import native
from polydelta.kernels.cpu.bfloat16_kernels import Bfloat16Kernels
from polydelta.kernels.cpu.kernels import CpuKernels


def cpu_kernels(dtype: torch.dtype) -> CpuKernels:
    """Our own for bfloat16 where the machine has a C compiler and AVX512-BF16; else torch's."""
    library = native.load()
    if dtype == torch.bfloat16 and library is not None and library.computes_decoders:
        return Bfloat16Kernels(library, torch.get_num_threads())
    return CpuKernels(library)
