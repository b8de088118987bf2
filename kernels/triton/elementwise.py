"""What is done to each token for itself: norms, rotary embedding, the gated activation, gathering.

Tensors are on one device, dense in their last axis, and of any float dtype; float64 is computed in
float32, too.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from polydelta.kernels.triton.elementwise_kernels import (
    add_rms_norm_kernel,
    gather_kernel,
    rms_norm_kernel,
    rotate_kernel,
    silu_mul_kernel,
)
from polydelta.kernels.triton.shipping import Floor, ShippedKernel

# Elements of a tile that holds more than one row, and of a column range of a long row.
_TILE = 1024
# A thread's share of a tile: two loads of 16 bytes in bfloat16.
_PER_THREAD = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `Kernels.rms_norm` (arXiv:1910.07467); x: `[..., size]`, of three axes perhaps a view."""
    size = x.shape[-1]
    heads = x if x.dim() == 3 else x.reshape(-1, 1, size)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    rows = heads.shape[0] * heads.shape[1]
    tile_rows, block = _tile(size)
    rms_norm_kernel[triton.cdiv(rows, tile_rows),](
        _dense_rows(heads),
        weight,
        out,
        rows,
        heads.stride(0),
        heads.stride(1),
        eps,
        HEADS=heads.shape[1],
        SIZE=size,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=_num_warps(tile_rows * block),
    )
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `Kernels.add_rms_norm`."""
    rows, size = x.shape
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    tile_rows, block = _tile(size)
    add_rms_norm_kernel[triton.cdiv(rows, tile_rows),](
        x,
        y,
        weight,
        out,
        rows,
        eps,
        SIZE=size,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=_num_warps(tile_rows * block),
    )
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `Kernels.rotate` (arXiv:2104.09864), in the place of x, which may be a view of more."""
    tokens, heads, head_dim = x.shape
    half = head_dim // 2
    tile_rows, block = _tile(half)
    rotate_kernel[triton.cdiv(tokens * heads, tile_rows),](
        _dense_rows(x),
        cos,
        sin,
        tokens * heads,
        x.stride(0),
        x.stride(1),
        HEADS=heads,
        HALF=half,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=4,
    )
    return x


def silu_mul(x: Tensor) -> Tensor:
    """As `Kernels.silu_mul`."""
    tokens, both = x.shape
    size = both // 2
    out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
    silu_mul_kernel[tokens, triton.cdiv(size, _TILE)](x, out, size, BLOCK=_TILE, num_warps=4)
    return out


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """As `Kernels.gather`; any dtype."""
    count, size = len(rows), table.shape[1]
    out = torch.empty(count, size, dtype=table.dtype, device=table.device)
    tile_rows, block = _tile(min(size, _TILE))
    grid = triton.cdiv(count, tile_rows), triton.cdiv(size, block)
    gather_kernel[grid](
        _dense_rows(table),
        rows,
        out,
        count,
        table.stride(0),
        SIZE=size,
        ROWS=tile_rows,
        BLOCK=block,
        num_warps=4,
    )
    return out


def _tile(size: int) -> tuple[int, int]:
    """Rows, and columns for whole rows of a size: both powers of two."""
    block = triton.next_power_of_2(size)
    return max(1, _TILE // block), block


def _num_warps(elements: int) -> int:
    return min(16, max(1, elements // (32 * _PER_THREAD)))


def _dense_rows(x: Tensor) -> Tensor:
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"the last axis must be dense, not of stride {x.stride(-1)}")
    return x


def shipped() -> list[ShippedKernel]:
    """Of a Llama-3-8B: a decode step of 64 rows, bfloat16."""
    hidden, heads, head_dim, inner, rows = 4096, 32, 128, 14336, 64
    return [
        *(_shipped_norm(dtype, rows, 1, hidden) for dtype in ("bf16", "fp16", "fp32")),
        _shipped_norm("bf16", rows, heads, head_dim),
        *(_shipped_add_norm(dtype, rows, hidden) for dtype in ("bf16", "fp32")),
        *(_shipped_rotation(rows, heads, size) for size in (80, head_dim, 256)),
        ShippedKernel(
            "silu_mul",
            silu_mul_kernel,
            {"x_ptr": "*bf16", "out_ptr": "*bf16", "size": "i32"},
            {"BLOCK": _TILE},
            Floor(f"{rows} rows of {inner}", 2 * 3 * rows * inner),
            aligned=("x_ptr", "out_ptr", "size"),
            options={"num_warps": 4},
        ),
        *(_shipped_gather(rows, size) for size in (hidden, head_dim)),
    ]


def _shipped_norm(dtype: str, tokens: int, heads: int, size: int) -> ShippedKernel:
    tile_rows, block = _tile(size)
    pointers = ("x_ptr", "weight_ptr", "out_ptr")
    numbers = {"rows": "i32", "token_stride": "i32", "head_stride": "i32", "eps": "fp32"}
    rows = tokens * heads
    return ShippedKernel(
        f"rms_norm, {heads} x {size}, {dtype}",
        rms_norm_kernel,
        dict.fromkeys(pointers, f"*{dtype}") | numbers,
        {"HEADS": heads, "SIZE": size, "ROWS": tile_rows, "BLOCK": block},
        Floor(f"{rows} rows of {size}", _bytes(dtype) * (2 * rows + 1) * size),
        aligned=(*pointers, "token_stride", "head_stride"),
        options={"num_warps": _num_warps(tile_rows * block)},
    )


def _shipped_add_norm(dtype: str, rows: int, size: int) -> ShippedKernel:
    tile_rows, block = _tile(size)
    pointers = ("x_ptr", "y_ptr", "weight_ptr", "out_ptr")
    return ShippedKernel(
        f"add_rms_norm, {size}, {dtype}",
        add_rms_norm_kernel,
        dict.fromkeys(pointers, f"*{dtype}") | {"rows": "i32", "eps": "fp32"},
        {"SIZE": size, "ROWS": tile_rows, "BLOCK": block},
        Floor(f"{rows} rows of {size}", _bytes(dtype) * (4 * rows + 1) * size),
        aligned=pointers,
        options={"num_warps": _num_warps(tile_rows * block)},
    )


def _shipped_rotation(tokens: int, heads: int, head_dim: int) -> ShippedKernel:
    tile_rows, block = _tile(head_dim // 2)
    pointers = ("x_ptr", "cos_ptr", "sin_ptr")
    numbers = {"rows": "i32", "token_stride": "i32", "head_stride": "i32"}
    return ShippedKernel(
        f"rotate, heads of {head_dim}",
        rotate_kernel,
        dict.fromkeys(pointers, "*bf16") | numbers,
        {"HEADS": heads, "HALF": head_dim // 2, "ROWS": tile_rows, "BLOCK": block},
        Floor(f"{tokens} rows of {heads} heads", 2 * tokens * (2 * heads + 2) * head_dim),
        aligned=(*pointers, "token_stride", "head_stride"),
        options={"num_warps": 4},
    )


def _shipped_gather(count: int, size: int) -> ShippedKernel:
    tile_rows, block = _tile(min(size, _TILE))
    return ShippedKernel(
        f"gather, rows of {size}",
        gather_kernel,
        {"table_ptr": "*bf16", "rows_ptr": "*i64", "out_ptr": "*bf16", "count": "i32"}
        | {"stride": "i32"},
        {"SIZE": size, "ROWS": tile_rows, "BLOCK": block},
        Floor(f"{count} rows", count * (2 * 2 * size + 8)),
        aligned=("table_ptr", "out_ptr", "stride"),
        options={"num_warps": 4},
    )


def _bytes(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2
