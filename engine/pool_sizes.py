"""What a pool of some bytes holds."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from polydelta.engine.config import EngineConfig
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.errors import ModelError
from polydelta.engine.pools import kv_pages_of

MIB = 1 << 20
# Of KV: one that is being filled, and one that is left over.
LEAST_PAGES = 2


@dataclass(frozen=True)
class PoolSizes:
    """Of an engine."""

    num_pages: int
    # Of these, those that KV may have.
    num_kv_pages: int
    # Of the longest sequence, an adapter's virtual tokens included; all of them lie in the pool.
    max_positions: int
    # Of the longest prompt plus output.
    max_model_len: int

    @classmethod
    def of(
        cls, pool_bytes: int, spec: KVSpec, max_batch_size: int, config: EngineConfig
    ) -> PoolSizes:
        """Raises ModelError for a pool that is too small, and for a longest sequence that does not
        fit."""
        context_length = spec.config.context_length
        num_pages = spec.pages_in(pool_bytes, max_batch_size)
        num_kv_pages = kv_pages_of(num_pages, config.adapter_share)
        if num_kv_pages < LEAST_PAGES:
            raise ModelError(_too_small(pool_bytes, spec, max_batch_size, config.adapter_share))
        fitting = num_kv_pages * spec.block_size
        if spec.read_at_most is not None and spec.read_at_most <= fitting // 2:
            # What a window has left behind takes no room.
            fitting = 2 * context_length
        return cls(
            num_pages,
            num_kv_pages,
            min(context_length, fitting),
            _max_model_len(config.max_model_len, context_length, fitting),
        )


def _too_small(
    pool_bytes: int, spec: KVSpec, max_batch_size: int, adapter_share: float | None
) -> str:
    """What the pool is short of, and what can be done."""
    room = spec.pages_in(pool_bytes, max_batch_size)
    opened = spec.opened_bytes(max_batch_size)
    besides = f" besides the open pages of {max_batch_size} sequences" if opened else ""
    needs = f"KV needs {LEAST_PAGES}"
    if adapter_share is not None:
        needs += f" beside the {adapter_share:.3g} of them that adapters have"
    # A half is rounded to an even number, and so to 2.
    least = ceil((LEAST_PAGES - 0.5) / (1 - (adapter_share or 0.0)))
    enough = -(-(opened + least * spec.all_bytes) // MIB)
    return (
        f"A pool of {pool_bytes / MIB:.1f} MiB has room for {room or 'no'} "
        f"{'page' if room == 1 else 'pages'} of {spec.all_bytes / MIB:.2f} MiB{besides}, and "
        f"{needs}: raise pool to {enough} MiB"
        f", or lower {'max_batch_size or ' if opened else ''}block_size."
    )


def _max_model_len(asked: int | None, context_length: int, fitting: int) -> int:
    """The longest sequence that is served, in tokens, of those that fit the pool. Raises
    ModelError."""
    if asked is None:
        # Half of the pool at most: a sequence shares it with its adapter.
        return min(context_length, fitting // 2)
    if not 1 < asked <= context_length:
        raise ModelError(
            f"max_model_len {asked} is not within the model's context window of "
            f"{context_length} tokens."
        )
    if asked >= fitting:
        raise ModelError(
            f"max_model_len {asked} leaves no room in a pool of {fitting} tokens: "
            "give it a larger pool, or ask for less."
        )
    return asked
