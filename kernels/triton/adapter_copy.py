"""An adapter's bytes from host memory into pages of the pool, beside the step at hand.

One copy brings all layers to the device on a stream of its own, while the GPU computes; then one
launch on the computing stream cuts them over the pages. So nothing is written into pages that a
step under way may still use, and nobody waits for a copy but the steps that come after it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from polydelta.kernels.triton.shipping import Floor, ShippedKernel
from polydelta.kernels.upload import upload

# Of what is copied at a time; layers and pages are multiples of 64 bytes.
_WORD = torch.int64
_BLOCK = 1024
# Bytes on the device that wait to be cut over pages; one larger adapter goes alone.
_STAGED = 512 << 20


class AdapterCopier:
    """Writes adapters into the pool of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Bytes of each copy that is staged, and the end of the launch that reads them.
        self._under_way: deque[tuple[int, torch.cuda.Event]] = deque()

    def write_pages(self, storage: Tensor, pages: Sequence[int], layers: Sequence[Tensor]) -> None:
        """See `ops.Kernels.write_pages`."""
        sizes = [len(layer) for layer in layers]
        if not sum(sizes):
            return
        self._make_room(sum(sizes))
        staged = self._staged(in_one_piece(layers))
        starts = [start // _WORD.itemsize for start in accumulate(sizes, initial=0)]
        # [pages + layers + 1]
        table = upload([*pages, *starts], self._device)
        grid = (len(pages), len(layers))
        scatter_kernel[grid](
            storage.view(_WORD),
            staged.view(_WORD),
            table,
            len(pages),
            storage.shape[1] * (storage.shape[2] // _WORD.itemsize),
            PAGE=storage.shape[2] // _WORD.itemsize,
            BLOCK=_BLOCK,
        )
        if self._device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
            self._under_way.append((sum(sizes), done))

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def _make_room(self, nbytes: int) -> None:
        """Waits for the oldest copies, where many adapters come at once."""
        while self._under_way and self._under_way[0][1].query():
            self._under_way.popleft()
        while self._under_way and sum(size for size, _ in self._under_way) + nbytes > _STAGED:
            self._under_way.popleft()[1].synchronize()

    def _staged(self, data: Tensor) -> Tensor:
        """On the device; what is launched from now on waits until it is there."""
        if self._device.type != "cuda":
            return data.to(self._device)
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            staged = data.to(self._device, non_blocking=True)
        computing.wait_stream(self._stream)
        # Its memory is taken from the copying stream, and is not given away before it was read.
        staged.record_stream(computing)
        return staged


def in_one_piece(layers: Sequence[Tensor]) -> Tensor:
    """All bytes in their order, `[nbytes]` uint8, at least one: a view where they are neighbours,
    as those that the host store keeps are; else a copy."""
    whole = [layer for layer in layers if len(layer)]
    first, end = whole[0], whole[0].data_ptr()
    for layer in whole:
        if layer.data_ptr() != end:
            return torch.cat(whole)
        end += len(layer)
    total = end - first.data_ptr()
    if first.storage_offset() + total > first.untyped_storage().nbytes():
        return torch.cat(whole)
    return first.as_strided((total,), (1,))


@triton.jit(do_not_specialize=["num_pages"])
def scatter_kernel(
    pool, staged, table, num_pages, layer_stride, PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """One page of one layer. pool, staged: words of 8 bytes; table: page ids, then where each
    layer begins in `staged`, then where the last one ends; layer_stride: of the pool, in words."""
    place, layer = tl.program_id(0), tl.program_id(1)
    page = tl.load(table + place)
    begin = tl.load(table + num_pages + layer) + place * PAGE
    end = tl.minimum(tl.load(table + num_pages + layer + 1), begin + PAGE)
    target = pool + layer.to(tl.int64) * layer_stride + page * PAGE
    for start in range(0, PAGE, BLOCK):
        words = start + tl.arange(0, BLOCK)
        mask = (words < PAGE) & (begin + words < end)
        tl.store(target + words, tl.load(staged + begin + words, mask=mask), mask=mask)


def shipped() -> list[ShippedKernel]:
    """See `shipping.py`."""
    nbytes = 84 << 20
    return [
        ShippedKernel(
            "adapter copy, page 64 KiB",
            scatter_kernel,
            {
                "pool": "*i64",
                "staged": "*i64",
                "table": "*i64",
                "num_pages": "i32",
                "layer_stride": "i64",
            },
            {"PAGE": 8192, "BLOCK": _BLOCK},
            Floor("rank 16 on all linear layers of Llama-3-8B", 2.0 * nbytes),
            aligned=("pool", "staged", "table", "layer_stride"),
        )
    ]
