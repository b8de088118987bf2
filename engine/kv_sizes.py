"""What each KV format takes of a pool, for a model whose weights nobody has read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from polydelta.engine.config import EngineConfig
from polydelta.engine.device import choose_device, dtype_on, limits_for
from polydelta.engine.kv_composition import Option, apart, names_of, row_of
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.config import ModelConfig
from polydelta.kernels.kv_selection import parse_selection

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
    # Why no token has room, and what can be done; None where there is room.
    problem: str | None = None


def told_pool(config: EngineConfig) -> int:
    """Bytes of the pool that sizes are told for."""
    return limits_for(choose_device(config.device), config).pool_bytes or _TOLD_FOR


def format_sizes(config: EngineConfig, model: ModelConfig) -> Iterator[FormatSize]:
    """Of every format, with what the config's selection notes in a page beside it."""
    device = choose_device(config.device)
    limits, dtype = limits_for(device, config), dtype_on(device, config.dtype)
    selection = parse_selection(config.kv_select)
    for name in names_of(Option.FORMAT):
        if apart(row_of(Option.FORMAT, name), row_of(Option.SELECT, selection.name)):
            yield FormatSize(name, problem=f"It does not go with kv_select {selection}.")
            continue
        try:
            spec = KVSpec.of(model, dtype, config.block_size, name, selection)
        except ValueError as error:
            yield FormatSize(name, problem=str(error))
            continue
        pages = spec.pages_in(told_pool(config), limits.max_batch_size)
        tokens = spec.block_size
        yield FormatSize(
            name,
            tokens,
            spec.token_bytes,
            pages * tokens,
            None if pages else spec.too_small(told_pool(config), 1, limits.max_batch_size),
        )
