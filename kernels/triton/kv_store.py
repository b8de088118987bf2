"""Keys and values on their way into the pages of the KV cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.triton.shipping import Floor, ShippedKernel

# Elements of a program: a thread's share is two loads of 16 bytes in bfloat16.
_TILE = 2048


def store_kv(kv: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Writes keys and values `[tokens, kv_heads, head_dim]` into one layer of the pool, in its
    dtype.

    kv: `[pages, 2, block_size, kv_heads, head_dim]`, dense; slots: `[tokens]` int64, page *
    block_size + place in the page; those below 0 are stored nowhere. Rows of keys and of values may
    lie apart, as parts of a wider tensor. Raises ValueError for a kv that is not dense.
    """
    if not kv.is_contiguous():
        raise ValueError("kv is not dense: its pages must lie one after the other")
    tokens, kv_heads, head_dim = keys.shape
    if tokens == 0:
        return
    row = kv_heads * head_dim
    keys, values = (_rows(each, row) for each in (keys, values))
    sizes = _sizes(row)
    grid = (tokens, triton.cdiv(row, sizes["BLOCK"]))
    store_kernel[grid](
        kv, keys, values, slots, keys.stride(0), values.stride(0),
        **sizes, PAGE_TOKENS=kv.shape[2], num_warps=4,
    )  # fmt: skip


def _rows(x: Tensor, size: int) -> Tensor:
    """`[tokens, heads, head_dim]` -> `[tokens, size]`, dense in its rows."""
    if x.stride()[1:] != (x.shape[2], 1):
        x = x.contiguous()
    return x.as_strided((len(x), size), (x.stride(0), 1))


def _sizes(row: int) -> dict[str, int]:
    return {"ROW": row, "BLOCK": min(_TILE, triton.next_power_of_2(row))}


@triton.jit
def store_kernel(
    kv_ptr,
    keys_ptr,
    values_ptr,
    slots_ptr,
    key_stride,
    value_stride,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
):
    """A program: a token's keys and values, or a range of them."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < ROW
    keys = tl.load(keys_ptr + token * key_stride + column, mask=inside)
    values = tl.load(values_ptr + token * value_stride + column, mask=inside)
    page = slot // PAGE_TOKENS
    # Values come a page's keys later.
    target = kv_ptr + (page * PAGE_TOKENS + slot) * ROW + column
    dtype = kv_ptr.dtype.element_ty
    tl.store(target, keys.to(dtype), mask=inside)
    tl.store(target + PAGE_TOKENS * ROW, values.to(dtype), mask=inside)


def shipped() -> list[ShippedKernel]:
    """For 8 heads of 128 and pages of 16 tokens."""
    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    tokens, row = 256, 1024
    return [
        ShippedKernel(
            f"KV store, {str(dtype)[6:]}",
            store_kernel,
            {
                "kv_ptr": pointer, "keys_ptr": pointer, "values_ptr": pointer,
                "slots_ptr": "*i64", "key_stride": "i32", "value_stride": "i32",
            },
            _sizes(row) | {"PAGE_TOKENS": 16},
            Floor(f"{tokens} tokens of 8 heads of 128", bytes=4 * tokens * row * dtype.itemsize),
            aligned=("kv_ptr", "keys_ptr", "values_ptr", "slots_ptr", "key_stride", "value_stride"),
            options={"num_warps": 4, "num_stages": 2},
        )
        for dtype, pointer in types.items()
    ]  # fmt: skip
