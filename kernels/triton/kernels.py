"""A GPU's set of kernels: products by cuBLAS, everything else written in Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polydelta.kernels.delta_groups import (
    AdapterPlaces,
    AdapterSites,
    DeltaGroup,
    DeltaSegment,
)
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.ops import AttentionShape, RecordedStep, SequenceSlice
from polydelta.kernels.reference import ReferenceKernels
from polydelta.kernels.sampling import SamplingRows
from polydelta.kernels.triton import attention, delta_group, elementwise, kv_store, sampling
from polydelta.kernels.triton.adapter_copy import AdapterCopier
from polydelta.kernels.triton.attention_plan import AttentionPlan, plan
from polydelta.kernels.triton.graphs import GraphRecorder
from polydelta.kernels.triton.kv_attention import TritonKVAttention

# Rows that decode steps are recorded with.
RECORDED_ROWS = (1, 2, 4, *range(8, 64, 8), *range(64, delta_group.MOST_ROWS + 1, 16))


class TritonKernels(ReferenceKernels):
    """What it inherits is plain torch on the device: products, sums, greedy choice, and kinds of
    deltas that are rare.

    On a CPU, Triton's interpreter runs the kernels: slowly, to test them.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(device)
        self._copier = AdapterCopier(device)
        self._graphs = GraphRecorder(RECORDED_ROWS[-1])

    def enter_thread(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        return elementwise.gather(table, rows)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return elementwise.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, y: Tensor, weight: Tensor, eps: float) -> Tensor:
        return elementwise.add_rms_norm(x, y, weight, eps)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return elementwise.rotate(x, cos, sin)

    def silu_mul(self, x: Tensor) -> Tensor:
        return elementwise.silu_mul(x)

    def store_kv(self, kv: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        kv_store.store_kv(kv, keys, values, slots)

    def plan_attention(
        self, shape: AttentionShape, sequences: Sequence[SequenceSlice], dtype: torch.dtype
    ) -> AttentionPlan:
        pages = (len(sequence.pages) for sequence in sequences)
        max_pages = max(pages, default=1) if shape.max_pages is None else shape.max_pages
        return plan(shape, sequences, dtype, self.device, max_pages)

    def attention(self, plan: Any, queries: Tensor, kv: Tensor) -> Tensor:
        return attention.attend(plan, queries, kv)

    def kv_attention(self, kind: KVKind) -> TritonKVAttention:
        return TritonKVAttention(kind, self.device)

    def sample(self, logits: Tensor, rows: SamplingRows) -> Tensor:
        return sampling.sample(logits, rows)

    def bind_pages(self, places: AdapterPlaces, others: AdapterSites) -> AdapterSites:
        """See `ops.PagedKernels`."""
        return delta_group.bind_pages(places, others, self.device)

    def group_deltas(self, segments: Sequence[DeltaSegment]) -> DeltaGroup:
        return delta_group.group(segments, self.device)

    def write_pages(self, storage: Tensor, pages: Sequence[int], layers: Sequence[Tensor]) -> None:
        self._copier.write_pages(storage, pages, layers)

    def recorded_rows(self, rows: int) -> int | None:
        return next((size for size in RECORDED_ROWS if size >= rows), None)

    def sizes_to_record(self, most_rows: int) -> Sequence[int]:
        if self.device.type != "cuda":
            return ()
        largest = self.recorded_rows(most_rows) or RECORDED_ROWS[-1]
        # The largest first: its memory serves the others.
        return [size for size in reversed(RECORDED_ROWS) if size <= largest]

    def record(
        self, inputs: Sequence[Any], run: Callable[[], Tensor]
    ) -> tuple[Tensor, RecordedStep | None]:
        if self.device.type != "cuda":
            return run(), None
        return self._graphs.record(inputs, run)
