"""What the kernels' tests share: random steps over paged KV, caches of any format with random
sequences in them, and how near is near enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from polydelta.kernels.kv_attention import KVAttention
from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_formats.format import KVShape
from polydelta.kernels.kv_memory import KVKind, KVMemory
from polydelta.kernels.kv_rotation import rotated
from polydelta.kernels.kv_sections import page_layout_for
from polydelta.kernels.kv_selection import FULL, DoubleSparsity, Selection
from polydelta.kernels.ops import AttentionShape, SequenceSlice

# Largest error allowed, as a share of the largest value. A wrong row is wrong by about 1.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True, eq=False)
class PagedStep:
    """One step's attention: what each sequence asks, and the pool that it reads."""

    shape: AttentionShape
    sequences: Sequence[SequenceSlice]
    # [tokens, heads, head_dim]
    queries: Tensor
    # [pages, 2, block_size, kv_heads, head_dim]
    kv: Tensor


def make_paged_step(
    shape: AttentionShape,
    lengths: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    seed: int = 0,
    junk: float | None = None,
) -> PagedStep:
    """lengths: (queries, context) of each sequence. Their pages are scattered over a pool that has
    more; where no sequence has a token there is `junk`, or something as plausible as the rest."""
    generator = torch.Generator().manual_seed(seed)
    size = shape.block_size
    counts = [-(-context // size) for _, context in lengths]
    num_pages = sum(counts) + 3
    order = torch.randperm(num_pages, generator=generator).tolist()
    kv = torch.randn(
        num_pages, 2, size, shape.num_kv_heads, shape.head_dim, generator=generator
    ).to(dtype)
    held = torch.zeros(num_pages, size, dtype=torch.bool)
    sequences, start = [], 0
    for (length, context), count in zip(lengths, counts, strict=True):
        pages, order = order[:count], order[count:]
        sequences.append(SequenceSlice(start, length, context, pages))
        start += length
        for position in range(context):
            held[pages[position // size], position % size] = True
    if junk is not None:
        kv.transpose(1, 2)[~held] = junk
    queries = torch.randn(start, shape.num_heads, shape.head_dim, generator=generator).to(dtype)
    return PagedStep(shape, sequences, queries, kv)


# A sequence's number, its first and last position (not included), and what they read.
Part = tuple[int, int, int, Selection]


class KVTrial:
    """One layer of a cache, and sequences with random queries, keys and values. Their pages are
    scattered over a pool that has more; what nobody has written is NaN in every format."""

    def __init__(
        self,
        format: str,
        lengths: Sequence[int],
        selection: Selection = FULL,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        page_tokens: int = 5,
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        query_dtype: torch.dtype = torch.float64,
        whole_numbers: bool = False,
        host_pages: int = 0,
        layer: int = 2,
        seed: int = 0,
        attention: Callable[[KVKind, torch.device], KVAttention] = KVAttention,
    ) -> None:
        """selection: what pages are laid out for. page_tokens: that a page has room for, at least.
        whole_numbers: small ones, whose products and sums are exact and often the same."""
        self.generator = torch.Generator().manual_seed(seed)
        tokens = KVShape(kv_heads, head_dim, dtype)
        layouts = (
            page_layout_for(FORMATS[format](), selection, tokens, page_bytes)
            for page_bytes in range(64, 1 << 20, 64)
        )
        layout = next(each for each in layouts if each.block_size >= page_tokens)
        self.size, self.layer = layout.block_size, layer
        shape = AttentionShape(heads, kv_heads, head_dim, self.size, window)
        labels = None
        if isinstance(selection, DoubleSparsity):
            # The same for all seeds, as they belong to the model.
            always = torch.Generator().manual_seed(0)
            order = torch.rand(layer + 1, kv_heads, head_dim, generator=always).argsort(-1)
            labels = order[..., : head_dim // selection.label_share].sort(-1).values
        self.kind = KVKind(FORMATS[format](), layout, shape, dtype, labels)
        self.attention = attention(self.kind, torch.device("cpu"))

        def random(length: int, heads: int, dtype: torch.dtype) -> Tensor:
            size = (length, heads, head_dim)
            if whole_numbers:
                return torch.randint(-2, 3, size, generator=self.generator).to(dtype)
            return torch.randn(size, generator=self.generator).to(dtype)

        # Of each sequence: [length, heads, head_dim].
        self.queries = [random(length, heads, query_dtype) for length in lengths]
        self.keys = [random(length, kv_heads, dtype) for length in lengths]
        self.values = [random(length, kv_heads, dtype) for length in lengths]
        counts = [-(-length // self.size) for length in lengths]
        order = torch.randperm(sum(counts) + 3, generator=self.generator)
        self.pages = [part.tolist() for part in order.split([*counts, 3])[:-1]]
        nobody = torch.full((len(order) + host_pages, layout.page_bytes), 255, dtype=torch.uint8)
        size = (len(lengths), self.size, 2, kv_heads, head_dim)
        self.memory = KVMemory(
            nobody[: len(order)].clone(),
            torch.full(size, math.nan, dtype=dtype) if self.kind.format.by_page else None,
            nobody[len(order) :].clone() if host_pages else None,
        )

    def step(self, parts: Sequence[Part]) -> list[Tensor]:
        """What attention gives each part, `[rows, heads, head_dim]`; their rows come one part after
        the other."""
        slices, start = [], 0
        for number, first, last, selection in parts:
            pages, length = self.pages[number], last - first
            slices.append(SequenceSlice(start, length, last, pages, selection, number, last))
            start += length
        queries, keys, values = (
            torch.cat([of_all[number][first:last] for number, first, last, _ in parts])
            for of_all in (self.queries, self.keys, self.values)
        )
        plan = self.attention.plan(slices)
        out = self.attention.attend(plan, self.layer, self.memory, queries, keys, values)
        return list(out.split([each.length for each in slices]))

    def run(self, selection: Selection = FULL, most: int = 9) -> list[Tensor]:
        """All sequences in steps of up to so many tokens of each, at random; in every step in
        another order -> of each `[length, heads, head_dim]`."""
        outs = [torch.zeros_like(queries) for queries in self.queries]
        done = [0] * len(outs)
        while waiting := [number for number, out in enumerate(outs) if done[number] < len(out)]:
            order = torch.randperm(len(waiting), generator=self.generator).tolist()
            parts: list[Part] = []
            for number in (waiting[place] for place in order):
                rows = int(torch.randint(1, most + 1, (), generator=self.generator))
                stop = min(done[number] + rows, len(outs[number]))
                parts.append((number, done[number], stop, selection))
            for (number, first, last, _), out in zip(parts, self.step(parts), strict=True):
                outs[number][first:last] = out
                done[number] = last
        return outs

    def to_host(self, number: int, blocks: Sequence[int]) -> None:
        """Moves pages of a sequence to host RAM; what they leave behind is nobody's."""
        assert self.memory.host is not None
        in_pool, free = len(self.memory.pages), int((self.memory.host[:, 0] != 255).sum())
        for place, block in enumerate(blocks, start=free):
            page = self.pages[number][block]
            self.memory.host[place] = self.memory.pages[page]
            self.memory.pages[page] = 255
            self.pages[number][block] = in_pool + place

    def turned(self, heads: Tensor) -> Tensor:
        """Queries or keys as the format has them, `[n, heads, head_dim]`."""
        return rotated(heads) if self.kind.format.rotates_keys else heads

    def stored(self, number: int, position: int) -> tuple[Tensor, Tensor]:
        """Keys and values up to a position as its query finds them, `[n, kv_heads, head_dim]`
        float64 each: encoded with the others of their page, or each by itself. By page, those of
        the query's own page are as they came."""
        keys, values = (each[number][: position + 1] for each in (self.keys, self.values))
        sides = [self.turned(keys).clone(), values.clone()]
        done = position // self.size * self.size if self.kind.format.by_page else position + 1
        size = self.size if self.kind.format.by_page else 1
        paged = (each[:done].unflatten(0, (-1, size)) for each in sides)
        sides = [each.double() for each in sides]
        if done:
            decoded = self.kind.format.decode(self.kind.format.encode(*paged))
            for side, each in zip(sides, decoded, strict=True):
                side[:done] = each.flatten(0, 1)
        return sides[0], sides[1]

    def attended(self, number: int, position: int, reads: Tensor) -> Tensor:
        """What a query is to get, `[heads, head_dim]` float64, one head after the other. reads:
        which positions up to its own each kv head reads, `[kv_heads, position + 1]` bool."""
        keys, values = self.stored(number, position)
        group = self.kind.shape.num_heads // self.kind.shape.num_kv_heads
        out = []
        for head, query in enumerate(self.turned(self.queries[number])[position].double()):
            mine = reads[head // group]
            scores = keys[mine, head // group] @ query / math.sqrt(len(query))
            out.append(scores.softmax(0) @ values[mine, head // group])
        return torch.stack(out)


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Same shape, and no value off by more than the dtype's share of the largest one."""
    assert got.shape == expected.shape
    error = (got.double() - expected.double()).abs()
    # Not `max() <= ...`: a NaN is an error too.
    wrong = ~(error <= TOLERANCE[dtype] * max(1e-3, float(expected.double().abs().max())))
    rows = wrong.flatten(1).any(1).nonzero().flatten().tolist() if wrong.dim() > 1 else []
    assert not wrong.any(), f"rows {rows} are off by up to {float(error.max()):.3g}"


@pytest.fixture(scope="session")
def paged_step() -> Callable[..., PagedStep]:
    return make_paged_step


@pytest.fixture(scope="session")
def near() -> Callable[[Tensor, Tensor, torch.dtype], None]:
    return assert_near


@pytest.fixture(scope="session")
def kv_trial() -> Callable[..., KVTrial]:
    return KVTrial
