"""Which configuration of each tuned kernel is the fastest on this GPU, kept for all servers on it.

    python -m benchmarks.gpu --sections tuning

The whole benchmark begins with it, so that what it measures is what a tuned server has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import triton

from benchmarks.gpu_adapters import AdapterSet
from benchmarks.gpu_deltas import PREFILL_SEGMENTS, lora_decode, measure_prefill, random_adapter
from benchmarks.gpu_figures import Figure
from benchmarks.gpu_kernels import Cache
from benchmarks.gpu_setup import DTYPE, Setup
from polydelta.kernels.triton.attention_tiles import decode_choices, prefill_choices
from polydelta.kernels.triton.deltas import FEW_ROWS, MANY_ROWS, choices
from polydelta.kernels.triton.tuning import Tunable


@dataclass(frozen=True)
class Trial:
    """A launch like those of a busy server."""

    tunable: Tunable
    # Measures it under a name, with the options that are remembered now.
    measure: Callable[[str], Figure]


def tuning(setup: Setup) -> Iterator[Figure]:
    """One figure for each choice; the fastest right one is remembered."""
    for trial in _trials(setup):
        yield from _compare(trial)


def _compare(trial: Trial) -> Iterator[Figure]:
    best: tuple[float, int] | None = None
    for number, options in enumerate(trial.tunable.choices):
        told = ", ".join(f"{name} {value}" for name, value in options.items())
        name = f"{trial.tunable.name}: {told}"
        trial.tunable.remember(options)
        try:
            figure = trial.measure(name)
        except triton.OutOfResources as error:
            yield Figure(name, facts={"does_not_fit": str(error)})
            continue
        yield replace(figure, aim=None)
        if figure.seconds is not None and figure.met is not False:
            best = min(best or (figure.seconds, number), (figure.seconds, number))
    trial.tunable.remember(trial.tunable.choices[0 if best is None else best[1]])


def _trials(setup: Setup) -> Iterator[Trial]:
    sizes = setup.sizes
    lora = partial(random_adapter, sizes.ranks[len(sizes.ranks) // 2])
    rows = max(size for size in sizes.batches if size <= 64)
    adapters = AdapterSet(setup, lora, rows)
    yield Trial(choices(FEW_ROWS), lambda name: lora_decode(adapters, name, rows))
    few = AdapterSet(setup, lora, PREFILL_SEGMENTS)
    yield Trial(choices(MANY_ROWS), lambda name: measure_prefill(few, name))
    batch = max(size for size in sizes.attention_batches if size <= 16)
    cache = Cache(setup, sizes.model.head_dim, batch, sizes.context)
    yield Trial(decode_choices(cache.shape, DTYPE), lambda name: cache.measure(name, batch))
    whole = Cache(setup, sizes.model.head_dim, 1, sizes.prompt)
    yield Trial(
        prefill_choices(whole.shape, DTYPE), lambda name: whole.measure(name, 1, sizes.prompt)
    )
