"""Products on tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from polydelta.kernels.triton.tuning import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def add_product(sums, a, b):
    """sums + a @ b, sums in float32. Triton's interpreter cannot multiply bfloat16."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")
