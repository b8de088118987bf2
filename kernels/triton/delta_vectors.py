"""Scale and Bias: a float32 vector that columns of y are multiplied with, or that is added."""

from __future__ import annotations

import triton
import triton.language as tl

from polydelta.kernels.triton.delta_pages import load_floats, own_part


@triton.jit(noinline=True)
def change_vector(
    y, y_stride, rows, source, start, out_start, out_features, weight, scales, span,
    PAGE_GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Of columns in the span. scales: whether they are multiplied; weight: of what is added."""
    part = own_part(span, out_start, out_features)
    m = tl.arange(0, ROWS)[:, None]
    for begin in range(part.start, part.stop, BLOCK_OUT):
        j = begin + tl.arange(0, BLOCK_OUT)
        vector = load_floats(source, start, j, j < part.stop, PAGE_GROUPS)[None, :]
        at = y + (m * y_stride + out_start + j[None, :])
        own = (m < rows) & (j < part.stop)[None, :]
        before = tl.load(at, mask=own, other=0).to(tl.float32)
        tl.store(at, tl.where(scales, before * vector, before + weight * vector), mask=own)
