"""Every other kernel alone: attention, what is small, sampling, and the products with the base's
weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.floor import query_key_pairs
from benchmarks.gpu_clock import ROTATED_BYTES, Run
from benchmarks.gpu_figures import Figure
from benchmarks.gpu_setup import BLOCK_SIZE, DTYPE, Setup, relative_error
from polydelta.engine.models.layers import fused_linears
from polydelta.kernels.ops import AttentionShape, Kernels, SequenceSlice
from polydelta.kernels.reference import ReferenceKernels
from polydelta.kernels.sampling import SamplingRows

# Share of the measured copy bandwidth.
ATTENTION_AIM = 0.75
# Sequences of heads of other sizes.
SOME = 16


class Cache:
    """KV of sequences that all have the same number of tokens, in scattered pages of one layer."""

    def __init__(self, setup: Setup, head_dim: int, sequences: int, context: int) -> None:
        model = setup.sizes.model
        self.setup = setup
        self.context = context
        self.shape = AttentionShape(model.num_heads, model.num_kv_heads, head_dim, BLOCK_SIZE)
        each = -(-context // BLOCK_SIZE)
        self.kv = setup.randn(each * sequences, 2, BLOCK_SIZE, model.num_kv_heads, head_dim)
        order = torch.randperm(len(self.kv), generator=torch.Generator().manual_seed(0)).tolist()
        self._tables = [order[number * each : (number + 1) * each] for number in range(sequences)]

    def slices(self, first: int, batch: int, tokens: int) -> list[SequenceSlice]:
        """Of so many sequences, the last tokens of each."""
        return [
            SequenceSlice(row * tokens, tokens, self.context, self._tables[first + row])
            for row in range(batch)
        ]

    def measure(
        self,
        name: str,
        batch: int,
        tokens: int = 1,
        window: int | None = None,
        aim: float | None = None,
    ) -> Figure:
        shape = replace(self.shape, window=window)
        queries = self.setup.randn(batch * tokens, shape.num_heads, shape.head_dim)
        kernels, truth = self.setup.kernels, ReferenceKernels(self.setup.device)
        sequences = len(self._tables) if self.setup.on_gpu else batch
        plans = [
            kernels.plan_attention(shape, self.slices(first, batch, tokens), DTYPE)
            for first in range(0, sequences - batch + 1, batch)
        ]
        runs: list[Run] = [partial(kernels.attention, plan, queries, self.kv) for plan in plans]
        plan = truth.plan_attention(shape, self.slices(0, batch, tokens), DTYPE)
        error = relative_error(runs[0](), truth.attention(plan, queries, self.kv))  # type: ignore[arg-type]
        seen = self.context if window is None else min(self.context, window + tokens - 1)
        moved = 2 * batch * seen * shape.num_kv_heads * shape.head_dim + 2 * queries.numel()
        pairs = query_key_pairs(tokens, self.context, window)
        # A product with the key, and one with the value.
        flops = 4 * batch * pairs * shape.num_heads * shape.head_dim
        floor = self.setup.ceilings.floor(DTYPE.itemsize * moved, flops)
        return Figure(name, self.setup.clock.seconds(runs), floor, aim, error)


def attention(setup: Setup) -> Iterator[Figure]:
    """Decode steps of long contexts, and prefills: alone, and behind a prefix."""
    sizes = setup.sizes
    context, most = sizes.context, max(sizes.attention_batches)
    cache = Cache(setup, sizes.model.head_dim, most, context)
    for batch in sizes.attention_batches:
        name = f"attention, {batch} decode, {context} tokens"
        yield cache.measure(name, batch, aim=ATTENTION_AIM)
    some = min(SOME, most)
    window = context // 2
    yield cache.measure(f"attention, {some} decode, window {window}", some, window=window)
    chunk = sizes.prompt // 4
    yield cache.measure(f"attention, prefill of {chunk} after {context - chunk}", 1, chunk)
    del cache
    whole = Cache(setup, sizes.model.head_dim, 1, sizes.prompt)
    yield whole.measure(f"attention, prefill of {sizes.prompt}", 1, sizes.prompt)
    for head_dim in sizes.head_sizes:
        other = Cache(setup, head_dim, some, context)
        yield other.measure(f"attention, {some} decode, {context} tokens, head {head_dim}", some)


@dataclass(frozen=True)
class Small:
    """An operation that does little but read and write."""

    # Inputs of one launch.
    make: Callable[[], list[Tensor]]
    run: Callable[[Kernels, list[Tensor]], Tensor]
    # Numbers that it reads or writes.
    count: int


def small(setup: Setup) -> Iterator[Figure]:
    """On the rows of a decode step, and of a prefill."""
    for rows in (max(setup.sizes.engine_batches), setup.sizes.prompt):
        for name, op in _small_ops(setup, rows).items():
            nbytes = DTYPE.itemsize * op.count
            copies = min(64, max(1, ROTATED_BYTES // nbytes)) if setup.on_gpu else 1
            inputs = [op.make() for _ in range(copies)]
            # Kernels may change what they are given.
            truth = op.run(ReferenceKernels(setup.device), [x.clone() for x in inputs[0]])
            error = relative_error(op.run(setup.kernels, [x.clone() for x in inputs[0]]), truth)
            seconds = setup.clock.seconds([partial(op.run, setup.kernels, each) for each in inputs])
            floor = setup.ceilings.floor(nbytes)
            yield Figure(f"{name}, {rows} rows", seconds, floor, error=error)


def _small_ops(setup: Setup, rows: int) -> dict[str, Small]:
    model, randn = setup.sizes.model, setup.randn
    hidden, inner, eps = model.hidden_size, model.intermediate_size, model.rms_norm_eps
    heads, kv_heads, size = model.num_heads, model.num_kv_heads, model.head_dim
    weight, table = randn(hidden), randn(model.vocab_size, hidden)
    pages = -(-rows // BLOCK_SIZE)
    slots = torch.randperm(pages * BLOCK_SIZE, device=setup.device)[:rows]

    def qkv() -> Tensor:
        return randn(rows, heads + 2 * kv_heads, size)

    def places() -> Tensor:
        return torch.randint(model.vocab_size, (rows,), device=setup.device)

    def store(kernels: Kernels, x: list[Tensor]) -> Tensor:
        keys, values = x[0][:, heads:].split(kv_heads, 1)
        kernels.store_kv(x[1], keys, values, slots)
        return x[1]

    return {
        "rms_norm": Small(
            lambda: [randn(rows, hidden)],
            lambda kernels, x: kernels.rms_norm(x[0], weight, eps),
            2 * rows * hidden,
        ),
        "add_rms_norm": Small(
            lambda: [randn(rows, hidden), randn(rows, hidden)],
            lambda kernels, x: kernels.add_rms_norm(x[0], x[1], weight, eps),
            4 * rows * hidden,
        ),
        "rotate": Small(
            lambda: [qkv(), randn(rows, size), randn(rows, size)],
            lambda kernels, x: kernels.rotate(x[0][:, : heads + kv_heads], x[1], x[2]),
            2 * rows * (heads + kv_heads + 1) * size,
        ),
        "silu_mul": Small(
            lambda: [randn(rows, 2 * inner)],
            lambda kernels, x: kernels.silu_mul(x[0]),
            3 * rows * inner,
        ),
        "gather": Small(
            lambda: [places()],
            lambda kernels, x: kernels.gather(table, x[0]),
            2 * rows * hidden,
        ),
        "store_kv": Small(
            lambda: [qkv(), randn(pages, 2, BLOCK_SIZE, kv_heads, size)],
            store,
            4 * rows * model.kv_size,
        ),
    }


def products(setup: Setup) -> Iterator[Figure]:
    """With the base's weights: a layer's four in one figure, and the head."""
    model = setup.sizes.model
    weights = [
        setup.randn(sum(part.out_features for part in fused.parts), fused.in_features)
        for fused in fused_linears(model)
    ]
    head = setup.randn(model.vocab_size, model.hidden_size)
    linears = [setup.kernels.linear(weight, None) for weight in weights]
    for rows in setup.sizes.engine_batches:
        inputs = [setup.randn(rows, weight.shape[1]) for weight in weights]

        def layer(inputs: Sequence[Tensor] = inputs) -> None:
            for linear, x in zip(linears, inputs, strict=True):
                linear(x)

        numbers = sum(weight.numel() for weight in weights)
        floor = setup.ceilings.floor(DTYPE.itemsize * numbers, 2 * rows * numbers)
        yield Figure(f"linear layers of a block, {rows} rows", setup.clock.seconds([layer]), floor)
        run = partial(setup.kernels.head(head), setup.randn(rows, model.hidden_size))
        floor = setup.ceilings.floor(head.nbytes, 2 * rows * head.numel())
        yield Figure(f"head, {rows} rows", setup.clock.seconds([run]), floor)


def sampling(setup: Setup) -> Iterator[Figure]:
    """The same tokens as the reference, whatever is cut off."""
    rows, vocab = setup.sizes.sampling
    count = max(1, ROTATED_BYTES // (4 * rows * vocab)) if setup.on_gpu else 1
    logits = [4 * torch.randn(rows, vocab, device=setup.device) for _ in range(count)]
    floor = setup.ceilings.floor(logits[0].nbytes)
    runs: list[Run] = [partial(setup.kernels.argmax, each) for each in logits]
    same = torch.equal(setup.kernels.argmax(logits[0]), logits[0].argmax(-1))
    yield Figure(f"argmax, {rows} rows", setup.clock.seconds(runs), floor, agrees=same)
    ways = {
        "sample": (0, 1.0, 0.0),
        "sample, top-k 50": (50, 1.0, 0.0),
        "sample, top-p 0.9": (0, 0.9, 0.0),
        "sample, top-k 50, top-p 0.9, min-p 0.05": (50, 0.9, 0.05),
    }
    for name, way in ways.items():
        chosen = _sampling_rows(setup, rows, *way)
        runs = [partial(setup.kernels.sample, each, chosen) for each in logits]
        truth = ReferenceKernels(setup.device).sample(logits[0], chosen)
        # Where a draw falls between two tokens, sums in another order may give the other one.
        share = float((setup.kernels.sample(logits[0], chosen) == truth).float().mean())
        seconds = setup.clock.seconds(runs)
        facts = {"share_of_same_tokens": share}
        agrees = math.ceil((1 - share) * rows) <= 1
        yield Figure(f"{name}, {rows} rows", seconds, floor, agrees=agrees, facts=facts)


def _sampling_rows(setup: Setup, rows: int, top_k: int, top_p: float, min_p: float) -> SamplingRows:
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    cuts = (uniform.new_full((rows,), value) for value in (0.8, top_k, top_p, min_p))
    return SamplingRows(*(column.to(setup.device) for column in (*cuts, uniform)))
