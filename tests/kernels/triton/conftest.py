"""What tests of Triton's kernels share: the device that they run on, adapters in scattered pages of
a pool, and KV caches of any format beside the same in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.packed_deltas import (
    LowRankBlock,
    PackedBias,
    PackedColumns,
    PackedDelta,
    PackedKronecker,
    PackedLowRank,
    PackedOneBit,
    PackedRows,
    PackedScale,
    PackedSparse,
)
from polydelta.adapters_store.packed_tensors import vector_view
from polydelta.adapters_store.packing_writer import LayerWriter
from polydelta.engine.delta_views import add_weights, change_weights
from polydelta.kernels.delta_groups import AdapterPlaces, OutputBias, SiteDeltas, SitePlaces
from polydelta.kernels.delta_weights import QuantizedMatrix
from polydelta.kernels.kv_memory import KVKind, KVMemory
from polydelta.kernels.kv_selection import Selection
from polydelta.kernels.ops import SequenceSlice
from polydelta.kernels.reference import ReferenceKernels
from polydelta.kernels.triton.kv_attention import TritonKVAttention, TritonKVPlan

# Puts a delta of some kind into a layer. Its numbers are random.
Packer = Callable[[LayerWriter], PackedDelta]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU, where Triton's interpreter runs the kernels."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def low_rank(in_features: int, *parts: tuple[int, int, int]) -> Packer:
    """parts: out_start, out_features and rank of each."""

    def pack(writer: LayerWriter) -> PackedDelta:
        a = torch.randn(sum(rank for _, _, rank in parts), in_features) / in_features**0.5
        packed, blocks, start = writer.low_rank_matrix(a), [], 0
        for out_start, out, rank in parts:
            b_t = writer.low_rank_matrix(torch.randn(rank, out) / rank**0.5)
            blocks.append(LowRankBlock(out_start, out, start, rank, b_t))
            start += rank
        return PackedLowRank(0, packed, tuple(blocks))

    return pack


def sparse(in_features: int, out: int, share: float = 0.1) -> Packer:
    def pack(writer: LayerWriter) -> PackedDelta:
        wanted = torch.rand(out, in_features) < share
        pointers = torch.cat((torch.zeros(1), wanted.sum(1).cumsum(0)))
        columns = wanted.nonzero()[:, 1]
        return PackedSparse(
            0,
            (out, in_features),
            writer.vector(pointers, torch.int32),
            writer.vector(columns, torch.int32),
            writer.vector(torch.randn(len(columns)) / 3, writer.dtype),
        )

    return pack


def columns(in_features: int, out_start: int, out: int, count: int) -> Packer:
    def pack(writer: LayerWriter) -> PackedDelta:
        indices = writer.vector(torch.randperm(in_features)[:count].sort()[0], torch.int32)
        block_t = writer.matrix(torch.randn(count, out) / count**0.5)
        return PackedColumns(0, out_start, indices, block_t)

    return pack


def rows(in_features: int, out: int, count: int) -> Packer:
    """Some of them occur twice."""

    def pack(writer: LayerWriter) -> PackedDelta:
        indices = torch.cat((torch.randperm(out)[:count], torch.tensor([0, out - 1, 0])))
        block = torch.randn(len(indices), in_features) / in_features**0.5
        return PackedRows(0, writer.vector(indices, torch.int32), writer.matrix(block))

    return pack


def one_bit(in_features: int, out_start: int, out: int) -> Packer:
    def pack(writer: LayerWriter) -> PackedDelta:
        bits = torch.randint(0, 256, (out, -(-in_features // 8)), dtype=torch.uint8)
        scale = writer.vector(torch.tensor([in_features**-0.5]), torch.float32)
        return PackedOneBit(0, out_start, in_features, writer.byte_matrix(bits), scale)

    return pack


def scale(out_start: int, out: int) -> Packer:
    return lambda writer: PackedScale(0, out_start, writer.vector(torch.randn(out), torch.float32))


def bias(out_start: int, out: int) -> Packer:
    return lambda writer: PackedBias(0, out_start, writer.vector(torch.randn(out), torch.float32))


def kronecker(a: int, b: int, c: int, d: int) -> Packer:
    """One that is not read through page tables."""
    return lambda writer: PackedKronecker(
        0, 0, writer.matrix(torch.randn(a, b)), writer.matrix(torch.randn(c, d) / (b * d) ** 0.5)
    )


PACKERS = {
    packer.__name__: packer
    for packer in (low_rank, sparse, columns, rows, one_bit, scale, bias, kronecker)
}


@dataclass(frozen=True, eq=False)
class PooledAdapter:
    places: AdapterPlaces
    # What ReferenceKernels make of it; in float64, so that nothing is rounded.
    truth: Sequence[SiteDeltas | None]
    # The same in the adapter's dtype.
    others: Sequence[SiteDeltas | None]


class AdapterPool:
    """Pages of a pool, taken in random order. What no adapter has written is no number."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, layers: int = 1, page_bytes: int = 192,
        num_pages: int = 4000, seed: int = 0,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self._dtype = dtype
        shape = (layers, num_pages, page_bytes)
        self.storage = torch.full(shape, 255, dtype=torch.uint8, device=device)
        self._free = torch.randperm(num_pages).tolist()

    def add(self, *sites: Sequence[Packer], bits: int | None = None) -> PooledAdapter:
        """An adapter whose site i is in layer i. bits: of low-rank matrices."""
        layers = [self._pack(site, bits) for site in sites]
        size = self.storage.shape[-1]
        most = max(len(data) for data, _ in layers)
        pages = [self._free.pop() for _ in range(-(-most // size))]
        for layer, (data, _) in enumerate(layers):
            for page, part in zip(pages, data.split(size), strict=False):
                self.storage[layer, page, : len(part)] = part
        meta = torch.empty(len(pages) * size, dtype=torch.uint8, device="meta")
        places = [
            self._site(deltas, meta, layer) if deltas else None
            for layer, (_, deltas) in enumerate(layers)
        ]
        whole = [
            self._site(deltas, data.to(self.storage.device), layer) if deltas else None
            for layer, (data, deltas) in enumerate(layers)
        ]
        return PooledAdapter(
            AdapterPlaces(self.storage, pages, places, self._dtype),
            [bound(site, widened) for site in whole],
            [bound(site, lambda weights: weights) for site in whole],
        )

    def _pack(
        self, site: Sequence[Packer], bits: int | None
    ) -> tuple[Tensor, Sequence[PackedDelta]]:
        writer = LayerWriter(self._dtype, bits)
        writer.vector(torch.zeros(1), torch.float32)  # no delta starts at 0
        deltas = [packer(writer) for packer in site]
        return writer.data(), deltas

    def _site(self, deltas: Sequence[PackedDelta], data: Tensor, layer: int) -> SitePlaces:
        site = SitePlaces(layer)
        for delta in deltas:
            if isinstance(delta, PackedBias):
                site.biases.append(OutputBias(delta.out_start, vector_view(data, delta.vector)))
            elif isinstance(delta, PackedScale):
                site.changes.append(change_weights(delta, data))
            else:
                site.adds.append(add_weights(delta, data, self._dtype))
        return site


def bound(site: SitePlaces | None, of: Callable[[Any], Any]) -> SiteDeltas | None:
    """of: what is bound in the place of weights."""
    kernels = ReferenceKernels()
    return site and SiteDeltas(
        [kernels.change_output(of(weights)) for weights in site.changes],
        [kernels.add_delta(of(weights)) for weights in site.adds],
        [OutputBias(b.start, of(b.vector)) for b in site.biases],
    )


def widened(weights: Any) -> Any:
    """The same numbers in float64."""
    if isinstance(weights, QuantizedMatrix):
        return weights.dequantized(torch.float64)
    if isinstance(weights, Tensor):
        return weights.double() if weights.is_floating_point() else weights
    if isinstance(weights, tuple):
        return tuple(widened(item) for item in weights)
    if is_dataclass(weights) and not isinstance(weights, type):
        return replace(
            weights, **{f.name: widened(getattr(weights, f.name)) for f in fields(weights)}
        )
    return weights


@pytest.fixture(scope="session")
def adapter_pool() -> type[AdapterPool]:
    return AdapterPool


@pytest.fixture(scope="session")
def packers() -> dict[str, Callable[..., Packer]]:
    """By kind of delta."""
    return PACKERS


# Errors of Triton's attention against plain torch's, as shares of the largest value: keys, values
# and weights are rounded once more.
KV_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class OnDevice:
    """Triton's attention for a trial whose tensors are on the CPU."""

    def __init__(self, kind: KVKind, device: torch.device) -> None:
        self._device = device
        self._attention = TritonKVAttention(kind, device)

    def plan(self, slices: Sequence[SequenceSlice]) -> TritonKVPlan:
        return self._attention.plan(slices)

    def attend(self, plan: TritonKVPlan, layer: int, memory: KVMemory, *rows: Tensor) -> Tensor:
        opened = None if memory.open is None else memory.open.to(self._device)
        there = replace(memory, pages=memory.pages.to(self._device), open=opened)
        moved = (each.to(self._device) for each in rows)
        out = self._attention.attend(plan, layer, there, *moved).cpu()
        memory.pages.copy_(there.pages)
        if memory.open is not None:
            memory.open.copy_(there.open)
        return out


class KVPair:
    """The same trial twice: in plain torch, and in Triton, which is checked against it."""

    def __init__(
        self, trial: Callable[..., Any], device: torch.device, *args: Any, **sizes: Any
    ) -> None:
        sizes = {"page_tokens": 4, "dtype": torch.float32} | sizes
        sizes["query_dtype"] = sizes["dtype"]
        self.plain = trial(*args, **sizes)
        self.triton = trial(*args, **sizes, attention=lambda kind, _: OnDevice(kind, device))

    def fill(self, *parts: tuple[int, int, int, Selection]) -> None:
        """A step in plain torch alone, which is faster than the interpreter."""
        self.plain.step(parts)
        for name in ("pages", "open"):
            mine, other = (getattr(each.memory, name) for each in (self.plain, self.triton))
            if mine is not None:
                other.copy_(mine)

    def check(self, *parts: tuple[int, int, int, Selection]) -> list[Tensor]:
        """A step in both: what Triton gives, which is near to the truth."""
        got = self.triton.step(parts)
        for mine, wanted in zip(got, self.plain.step(parts), strict=True):
            assert mine.dtype == wanted.dtype
            error = (mine.double() - wanted.double()).abs()
            # Not `error > bound`: a NaN is an error too.
            near = error <= KV_TOLERANCE[mine.dtype] * wanted.double().abs().max()
            assert near.all(), f"off by up to {float(error.max()):.3g}"
        return got


@pytest.fixture
def kv_pair(kv_trial: Callable[..., Any], device: torch.device) -> Callable[..., KVPair]:
    return lambda *args, **sizes: KVPair(kv_trial, device, *args, **sizes)
