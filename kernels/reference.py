"""Every operation in plain torch, written to be read and trusted rather than to be fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polydelta.kernels import sampling
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
from polydelta.kernels.delta_weights import (
    AddWeights,
    ChangeWeights,
    LowRankWeights,
    SparseWeights,
)
from polydelta.kernels.fusing import FusableWeight, FusedWeight, with_deltas
from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.ops import AttentionShape, SequenceSlice
from polydelta.kernels.quantized_weight import QuantizedWeight
from polydelta.kernels.reference_deltas import add_delta, change_output
from polydelta.kernels.sampling import SamplingRows
from polydelta.kernels.unrecorded import Unrecorded

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class ReferencePlan:
    shape: AttentionShape
    sequences: Sequence[SequenceSlice]


class DenseLinear(FusableWeight):
    """A linear layer with its weight as torch has it, `[out, in]`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self._bias)

    def prepare(self, deltas: Sequence[LowRankWeights | SparseWeights]) -> FusedWeight:
        return FusedWeight(self, with_deltas(self.base, deltas))


class ReferenceKernels(Unrecorded):
    """The truth that faster kernels are tested against; runs on any device."""

    def __init__(self, device: torch.device = CPU) -> None:
        self.device = device

    def enter_thread(self) -> None:
        pass

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def linear(self, weight: Tensor, bias: Tensor | None) -> DenseLinear:
        return DenseLinear(weight, bias)

    def head(self, weight: Tensor) -> Linear:
        return lambda x: torch.nn.functional.linear(x, weight).float()

    def quantized_linear(self, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        values = weight.dequantized()
        return lambda x: torch.nn.functional.linear(x, values.to(x.dtype), bias)

    def quantized_head(self, weight: QuantizedWeight) -> Linear:
        linear = self.quantized_linear(weight, None)
        return lambda x: linear(x).float()

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return table[rows]

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x.add_(y)

    def argmax(self, x: Tensor) -> Tensor:
        return x.argmax(-1)

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        return sampling.sample(logits, rows)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return normed.to(x.dtype) * weight

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.rms_norm(self.add(x, y), weight, eps)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((second, first), -1) * sin[:, None]

    def silu_mul(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def store_kv(self, kv: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        block_size = kv.shape[2]
        pages, places = slots // block_size, slots % block_size
        kv[pages, 0, places] = keys
        kv[pages, 1, places] = values

    def plan_attention(
        self,
        shape: AttentionShape,
        sequences: Sequence[SequenceSlice],
        dtype: torch.dtype,  # noqa: ARG002 - it computes in float32 whatever the cache holds
    ) -> Any:
        return ReferencePlan(shape, sequences)

    def attention(self, plan: Any, queries: Tensor, kv: Tensor) -> Tensor:
        out = torch.empty_like(queries)
        shape = plan.shape
        group = shape.num_heads // shape.num_kv_heads
        for sequence in plan.sequences:
            rows = slice(sequence.start, sequence.start + sequence.length)
            pages = torch.tensor(sequence.pages, device=kv.device)
            # [2, kv_heads, context, head_dim]
            keys_values = kv[pages].permute(1, 3, 0, 2, 4).flatten(2, 3)[:, :, : sequence.context]
            keys, values = keys_values.float().repeat_interleave(group, 1)
            scores = queries[rows].float().transpose(0, 1) @ keys.transpose(-1, -2)
            scores = scores / math.sqrt(shape.head_dim)
            scores.masked_fill_(~visible(sequence, shape.window, kv.device), -math.inf)
            mixed = scores.softmax(-1) @ values
            out[rows] = mixed.transpose(0, 1).to(out.dtype)
        return out

    def kv_attention(self, kind: KVKind) -> KVAttention:
        return KVAttention(kind, self.device)

    def add_delta(self, weights: AddWeights) -> AddDelta:
        return partial(add_delta, weights)

    def change_output(self, weights: ChangeWeights) -> ChangeOutput:
        return partial(change_output, weights)

    def bind_sites(self, sites: Sequence[SiteDeltas | None]) -> AdapterSites:
        return sites

    def group_deltas(self, segments: Sequence[DeltaSegment]) -> DeltaGroup:
        return SegmentLoop(segments)


def visible(sequence: SequenceSlice, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees, `[length, context]` bool: itself and what came before it, no
    further back than the window."""
    keys = torch.arange(sequence.context, device=device)
    queries = keys[sequence.context - sequence.length :, None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)
