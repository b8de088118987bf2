"""The draw of a token without a sort: what is cut off lies below a weight, which is searched for.

One program draws for one row. A token's weight is `exp((logit - largest) / temperature)`: between 0
and 1, so that the order of weights is that of their bits as integers. It is computed anew from the
logits, which stay in the L2 cache, whenever it is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.sampling import LOWEST_TEMPERATURE, SamplingRows
from polydelta.kernels.triton.shipping import Floor, ShippedKernel

# Logits that a program reads at a time: 64 bytes a thread, to have enough of them on their way.
_BLOCK, _NUM_WARPS = 8192, 16


@triton.jit
def _weights(logits_ptr, place, size, largest, sharpness):
    logits = tl.load(logits_ptr + place, mask=place < size, other=float("-inf"))
    return tl.exp((logits - largest) * sharpness)


@triton.jit
def _search(
    logits_ptr, size, largest, sharpness, low, needed, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest of the row's weights such that those as large or larger reach `needed`, in number
    or in sum; as bits. It is known to be `low` (bits) or more.

    Each pass halves the range, and then shrinks it to weights that there are: for random logits
    over a vocabulary of 128k 8 to 21 passes were counted, 8 to 14 where they come from bfloat16.
    """
    # The bits of 1.0, the weight of the largest logit.
    high = 0x3F800000
    while low < high:
        middle = low + (high - low + 1) // 2
        reached = tl.zeros([BLOCK], tl.float32)
        above = tl.full([BLOCK], high, tl.int32)
        below = tl.full([BLOCK], low, tl.int32)
        for start in range(0, size, BLOCK):
            place = start + tl.arange(0, BLOCK)
            weights = _weights(logits_ptr, place, size, largest, sharpness)
            bits = weights.to(tl.int32, bitcast=True)
            heavy = bits >= middle
            if COUNT:
                reached += heavy.to(tl.float32)
            else:
                reached += tl.where(heavy, weights, 0.0)
            above = tl.where(heavy, tl.minimum(above, bits), above)
            below = tl.where(heavy, below, tl.maximum(below, bits))
        if tl.sum(reached, 0) >= needed:
            low = tl.min(above, 0)
        else:
            high = tl.max(below, 0)
    return low


@triton.jit
def _sum(logits_ptr, size, largest, sharpness, least, BLOCK: tl.constexpr):
    """Of the weights from `least` on, as bits."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        weights = _weights(logits_ptr, place, size, largest, sharpness)
        total += tl.where(weights.to(tl.int32, bitcast=True) >= least, weights, 0.0)
    return tl.sum(total, 0)


@triton.jit
def least_kept(logits_ptr, size, largest, sharpness, top_k, top_p, min_p, BLOCK: tl.constexpr):
    """The smallest weight that no cut takes away."""
    least = tl.full([], 0, tl.int32)
    if (top_k > 0) & (top_k < size):
        least = _search(logits_ptr, size, largest, sharpness, least, top_k, True, BLOCK)
    if top_p < 1.0:
        needed = top_p * _sum(logits_ptr, size, largest, sharpness, least, BLOCK)
        least = _search(logits_ptr, size, largest, sharpness, least, needed, False, BLOCK)
    return tl.maximum(least.to(tl.float32, bitcast=True), min_p)


@triton.jit
def largest_logit(logits_ptr, size, BLOCK: tl.constexpr):
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + place, mask=place < size, other=float("-inf"))
        largest = tl.maximum(largest, logits)
    return tl.max(largest, 0)


@triton.jit
def _pick(weights, places, before, target):
    """The first place where the running sum is above the target, of those that have a weight; the
    last one that has, where rounding leaves none, and 0 where the weights are not numbers."""
    cumulative = before + tl.cumsum(weights, 0)
    last = tl.max(tl.where(weights > 0, places, 0), 0)
    return tl.min(tl.where((weights > 0) & (cumulative > target), places, last), 0)


# The columns are parts of one upload, and begin at any multiple of 8 bytes.
_ANYWHERE = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr"]


@triton.jit(do_not_specialize_on_alignment=_ANYWHERE)
def _sample(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    tokens_ptr,
    row_stride,
    size,
    LOWEST: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k = tl.load(top_k_ptr + row).to(tl.float32)
    top_p = tl.load(top_p_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    sharpness = 1.0 / tl.maximum(temperature, LOWEST)
    largest = largest_logit(logits_ptr, size, BLOCK)
    least = least_kept(logits_ptr, size, largest, sharpness, top_k, top_p, min_p, BLOCK)

    # Sums of chunks, in float64: over a large vocabulary a float32 sum loses the tail.
    chunks = tl.arange(0, CHUNKS)
    sums = tl.zeros([CHUNKS], tl.float64)
    for start in range(0, size, BLOCK):
        weights = _weights(logits_ptr, start + tl.arange(0, BLOCK), size, largest, sharpness)
        chunk_sum = tl.sum(tl.where(weights >= least, weights, 0.0).to(tl.float64), 0)
        sums = tl.where(chunks == start // BLOCK, chunk_sum, sums)

    target = tl.load(uniform_ptr + row).to(tl.float64) * tl.sum(sums, 0)
    chunk = _pick(sums, chunks, 0.0, target)
    before = tl.sum(tl.where(chunks < chunk, sums, 0.0), 0)
    place = chunk * BLOCK + tl.arange(0, BLOCK)
    weights = _weights(logits_ptr, place, size, largest, sharpness)
    weights = tl.where(weights >= least, weights, 0.0).to(tl.float64)
    tl.store(tokens_ptr + row, _pick(weights, place, before, target).to(tl.int64))


def sample(logits: Tensor, rows: SamplingRows) -> Tensor:
    """As `Kernels.sample`: logits `[rows, vocab]` float32, dense in the last axis -> `[rows]`
    int64."""
    count, size = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    _sample[count,](
        logits,
        rows.temperature,
        rows.top_k,
        rows.top_p,
        rows.min_p,
        rows.uniform,
        tokens,
        logits.stride(0),
        size,
        LOWEST=LOWEST_TEMPERATURE,
        CHUNKS=triton.next_power_of_2(triton.cdiv(size, _BLOCK)),
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    return tokens


def shipped() -> list[ShippedKernel]:
    """Of vocabularies of 128k, as Llama 3 has it, and of 256k; the floor is one reading of them."""
    return [_shipped(rows, size) for rows, size in ((64, 128256), (64, 262144))]


def _shipped(rows: int, size: int) -> ShippedKernel:
    return ShippedKernel(
        f"sample, vocabulary of {size}",
        _sample,
        {"logits_ptr": "*fp32"}
        | dict.fromkeys(_ANYWHERE, "*fp64")
        | {"tokens_ptr": "*i64", "row_stride": "i32", "size": "i32"},
        {
            "LOWEST": LOWEST_TEMPERATURE,
            "CHUNKS": triton.next_power_of_2(triton.cdiv(size, _BLOCK)),
            "BLOCK": _BLOCK,
        },
        Floor(f"{rows} rows", 4 * rows * size),
        aligned=("logits_ptr", "tokens_ptr", "row_stride", "size"),
        options={"num_warps": _NUM_WARPS},
    )
