"""Adapters in a decode step, every row with one of its own: kernels that read them in pages, beside
two other ways to compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_adapters import AdapterSet, StrongPlace, one_layer
from benchmarks.gpu_clock import ROTATED_BYTES, Run
from benchmarks.gpu_figures import Figure
from benchmarks.gpu_setup import DTYPE, Setup
from benchmarks.mixed_kinds import random_lora
from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.formats.usual_deltas import (
    Make,
    bias,
    circulant,
    columns,
    kronecker,
    one_bit,
    output_scale,
    rotate,
    rows,
    sparse,
    top_k,
)

# Share of the measured copy bandwidth.
LORA_AIM = 0.6
# Of a batch whose adapters are of one kind: rows, and tokens of each row where it prefills.
KIND_BATCH, PREFILL_SEGMENTS = 16, 4
# Adapters of one kind, at which some batches take turns.
MOST = 256
# The layer that these change alone: 4096 x 4096 in Llama 3 8B.
SQUARE, SQUARE_INDEX = "self_attn.o_proj", 1
KINDS: Mapping[str, Make] = {
    "Columns, 1%": columns(0.01),
    "Rows, 1%": rows(0.01),
    "OneBit": one_bit,
    "Scale": output_scale,
    "Bias": bias,
    "Rotate": rotate(64),
    "Kronecker": kronecker,
    "Circulant, 256": circulant(256),
    "TopK, 8 of 32": top_k(32, 8),
}


def lora(setup: Setup) -> Iterator[Figure]:
    """A whole decoder layer: q/k/v, o, gate/up and down, each one launch."""
    for rank in setup.sizes.ranks:
        adapters = AdapterSet(setup, partial(random_adapter, rank), max(setup.sizes.batches))
        for batch in setup.sizes.batches:
            yield lora_decode(adapters, f"LoRA decode, {batch} of rank {rank}", batch, LORA_AIM)
    rank, batch = max(setup.sizes.ranks), min(KIND_BATCH, max(setup.sizes.batches))
    for bits in (8, 4):
        adapters = AdapterSet(setup, partial(random_adapter, rank), max(setup.sizes.batches), bits)
        name = f"LoRA decode, {batch} of rank {rank} in {bits} bits"
        yield lora_decode(adapters, name, batch)


def lora_decode(adapters: AdapterSet, name: str, batch: int, aim: float | None = None) -> Figure:
    groups, linears = adapters.groups(batch), adapters.layout.linears
    seconds = {
        linear.name: adapters.seconds(groups, site, batch) for site, linear in enumerate(linears)
    }
    return Figure(
        name,
        sum(seconds.values()),
        adapters.setup.ceilings.floor(batch * _moved(adapters.layout, adapters.nbytes)),
        aim,
        max(adapters.error(site, batch) for site in range(len(linears))),
        facts={"sites_us": {name: round(s * 1e6, 2) for name, s in seconds.items()}},
    )


def lora_prefill(setup: Setup) -> Iterator[Figure]:
    """A prompt cut among a few adapters."""
    rank = max(setup.sizes.ranks)
    adapters = AdapterSet(setup, partial(random_adapter, rank), PREFILL_SEGMENTS)
    total = setup.sizes.prompt // PREFILL_SEGMENTS * PREFILL_SEGMENTS
    yield measure_prefill(
        adapters, f"LoRA prefill, {PREFILL_SEGMENTS} of rank {rank}, {total} tokens"
    )


def measure_prefill(adapters: AdapterSet, name: str) -> Figure:
    setup = adapters.setup
    tokens = setup.sizes.prompt // PREFILL_SEGMENTS
    group = adapters.group(0, PREFILL_SEGMENTS, tokens)
    sites = range(len(adapters.layout.linears))
    total = PREFILL_SEGMENTS * tokens
    seconds = sum(adapters.seconds([group], site, total) for site in sites)
    moved = total * _moved(adapters.layout) + PREFILL_SEGMENTS * adapters.nbytes
    flops = 2 * total * adapters.nbytes / DTYPE.itemsize
    return Figure(
        name,
        seconds,
        setup.ceilings.floor(moved, flops),
        error=max(adapters.error(site, PREFILL_SEGMENTS, tokens) for site in sites),
    )


def kinds(setup: Setup) -> Iterator[Figure]:
    """On one square layer."""
    for batch in setup.sizes.batches:
        if batch <= 64:
            yield _of_kind(setup, "Sparse, 1%", sparse(0.01), batch)
    for name, make in KINDS.items():
        yield _of_kind(setup, name, make, min(KIND_BATCH, max(setup.sizes.batches)))


def lora_other_ways(setup: Setup) -> Iterator[Figure]:
    """The launches that `lora` times, as PEFT does it and with adapters stacked and padded to the
    largest rank."""
    layout, padded = one_layer(setup), max(setup.sizes.ranks)
    most = max(setup.sizes.batches)
    per_rank = DTYPE.itemsize * sum(sum(shape) for shape in layout.module_shapes.values())
    # By module: [adapters, padded rank, in] and [adapters, out, padded rank]
    stacks = [
        (setup.randn(most, padded, in_features), setup.randn(most, out_features, padded))
        for out_features, in_features in layout.module_shapes.values()
    ]
    for rank in setup.sizes.ranks:
        for batch in setup.sizes.batches:
            nbytes = batch * _moved(layout, rank * per_rank)
            turns = max(1, min(most // batch, ROTATED_BYTES // nbytes)) if setup.on_gpu else 1
            chosen = [list(range(turn * batch, (turn + 1) * batch)) for turn in range(turns)]
            floor = setup.ceilings.floor(nbytes)
            ways: Mapping[str, Callable[[Sequence[int]], Run]] = {
                "PEFT's loop": partial(_looped, setup, stacks, rank),
                "padded bmm": partial(_padded, setup, stacks),
            }
            for way, make in ways.items():
                runs = [make(adapters) for adapters in chosen]
                # A loop over all of many adapters takes long enough for one turn.
                looped = way == "PEFT's loop"
                seconds = (
                    setup.clock.eager_seconds(runs[:4]) if looped else setup.clock.seconds(runs)
                )
                yield Figure(f"{way}, {batch} of rank {rank}", seconds, floor)


def _moved(layout: BaseLayout, adapter: int = 0) -> int:
    """Bytes that a layer's deltas read or write for a row: inputs, outputs twice, and the row's
    adapter."""
    numbers = sum(linear.in_features + 2 * linear.out_features for linear in layout.linears)
    return DTYPE.itemsize * numbers + adapter


def random_adapter(rank: int, layout: BaseLayout, seed: int) -> Adapter:
    return random_lora(layout, rank, seed)


def _square(make: Make, layout: BaseLayout, seed: int) -> Adapter:
    """One delta."""
    module = layout.module_name(0, SQUARE)
    place = StrongPlace(layout, module, torch.Generator().manual_seed(seed))
    return Adapter(f"{seed}", 1, f"{seed}", "MADE", {module: (make(place),)})


def _of_kind(setup: Setup, name: str, make: Make, batch: int) -> Figure:
    adapters = AdapterSet(setup, partial(_square, make), MOST if setup.on_gpu else batch)
    linear = adapters.layout.linears[SQUARE_INDEX]
    moved = linear.in_features + 2 * linear.out_features
    groups = adapters.groups(batch)
    return Figure(
        f"{name}, {batch} rows",
        adapters.seconds(groups, SQUARE_INDEX, batch),
        setup.ceilings.floor(batch * (adapters.nbytes + DTYPE.itemsize * moved)),
        error=adapters.error(SQUARE_INDEX, batch),
        facts={"recordable": groups[0].recordable},
    )


Stacks = Sequence[tuple[Tensor, Tensor]]


def _looped(setup: Setup, stacks: Stacks, rank: int, adapters: Sequence[int]) -> Run:
    """Module by module and adapter by adapter, each on its own rows."""
    pairs = [
        [(a[number, :rank].clone(), b[number, :, :rank].clone()) for number in adapters]
        for a, b in stacks
    ]
    inputs = [setup.randn(len(adapters), a.shape[2]) for a, _ in stacks]
    outputs = [setup.randn(len(adapters), b.shape[1]) for _, b in stacks]
    own = [torch.tensor([row], device=setup.device) for row in range(len(adapters))]

    def run() -> None:
        for x, y, each in zip(inputs, outputs, pairs, strict=True):
            for row, (a, b) in zip(own, each, strict=True):
                y[row] += (x[row] @ a.T) @ b.T

    return run


def _padded(setup: Setup, stacks: Stacks, adapters: Sequence[int]) -> Run:
    """Two batched products a module, over copies of the rows' adapters."""
    inputs = [setup.randn(len(adapters), a.shape[2], 1) for a, _ in stacks]
    outputs = [setup.randn(len(adapters), b.shape[1], 1) for _, b in stacks]
    index = torch.tensor(adapters, device=setup.device)

    def run() -> None:
        for x, y, (a, b) in zip(inputs, outputs, stacks, strict=True):
            y.baddbmm_(b.index_select(0, index), torch.bmm(a.index_select(0, index), x))

    return run
