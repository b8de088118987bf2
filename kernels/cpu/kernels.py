"""The CPU's set of kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.kernels.cpu import attention, deltas, native
from polydelta.kernels.cpu.linear import PackedLinear
from polydelta.kernels.delta_weights import AddWeights, ChangeWeights
from polydelta.kernels.ops import (
    AddDelta,
    AttentionShape,
    ChangeOutput,
    FusableLinear,
    SequenceSlice,
)
from polydelta.kernels.reference import DenseLinear


class CpuKernels:
    """oneDNN products on packed weights, torch's flash attention over gathered pages, and a kernel
    of our own for small deltas where there is a C compiler. For one thread at a time."""

    def __init__(self) -> None:
        self._native = native.load()

    def linear(self, weight: Tensor, bias: Tensor | None) -> FusableLinear:
        if not torch.backends.mkldnn.is_available():
            return DenseLinear(weight, bias)
        return PackedLinear(weight, bias, self._native)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        swapped = torch.cat((second, first), -1)
        return (x * cos[:, None]).addcmul_(swapped, sin[:, None])

    def silu_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def store_kv(self, kv: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        pages, _, block_size, heads, head_dim = kv.shape
        rows = kv.view(pages * 2 * block_size, heads, head_dim)
        # A page's keys are followed by its values, so whole pages before it count twice.
        key_rows = slots + slots // block_size * block_size
        rows.index_copy_(0, key_rows, keys)
        rows.index_copy_(0, key_rows + block_size, values)

    def plan_attention(
        self, shape: AttentionShape, sequences: Sequence[SequenceSlice], dtype: torch.dtype
    ) -> attention.AttentionPlan:
        return attention.plan(shape, sequences, dtype)

    def attention(self, plan: attention.AttentionPlan, queries: Tensor, kv: Tensor) -> Tensor:
        return attention.attend(plan, queries, kv)

    def add_delta(self, weights: AddWeights) -> AddDelta:
        return deltas.add_delta(weights, self._native)

    def change_output(self, weights: ChangeWeights) -> ChangeOutput:
        return deltas.change(weights, self._native)
