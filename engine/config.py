"""What an operator may set of the engine. Sizes worked out at start live in `pool.py`, not here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine; sizes in tokens, sequences or bytes as named."""

    # "bfloat16" or "float32"
    dtype: str = "bfloat16"
    # Longest prompt plus output; None takes the model's own context window.
    max_model_len: int | None = None
    # Tokens computed in one step, prefill and decode together.
    max_batch_tokens: int = 512
    # Sequences that run at the same time.
    max_batch_size: int = 64
    # Tokens of KV in one page.
    block_size: int = 16
    # The one pool that KV and adapters share.
    pool_bytes: int = 2 << 30
    # Adapters kept ready in host RAM.
    host_adapter_bytes: int = 2 << 30
    prefix_caching: bool = True
    # Bits of the weights of linear layers: "int8" or "int4"; None keeps them in the dtype.
    quantization: str | None = None
    # Steps with one adapter alone before it goes into the base weights; None never does that.
    fuse_after: int | None = None
    # Balance the pool's books whenever the engine goes idle; for tests and debug runs.
    check_integrity: bool = False
