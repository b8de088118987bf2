"""What each KV format takes of a pool, for a model whose weights nobody has read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from polydelta.engine.config import EngineConfig
from polydelta.engine.device import choose_device, dtype_on, limits_for
from polydelta.engine.kv_composition import Option, names_of
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.config import ModelConfig
from polydelta.kernels.kv_selection import parse_selection

# Where the pool is what a GPU has left, which is known once the model runs there.
_TOLD_FOR = 1 << 30


@dataclass(frozen=True)
class FormatSize:
    """Of one format."""

    name: str
    # Tokens in a page; 0 where it cannot store the model's heads.
    page_tokens: int
    # Of all layers; 0 likewise.
    token_bytes: float
    pool_tokens: int


def told_pool(config: EngineConfig) -> int:
    """Bytes of the pool that sizes are told for."""
    return limits_for(choose_device(config.device), config).pool_bytes or _TOLD_FOR


def format_sizes(config: EngineConfig, model: ModelConfig) -> Iterator[FormatSize]:
    """Of every format, with what the config's selection notes in a page beside it."""
    device = choose_device(config.device)
    limits, dtype = limits_for(device, config), dtype_on(device, config.dtype)
    selection = parse_selection(config.kv_select)
    for name in names_of(Option.FORMAT):
        try:
            spec = KVSpec.of(model, dtype, config.block_size, name, selection)
        except ValueError:
            yield FormatSize(name, 0, 0.0, 0)
            continue
        page_bytes = spec.page_bytes * model.num_layers
        pages = spec.pages_in(told_pool(config), limits.max_batch_size)
        tokens = spec.block_size
        yield FormatSize(name, tokens, page_bytes / tokens, pages * tokens)
