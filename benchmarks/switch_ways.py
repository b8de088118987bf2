"""Ways to switch the weights of linear layers from one adapter to another (`fused_switch.py`).

What a way needs of the adapters and what takes about as much memory as they do, it makes before it
is timed. Each way has weights of its own: what one leaves behind is not in the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from polydelta.adapters_store.base_layout import FusedLinear
from polydelta.kernels.cpu.fusing import block_products
from polydelta.kernels.cpu.linear import PackedLinear
from polydelta.kernels.cpu.native import NativeLibrary
from polydelta.kernels.cpu.packed_layout import PackedLayout, layout_of, memory_of, pack
from polydelta.kernels.delta_weights import LowRankBlock, LowRankWeights, SparseWeights, dense
from polydelta.kernels.fusing import entry_rows
from polydelta.kernels.ops import FusedDelta

RANK, SHARE = 32, 0.01
# Layer, adapter (0 or 1).
Act = Callable[[int, int], None]


@dataclass
class Way:
    """One way to switch."""

    # "sparse" or "LoRA"; None for what is shown and not compared.
    side: str | None
    name: str
    # Puts adapter 0 or 1 in the place of the other.
    switch: Callable[[int], None]
    # Whether taking an adapter out brings every bit back.
    exact: bool = True
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass(frozen=True, eq=False)
class Layer:
    """One linear layer, and two adapters of each kind for it."""

    # [out, in]
    weight: Tensor
    sparse: tuple[SparseWeights, SparseWeights]
    low_rank: tuple[LowRankWeights, LowRankWeights]

    def products(self, adapter: int) -> list[tuple[slice, Tensor, Tensor]]:
        """Rows, B and A of each part of a low-rank adapter."""
        delta = self.low_rank[adapter]
        return [
            (
                slice(block.out_start, block.out_start + block.b_t.shape[1]),
                dense(block.b_t, self.weight.dtype).t().contiguous(),
                dense(delta.a, self.weight.dtype).narrow(0, block.rank_start, block.b_t.shape[0]),
            )
            for block in delta.blocks
        ]


def make_layer(weight: Tensor, linear: FusedLinear) -> Layer:
    sparse = (_sparse(weight), _sparse(weight))
    return Layer(weight, sparse, (_low_rank(weight, linear), _low_rank(weight, linear)))


def plain_ways(layers: Sequence[Layer], library: NativeLibrary | None) -> list[Way]:
    """For weights as torch has them."""
    return [*_plain_sparse(layers, library), *_plain_low_rank(layers)]


def packed_ways(layers: Sequence[Layer], library: NativeLibrary | None) -> list[Way]:
    """For weights as the engine has them."""
    linears, others = (
        [PackedLinear(layer.weight, None, library) for layer in layers] for _ in range(2)
    )
    entries = [
        [linear.prepare([delta]) for delta in layer.sparse]
        for linear, layer in zip(linears, layers, strict=True)
    ]
    merged = [
        [linear.prepare([delta]) for delta in layer.low_rank]
        for linear, layer in zip(others, layers, strict=True)
    ]
    for fused in (*entries, *merged):
        fused[0].fuse()

    def ready(all_fused: Sequence[Sequence[FusedDelta]]) -> Callable[[int], None]:
        return _in_turn(
            layers,
            lambda layer, adapter: all_fused[layer][adapter].unfuse(),
            lambda layer, adapter: all_fused[layer][adapter].fuse(),
        )

    return [
        Way("sparse", "entries in place (the engine's)", ready(entries)),
        *_packed_low_rank(layers),
        Way(None, "LoRA merged beforehand, a model in memory for each", ready(merged)),
    ]


def _in_turn(layers: Sequence[Layer], out: Act, into: Act) -> Callable[[int], None]:
    """All layers of the old adapter, then all of the new one."""

    def switch(adapter: int) -> None:
        for layer in range(len(layers)):
            out(layer, 1 - adapter)
        for layer in range(len(layers)):
            into(layer, adapter)

    return switch


def _nothing(layer: int, adapter: int) -> None:
    """For ways that start from a kept original."""


def _plain_sparse(layers: Sequence[Layer], library: NativeLibrary | None) -> list[Way]:
    memory = [layer.weight.flatten().clone() for layer in layers]
    places = [
        [entry_rows(delta) * layer.weight.shape[1] + delta.columns.long() for delta in layer.sparse]
        for layer in layers
    ]
    old = [[m[p] for p in pair] for m, pair in zip(memory, places, strict=True)]
    new = [
        [values + delta.values for values, delta in zip(pair, layer.sparse, strict=True)]
        for pair, layer in zip(old, layers, strict=True)
    ]

    def index_copy(values: list[list[Tensor]], layer: int, adapter: int) -> None:
        memory[layer].index_copy_(0, places[layer][adapter], values[layer][adapter])

    def saved_then_copied(layer: int, adapter: int) -> None:
        old[layer][adapter] = memory[layer][places[layer][adapter]]
        index_copy(new, layer, adapter)

    def scatter(values: list[list[Tensor]], layer: int, adapter: int) -> None:
        memory[layer].scatter_(0, places[layer][adapter], values[layer][adapter])

    ways = [
        Way(
            "sparse",
            "index_copy_, old entries kept",
            _in_turn(layers, partial(index_copy, old), partial(index_copy, new)),
        ),
        Way(
            None,
            "index_copy_, old entries saved at the switch",
            _in_turn(layers, partial(index_copy, old), saved_then_copied),
        ),
        Way(
            None,
            "scatter_, old entries kept",
            _in_turn(layers, partial(scatter, old), partial(scatter, new)),
        ),
    ]
    if library is None:
        return ways
    compiled, narrow = library.scatter, [[p.int() for p in pair] for pair in places]

    def ours(values: list[list[Tensor]], layer: int, adapter: int) -> None:
        compiled(memory[layer], narrow[layer][adapter], values[layer][adapter])

    return [
        Way(
            "sparse",
            "our loop in C, old entries kept",
            _in_turn(layers, partial(ours, old), partial(ours, new)),
        ),
        *ways,
    ]


def _plain_low_rank(layers: Sequence[Layer]) -> list[Way]:
    weights = [layer.weight.clone() for layer in layers]
    products = [[layer.products(adapter) for adapter in (0, 1)] for layer in layers]

    def from_original(layer: int, adapter: int) -> None:
        for rows, b, a in products[layer][adapter]:
            torch.addmm(layers[layer].weight[rows], b, a, out=weights[layer][rows])

    def add(sign: int, layer: int, adapter: int) -> None:
        for rows, b, a in products[layer][adapter]:
            weights[layer][rows].addmm_(b, a, alpha=sign)

    return [
        Way("LoRA", "addmm onto a kept original", _in_turn(layers, _nothing, from_original)),
        Way(
            "LoRA",
            "addmm_, subtracted and added",
            _in_turn(layers, partial(add, -1), partial(add, 1)),
            exact=False,
        ),
    ]


def _packed_low_rank(layers: Sequence[Layer]) -> list[Way]:
    products = [[layer.products(adapter) for adapter in (0, 1)] for layer in layers]
    plain = [torch.empty_like(layer.weight) for layer in layers]
    packed = [pack(layer.weight) for layer in layers]

    def packed_again(layer: int, adapter: int) -> None:
        for rows, b, a in products[layer][adapter]:
            torch.addmm(layers[layer].weight[rows], b, a, out=plain[layer][rows])
        packed[layer] = pack(plain[layer])

    ways = [
        Way("LoRA", "addmm onto a kept original, packed", _in_turn(layers, _nothing, packed_again))
    ]
    layouts = [layout_of(layer.weight.shape, layer.weight.dtype) for layer in layers]
    known = [layout for layout in layouts if layout is not None]
    return ways + _in_blocks(layers, known) if len(known) == len(layers) else ways


def _in_blocks(layers: Sequence[Layer], layouts: Sequence[PackedLayout]) -> list[Way]:
    """Without unpacking."""
    original, exact, inexact = (
        [
            layout.blocks(memory_of(pack(layer.weight)).clone())
            for layer, layout in zip(layers, layouts, strict=True)
        ]
        for _ in range(3)
    )
    added = [
        [block_products(layout, delta, layer.weight.dtype) for delta in layer.low_rank]
        for layer, layout in zip(layers, layouts, strict=True)
    ]
    subtracted = [
        [[replace(product, right=-product.right) for product in each] for each in pair]
        for pair in added
    ]

    def from_original(layer: int, adapter: int) -> None:
        for product in added[layer][adapter]:
            product.add(original[layer], exact[layer])

    def add(layer: int, adapter: int) -> None:
        for product in added[layer][adapter]:
            product.add(inexact[layer], inexact[layer])

    def subtract(layer: int, adapter: int) -> None:
        for product in subtracted[layer][adapter]:
            product.add(inexact[layer], inexact[layer])

    return [
        Way(
            "LoRA",
            "baddbmm by blocks onto a kept original (as the engine merges)",
            _in_turn(layers, _nothing, from_original),
        ),
        Way(
            "LoRA",
            "baddbmm_ by blocks, subtracted and added",
            _in_turn(layers, subtract, add),
            exact=False,
        ),
    ]


def _sparse(weight: Tensor) -> SparseWeights:
    """Entries anywhere, as PEFT's SHiRA chooses them."""
    rows, columns = weight.shape
    entries = torch.randperm(rows * columns)[: int(SHARE * rows * columns)].sort().values
    counts = (entries // columns).bincount(minlength=rows)
    values = (torch.randn(len(entries)) * 0.01).to(weight.dtype)
    return SparseWeights(F.pad(counts.cumsum(0), (1, 0)).int(), (entries % columns).int(), values)


def _low_rank(weight: Tensor, linear: FusedLinear) -> LowRankWeights:
    """Each part of the layer has factors of its own."""
    dtype = weight.dtype
    a = torch.randn(RANK * len(linear.parts), linear.in_features) / linear.in_features**0.5
    blocks = tuple(
        LowRankBlock(start, RANK * number, (torch.randn(RANK, part.out_features) * 0.01).to(dtype))
        for number, (part, start) in enumerate(linear.spans())
    )
    return LowRankWeights(a.to(dtype), blocks)
