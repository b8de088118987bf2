"""The CPU's set of kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.kernels import sampling
from polydelta.kernels.cpu import attention, deltas, native
from polydelta.kernels.cpu.linear import PackedLinear
from polydelta.kernels.cpu.memory import lazy_zeros
from polydelta.kernels.cpu.native import NativeLibrary
from polydelta.kernels.delta_groups import (
    AdapterSites,
    AddDelta,
    ChangeOutput,
    DeltaGroup,
    DeltaSegment,
    Linear,
    SegmentLoop,
    SiteDeltas,
)
from polydelta.kernels.delta_weights import AddWeights, ChangeWeights
from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.ops import AttentionShape, FusableLinear, SequenceSlice
from polydelta.kernels.reference import CPU, DenseLinear
from polydelta.kernels.sampling import SamplingRows
from polydelta.kernels.unrecorded import Unrecorded


class CpuKernels(Unrecorded):
    """oneDNN products on packed weights, torch's flash attention over gathered pages, and a kernel
    of our own for small deltas where there is a C compiler."""

    device = CPU

    def __init__(self, library: NativeLibrary | None = None) -> None:
        """library: loaded if it is not given."""
        self._native = library or native.load()

    def enter_thread(self) -> None:
        pass

    def zeros(self, *shape: int) -> Tensor:
        return lazy_zeros(shape)

    def linear(self, weight: Tensor, bias: Tensor | None) -> FusableLinear:
        if not torch.backends.mkldnn.is_available():
            return DenseLinear(weight, bias)
        return PackedLinear(weight, bias, self._native)

    def head(self, weight: Tensor) -> Linear:
        linear = self.linear(weight, None)
        return lambda x: linear(x).float()

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return F.embedding(rows, table)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x.add_(y)

    def argmax(self, x: Tensor) -> Tensor:
        return x.argmax(-1)

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        return sampling.sample(logits, rows)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(self.add(x, y), weight, eps)

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

    def kv_attention(self, kind: KVKind) -> KVAttention:
        return KVAttention(kind, self.device)

    def add_delta(self, weights: AddWeights) -> AddDelta:
        return deltas.add_delta(weights, self._native)

    def change_output(self, weights: ChangeWeights) -> ChangeOutput:
        return deltas.change(weights, self._native)

    def bind_sites(self, sites: Sequence[SiteDeltas | None]) -> AdapterSites:
        return sites

    def group_deltas(self, segments: Sequence[DeltaSegment]) -> DeltaGroup:
        return SegmentLoop(segments)
