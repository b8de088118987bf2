"""The CPU's kernels for bfloat16 on a machine with AVX512-BF16: all of a decoder in our own C.

A pool of threads of its own computes each operation; torch keeps one thread, because the threads of
two libraries that wait for work on the same cores keep each other from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polydelta.kernels.cpu import native_pages
from polydelta.kernels.cpu.kernels import CpuKernels
from polydelta.kernels.cpu.native import NativeLibrary, Struct
from polydelta.kernels.cpu.native_groups import NativeSites, group
from polydelta.kernels.cpu.native_kv import NativeKVAttention
from polydelta.kernels.cpu.native_kv_layout import MOST_HEAD_DIM, MOST_SCORES, takes
from polydelta.kernels.cpu.native_pages import CopiedLayers
from polydelta.kernels.cpu.panels import PanelLinear
from polydelta.kernels.cpu.quantized_linear import QuantizedLinear
from polydelta.kernels.cpu.recording import record
from polydelta.kernels.delta_groups import (
    AdapterPlaces,
    AdapterSites,
    DeltaGroup,
    DeltaSegment,
    Linear,
    SiteDeltas,
)
from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_memory import KVKind
from polydelta.kernels.ops import AttentionShape, FusableLinear, RecordedStep, SequenceSlice
from polydelta.kernels.page_writing import in_one_run
from polydelta.kernels.quantized_weight import QuantizedWeight

# More rows keep the cores busy enough.
MOST_RECORDED = 64


@dataclass(frozen=True, eq=False)
class NativePlan:
    """A step's attention for `attention.c`."""

    struct: Struct
    recordable = True

    def assume(self, other: NativePlan) -> None:
        """Takes the content of another plan in the place of its own."""
        self.struct.assume(other.struct)


