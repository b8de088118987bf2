"""Adapters in the packed weights of a CPU's linear layers.

A sparse delta writes its entries where they lie in the packed weight. A low-rank one changes every
entry: it gets a packed weight of its own, summed block by block without unpacking. In the rare case
of both in one layer, or where the layout is unknown, the sum is taken of plain matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.kernels.cpu.native import NativeLibrary
from polydelta.kernels.cpu.packed_layout import PackedLayout, Packing
from polydelta.kernels.delta_weights import LowRankWeights, SparseWeights, dense
from polydelta.kernels.fusing import FusableWeight, Fused, FusedWeight, entry_rows, with_deltas


class FusedEntries(Fused):
    """The entries that a sparse delta changes: where they lie, what is there, what comes there.

    Memory: 4 bytes and two values for each entry, 8 bytes of places where there is no compiler.
    """

    def __init__(
        self,
        linear: FusableWeight,
        packing: Packing,
        places: Tensor,
        old: Tensor,
        new: Tensor,
        library: NativeLibrary | None,
    ) -> None:
        """places: `[n]` int64, ascending, all different, into the memory of `linear.base`;
        old, new: `[n]`."""
        super().__init__(linear)
        self._memory = packing.memory(linear.base)
        # 2^31 elements are 4 GiB of bfloat16: wider layers go by torch.
        self._library = library if len(self._memory) < 2**31 else None
        self._places = places if self._library is None else places.int()
        self._old, self._new = old, new

    def restore(self, memory: Tensor) -> None:
        """Takes the delta out of a copy of the weight's memory."""
        self._write(memory, self._old)

    def _put_in(self) -> None:
        self._write(self._memory, self._new)

    def _take_out(self) -> None:
        self._write(self._memory, self._old)

    def _write(self, memory: Tensor, values: Tensor) -> None:
        if self._library is None:
            # Inference tensors may be written to nowhere else, and others there as well.
            with torch.inference_mode():
                memory.index_copy_(0, self._places, values)
        else:
            self._library.scatter(memory, self._places, values)


@torch.inference_mode()
def prepare(
    linear: FusableWeight,
    packing: Packing,
    deltas: Sequence[LowRankWeights | SparseWeights],
    library: NativeLibrary | None,
) -> Fused:
    """`ops.FusableLinear.prepare` for a weight in a packing."""
    base = _copy_of_base(linear, packing)
    layout = packing.layout
    match deltas:
        case [SparseWeights() as delta] if layout is not None:
            places, order = layout.places(entry_rows(delta), delta.columns.long()).sort()
            old = packing.memory(base).index_select(0, places)
            new = (old.float() + delta.values.index_select(0, order).float()).to(old.dtype)
            return FusedEntries(linear, packing, places, old, new, library)
        case [LowRankWeights() as delta] if layout is not None:
            blocks = layout.blocks(packing.memory(base))
            for product in block_products(layout, delta, blocks.dtype):
                product.add(blocks, blocks)
            return FusedWeight(linear, base)
        case _:
            return FusedWeight(linear, packing.pack(with_deltas(packing.unpack(base), deltas)))


@dataclass(frozen=True, eq=False)
class BlockProduct:
    """What a low-rank delta adds to some blocks of a packed weight: `left @ right`."""

    # Of `PackedLayout.blocks`: first : first + count.
    first: int
    count: int
    # [in / pair, pair * rank]
    left: Tensor
    # [count, pair * rank, rows * pair]
    right: Tensor

    def add(self, base: Tensor, out: Tensor) -> None:
        """out = base + the product, for all blocks of a weight, `[blocks, in / pair, rows, pair]`;
        they may be the same."""
        base, out = (t.narrow(0, self.first, self.count).flatten(2) for t in (base, out))
        torch.baddbmm(base, self.left.expand(self.count, -1, -1), self.right, out=out)


def block_products(
    layout: PackedLayout, delta: LowRankWeights, dtype: torch.dtype
) -> list[BlockProduct]:
    """One for each part of the delta; dtype: of the weight.

    The columns of a block lie as its transpose does: `[in, rows]`. Where they are paired, so are
    those of A, and B meets each half of a pair beside zeros; the products with them cost less than
    unpacking and packing (on a 2-core Zen 5, 4096 x 4096, rank 32, bfloat16: 4.2 ms, not 36).
    """
    all_a, products = dense(delta.a, dtype), []
    for block in delta.blocks:
        part = dense(block.b_t, dtype)
        rank, out_features = part.shape
        first, skipped = divmod(block.out_start, layout.rows)
        count = -(-(skipped + out_features) // layout.rows)
        # Zeros for rows of the first and the last block that are not this part's.
        b_t = part.new_zeros(rank, count * layout.rows)
        b_t.narrow(1, skipped, out_features).copy_(part)
        b_t = b_t.view(rank, count, layout.rows).transpose(0, 1)
        a = all_a.narrow(0, block.rank_start, rank)
        products.append(BlockProduct(first, count, *_paired(a, b_t, layout)))
    return products


def _paired(a: Tensor, b_t: Tensor, layout: PackedLayout) -> tuple[Tensor, Tensor]:
    """a `[rank, in]`, b_t `[blocks, rank, rows]` -> `[in / pair, pair * rank]`,
    `[blocks, pair * rank, rows * pair]`, whose product has the order of a block."""
    rank, in_features = a.shape
    blocks, _, rows = b_t.shape
    pair = layout.pair
    padded = torch.nn.functional.pad(a, (0, layout.in_features - in_features))
    left = padded.view(rank, -1, pair).permute(1, 2, 0).reshape(-1, pair * rank)
    right = b_t.new_zeros(blocks, pair, rank, rows, pair)
    for half in range(pair):
        right[:, half, :, :, half] = b_t
    return left, right.view(blocks, pair * rank, rows * pair)


def _copy_of_base(linear: FusableWeight, packing: Packing) -> Tensor:
    """The packed weight as it was loaded, whatever is in it now."""
    with linear.lock:
        copy = linear.base.clone()
        memory = packing.memory(copy)
        # Once more, because oneDNN's copy makes zeros of subnormal numbers.
        memory.copy_(packing.memory(linear.base))
        if isinstance(linear.fused, FusedEntries):
            linear.fused.restore(memory)
    return copy
