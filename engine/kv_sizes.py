"""What each KV format takes of a pool, for a model whose weights nobody has read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from polydelta.engine.config import EngineConfig
from polydelta.engine.device import DeviceLimits, choose_device, dtype_on, limits_for
from polydelta.engine.kv_composition import Option, names_of
from polydelta.engine.kv_setup import KVSetup, problem
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.errors import ModelError
from polydelta.engine.pool_sizes import PoolSizes
from polydelta.kernels.kv_selection import parse_prefill, parse_selection

# Where the pool is what a GPU has left, which is known once the model runs there.
_TOLD_FOR = 1 << 30


@dataclass(frozen=True)
class FormatSize:
    """Of one format; numbers are 0 where there is a problem."""

    name: str
    # Tokens in a page.
    page_tokens: int = 0
    # Of all layers.
    token_bytes: float = 0.0
    pool_tokens: int = 0
    # Why a server cannot be set up so, and what can be done; None where it can.
    problem: str | None = None


def told_pool(config: EngineConfig) -> int:
    """Bytes of the pool that sizes are told for."""
    return limits_for(choose_device(config.device), config).pool_bytes or _TOLD_FOR


def format_sizes(config: EngineConfig, model: ModelConfig) -> Iterator[FormatSize]:
    """Of every format, with what the config's selection notes in a page beside it. Raises
    ModelError for what no format goes with."""
    device = choose_device(config.device)
    limits, dtype = limits_for(device, config), dtype_on(device, config.dtype)
    selection = parse_selection(config.kv_select)
    setup = _setup(config, model, limits, device.type == "cuda")
    if said := problem(setup):
        raise ModelError(said)
    for name in names_of(Option.FORMAT):
        if said := problem(replace(setup, format=name)):
            yield FormatSize(name, problem=said)
            continue
        try:
            spec = KVSpec.of(model, dtype, config.block_size, name, selection)
        except ValueError as error:
            yield FormatSize(name, problem=str(error))
            continue
        try:
            sizes = PoolSizes.of(_pool(spec, limits), spec, limits.max_batch_size, config)
            pool_tokens, said = sizes.num_kv_pages * spec.block_size, None
        except ModelError as error:
            pool_tokens, said = 0, str(error)
        yield FormatSize(name, spec.block_size, spec.token_bytes, pool_tokens, said)


def _pool(spec: KVSpec, limits: DeviceLimits) -> int:
    """In bytes; where it is not known, so many of pages."""
    if limits.pool_bytes is not None:
        return limits.pool_bytes
    return _TOLD_FOR + spec.opened_bytes(limits.max_batch_size)


def _setup(config: EngineConfig, model: ModelConfig, limits: DeviceLimits, on_gpu: bool) -> KVSetup:
    """Of a server with native KV, which has the files and the RAM that its methods ask for."""
    return KVSetup(
        selection=parse_selection(config.kv_select),
        prefill=parse_prefill(config.prefill),
        host_kv=True,
        labels=True,
        on_gpu=on_gpu,
        sliding_windows=model.has_sliding_windows,
        max_batch_tokens=limits.max_batch_tokens,
        max_batch_size=limits.max_batch_size,
    )