class Bfloat16Kernels(CpuKernels):
    """What is not bfloat16, or has a shape that our kernels do not take, is torch's."""

    def __init__(self, library: NativeLibrary, threads: int) -> None:
        """library: one that `computes_decoders`."""
        super().__init__(library)
        self._library = library
        self._threads = threads
        self._pool = library.open_pool(threads)

    def enter_thread(self) -> None:
        torch.set_num_threads(1)

    def linear(self, weight: Tensor, bias: Tensor | None) -> FusableLinear:
        if not _ours(weight) or weight.shape[1] % 2:
            return super().linear(weight, bias)
        return PanelLinear(weight, bias, self._pool, self._library)

    def head(self, weight: Tensor) -> Linear:
        if not _ours(weight) or weight.shape[1] % 2:
            return super().head(weight)
        return PanelLinear(weight, None, self._pool, self._library, wide=True)

    def quantized_linear(self, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        if weight.shape[1] % 2:
            return super().linear(weight.dequantized().bfloat16(), bias)
        return QuantizedLinear(weight, bias, self._pool)

    def quantized_head(self, weight: QuantizedWeight) -> Linear:
        if weight.shape[1] % 2:
            return super().head(weight.dequantized().bfloat16())
        return QuantizedLinear(weight, None, self._pool, wide=True)

    def gather(self, table: Tensor, rows: Tensor) -> Tensor:
        if not _ours(table):
            return super().gather(table, rows)
        gathered = self._pool.empty(len(rows), table.shape[1])
        self._pool.call("gather", gathered, table, rows, len(rows), table.shape[1])
        return gathered

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        if not _ours(x):
            return super().add(x, y)
        self._pool.call("add", x, y, x.numel())
        return x

    def argmax(self, x: Tensor) -> Tensor:
        places = torch.empty(len(x), dtype=torch.int64)
        self._pool.call("argmax", places, x, len(x), x.shape[1])
        return places

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not _ours(x) or not _ours(weight):
            return super().rms_norm(x, weight, eps)
        groups = x.shape[1] if x.dim() == 3 else 1
        y = self._pool.empty(*x.shape)
        size = x.shape[-1]
        self._pool.call("rms_norm", y, x, x.stride(0), weight, len(x), groups, size, eps)
        return y

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not _ours(x):
            return super().rotate(x, cos, sin)
        rows, heads, size = x.shape
        self._pool.call("embed_positions", x, x.stride(0), cos, sin, rows, heads, size)
        return x

    def silu_mul(self, x: Tensor) -> Tensor:
        if not _ours(x):
            return super().silu_mul(x)
        rows, size = x.shape[0], x.shape[1] // 2
        y = self._pool.empty(rows, size)
        self._pool.call("silu_mul", y, x, rows, size)
        return y

    def store_kv(self, kv: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        if not _ours(kv):
            super().store_kv(kv, keys, values, slots)
            return
        size, block_size = keys[0].numel(), kv.shape[2]
        key_stride, value_stride = keys.stride(0), values.stride(0)
        self._pool.call(
            "store_kv",
            kv,
            keys,
            values,
            key_stride,
            value_stride,
            slots,
            len(slots),
            size,
            block_size,
        )

    def plan_attention(
        self, shape: AttentionShape, sequences: Sequence[SequenceSlice], dtype: torch.dtype
    ) -> Any:
        if dtype != torch.bfloat16 or shape.head_dim % 2 or shape.head_dim > MOST_HEAD_DIM:
            return super().plan_attention(shape, sequences, dtype)
        group = shape.num_heads // shape.num_kv_heads
        # What decodes reads its pages from end to end, unless that leaves threads without work.
        alone = len(sequences) < 2 * self._threads or shape.num_heads > MOST_SCORES
        slices: list[int] = []
        pages: list[int] = []
        items = 0
        for s in sequences:
            at_once = 1 if alone or s.length > 1 else shape.num_kv_heads
            block = max(1, MOST_SCORES // (group * at_once))
            slices += (s.start, s.length, s.context, len(pages), items, at_once)
            pages += s.pages[: -(-s.context // shape.block_size)]
            items += -(-s.length // block) * (shape.num_kv_heads // at_once)
        return NativePlan(
            Struct(
                (
                    shape.num_heads,
                    shape.num_kv_heads,
                    shape.head_dim,
                    shape.block_size,
                    shape.window or 0,
                    len(sequences),
                    items,
                    torch.tensor(slices),
                    torch.tensor(pages),
                    1.0 / math.sqrt(shape.head_dim),
                )
            )
        )

    def attention(self, plan: Any, queries: Tensor, kv: Tensor) -> Tensor:
        if not isinstance(plan, NativePlan):
            return super().attention(plan, queries, kv)
        out = self._pool.empty(*queries.shape)
        query_stride, out_stride = queries.stride(0), out.stride(0)
        self._pool.call("attend", plan.struct, out, out_stride, queries, query_stride, kv)
        return out

    def kv_attention(self, kind: KVKind) -> KVAttention:
        if not takes(kind):
            return super().kv_attention(kind)
        return NativeKVAttention(kind, self._pool, self._threads)

    def bind_sites(self, sites: Sequence[SiteDeltas | None]) -> AdapterSites:
        return NativeSites(sites, self._library)

    def bind_pages(self, places: AdapterPlaces, others: AdapterSites) -> AdapterSites:
        """See `ops.PagedKernels`."""
        paged = native_pages.bind_pages(places, others)
        if paged is not None:
            return paged
        if in_one_run(places.pages):
            return self.bind_sites([others[site] for site in range(len(places.sites))])
        copied = CopiedLayers(places, others)
        return NativeSites(self._bound_to(copied, places), self._library, copied)

    def _bound_to(self, copied: CopiedLayers, places: AdapterPlaces) -> list[SiteDeltas | None]:
        """Its sites; layers with the same deltas at the same places share theirs."""
        known: dict[tuple[int, int, int], SiteDeltas] = {}
        bound: list[SiteDeltas | None] = []
        for site in places.sites:
            if site is None:
                bound.append(None)
                continue
            # Any of the three may be the one empty tuple that there is.
            key = id(site.changes), id(site.adds), id(site.biases)
            if key not in known:
                known[key] = SiteDeltas(
                    [self.change_output(copied.placed(weights)) for weights in site.changes],
                    [self.add_delta(copied.placed(weights)) for weights in site.adds],
                    [copied.placed(bias) for bias in site.biases],
                )
            bound.append(known[key])
        return bound

    def write_pages(self, storage: Tensor, pages: Sequence[int], layers: Sequence[Tensor]) -> None:
        native_pages.write_pages(self._pool, storage, pages, layers)

    def group_deltas(self, segments: Sequence[DeltaSegment]) -> DeltaGroup:
        return group(self._pool, segments)

    def recorded_rows(self, rows: int) -> int | None:
        return rows if rows <= MOST_RECORDED else None

    def record(
        self, inputs: Sequence[Any], run: Callable[[], Tensor]
    ) -> tuple[Tensor, RecordedStep | None]:
        return record(self._pool, inputs, run)


def _ours(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16
