"""KV formats and selections: the attention of a decode step over each of them, and the same
requests in a pool that is too small for native KV."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu_engine import made_engine
from benchmarks.gpu_figures import Figure
from benchmarks.gpu_setup import DTYPE, Setup, relative_error
from benchmarks.kv_reader import Way
from benchmarks.kv_ways import NATIVE, bytes_read
from polydelta.engine.kv_spec import KVSpec
from polydelta.kernels.kv_attention import KVAttention, KVKernels
from polydelta.kernels.kv_formats.by_name import FORMATS
from polydelta.kernels.kv_memory import KVMemory
from polydelta.kernels.kv_notes import label_rows, summarize
from polydelta.kernels.kv_selection import DoubleSparsity, parse_selection
from polydelta.kernels.ops import SequenceSlice

# Quest reads everything in two of them.
LEAST_LAYERS = 3
# Of the engine's pool: native KV of 30 requests to Llama 3 8B.
POOL_BYTES = 4 << 30
# What the engine serves in this memory; quest reads a quarter of a prompt of 1,024 tokens.
SERVED = (
    NATIVE,
    Way("int8"),
    Way("int4"),
    Way("mustafar-70"),
    Way(selection="quest:256"),
    Way("int4", "quest:256"),
)


def attention(setup: Setup) -> Iterator[Figure]:
    """Of one token of each sequence, in all layers."""
    kernels, sizes = setup.kernels, setup.sizes
    assert isinstance(kernels, KVKernels)
    for context in sizes.kv_contexts:
        for batch in sizes.kv_batches:
            native: float | None = None
            for way in _ways(context):
                cache = Cache(setup, way, batch, context)
                figure = cache.measure(kernels)
                del cache
                assert figure.seconds is not None
                native = native or figure.seconds
                facts = figure.facts | _over(native, figure.seconds)
                most = context == max(sizes.kv_contexts) and batch == max(sizes.kv_batches)
                yield replace(figure, main=most, facts=facts)
                setup.settle()


def _over(native: float, seconds: float) -> dict[str, float]:
    return {"speed_over_native": round(native / seconds, 3)}


def _ways(context: int) -> list[Way]:
    """All formats, and selections of about a quarter of the context; of single tokens, the finest
    choice, a sixteenth, as their authors have it."""
    quarter = context // 4
    return [
        *(Way(format) for format in FORMATS),
        Way(selection=f"window:4+{quarter - 4}"),
        Way(selection=f"quest:{quarter}"),
        Way(selection=f"double-sparsity:{context // 16}"),
        Way("int4", f"quest:{quarter}"),
    ]


class Cache:
    """KV of sequences of as many tokens in scattered pages, stored in one way. All layers have the
    same, each in memory of its own."""

    def __init__(self, setup: Setup, way: Way, batch: int, context: int) -> None:
        model = setup.sizes.model
        layers = max(LEAST_LAYERS, model.num_layers)
        self.setup, self.way = setup, way
        self.selection = parse_selection(way.selection)
        labels = None
        if isinstance(self.selection, DoubleSparsity):
            channels = torch.arange(0, model.head_dim, self.selection.label_share)
            labels = channels.repeat(layers, model.num_kv_heads, 1).to(setup.device)
        config = replace(model, num_layers=layers)
        self.spec = KVSpec.of(config, DTYPE, None, way.format, self.selection, labels)
        self.kind = self.spec.kind(self.spec.shape(None, model.context_length))
        size = self.spec.block_size
        # A step in which no page becomes full, as most are.
        self.context = context if context % size else context - 1
        each = -(-self.context // size)
        order = torch.randperm(each * batch, generator=torch.Generator().manual_seed(0)).tolist()
        self.slices = [
            SequenceSlice(
                row, 1, self.context, order[row * each : (row + 1) * each], self.selection, row
            )
            for row in range(batch)
        ]
        self.layers = self._filled(each * batch, layers)

    def _filled(self, num_pages: int, layers: int) -> list[KVMemory]:
        """Every page is full, and every slot's open one, whatever a sequence has of them."""
        setup, size, model = self.setup, self.spec.block_size, self.spec.config
        tokens = (size, model.num_kv_heads, model.head_dim)
        pages = torch.zeros(num_pages, self.spec.page_bytes, dtype=torch.uint8, device=setup.device)
        keys, values = (setup.randn(num_pages, *tokens) for _ in range(2))
        for name, numbers in self.kind.format.encode(keys, values).items():
            self.kind.layout.view(pages, name)[:] = numbers
        summarize(self.kind, 0, pages, torch.arange(num_pages, device=setup.device))
        label_rows(self.kind, 0, pages, torch.arange(num_pages * size, device=setup.device))
        opened = None
        if self.kind.format.by_page:
            opened = setup.randn(len(self.slices), size, 2, *tokens[1:])
        return [
            KVMemory(pages.clone(), None if opened is None else opened.clone())
            for _ in range(layers)
        ]

    def measure(self, kernels: KVKernels) -> Figure:
        """Stores a token of each sequence and attends, layer by layer."""
        setup, shape, batch = self.setup, self.kind.shape, len(self.slices)
        queries = setup.randn(batch, shape.num_heads, shape.head_dim)
        keys, values = (setup.randn(batch, shape.num_kv_heads, shape.head_dim) for _ in range(2))
        fast, truth = kernels.kv_attention(self.kind), KVAttention(self.kind, setup.device)
        plan, last = fast.plan(self.slices), len(self.layers) - 1

        def step() -> None:
            for layer, memory in enumerate(self.layers):
                fast.attend(plan, layer, memory, queries, keys, values)

        value, expected = (
            each.attend(each.plan(self.slices), last, self.layers[last], queries, keys, values)
            for each in (fast, truth)
        )
        read = batch * bytes_read(self.spec, self.selection, self.context, self.context)
        return Figure(
            f"attention of a step, {self.way.name}, {batch} rows of {self.context}",
            setup.clock.seconds([step]),
            setup.ceilings.floor(read),
            error=relative_error(value, expected),
            facts={"page_tokens": self.spec.block_size, "mbytes_read": round(read / 1e6, 1)},
        )


def serving(setup: Setup) -> Iterator[Figure]:
    """As many requests as an engine runs at once, from the first one's prompt to the last token of
    all, in a pool that has native KV of fewer."""
    sizes = setup.sizes
    batch = max(sizes.engine_batches)
    native: float | None = None
    for way in SERVED:
        with made_engine(setup, POOL_BYTES, way=way) as made:
            # Compiles.
            made.run(min(2, batch), (), sizes.kv_prompt, 2)
            before, began = made.engine.stats().preemptions, time.perf_counter()
            made.run(batch, (), sizes.kv_prompt, sizes.kv_tokens)
            seconds = time.perf_counter() - began
            native = native or seconds
            facts = {
                "tokens_per_second": round(batch * sizes.kv_tokens / seconds),
                "preemptions": made.engine.stats().preemptions - before,
            }
            name = f"{batch} requests in {POOL_BYTES >> 30} GiB, {way.name}"
            yield Figure(name, seconds, main=True, facts=facts | _over(native, seconds))
