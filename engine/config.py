"""What an operator may set of the engine. Sizes worked out at start live in `pool_sizes.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EngineConfig:
    """Limits of the engine; sizes in tokens, sequences or bytes as named."""

    # "cpu", "cuda", or "auto" for a GPU where there is one.
    device: str = "auto"
    # "bfloat16" or "float32"; on a GPU also "float16"
    dtype: str = "bfloat16"
    # Longest prompt plus output; None takes the model's own context window.
    max_model_len: int | None = None
    # Tokens computed in one step, prefill and decode together; None takes what suits the device.
    max_batch_tokens: int | None = None
    # Sequences that run at the same time; None as above.
    max_batch_size: int | None = None
    # Steps that are launched before the tokens of the one before are known, 0 or 1; None as above.
    steps_ahead: int | None = None
    # Tokens of KV in one page, as the model computes it; other formats have more in as many bytes.
    # None takes what suits the format, or the selection.
    block_size: int | None = None
    # How keys and values are stored: a format of kv_composition.ROWS.
    kv_format: str = "native"
    # What queries read of them, such as "window:4+512" (kernels.kv_selection says more).
    kv_select: str = "full"
    # What those of prompts read besides: "full" or "xattention".
    prefill: str = "full"
    # What `polydelta calibrate` wrote, for the selection double-sparsity.
    kv_labels: Path | None = None
    # The one pool that KV and adapters share; None takes 2 GiB, or on a GPU what
    # gpu_memory_utilization leaves.
    pool_bytes: int | None = None
    # Share of the GPU's memory that may be taken, 0 to 1.
    gpu_memory_utilization: float = 0.9
    # Bits of adapters' low-rank matrices in linear layers, 8 or 4; None keeps them in the dtype.
    adapter_bits: int | None = None
    # Adapters kept ready in host RAM.
    host_adapter_bytes: int = 2 << 30
    prefix_caching: bool = True
    # Who of those that wait enters next: "fair", "fcfs" or "priority".
    scheduling_policy: str = "fair"
    # Share of the pool that adapters have, and KV not, 0 to 1; None: they share all of it.
    adapter_share: float | None = None
    # Host RAM for the KV of preempted requests, and for what the selection infllm seldom reads; 0:
    # it is recomputed.
    host_kv_bytes: int = 0
    # Seconds to the first token, after which a request is refused rather than served; None: never.
    ttft_slo: float | None = None
    # Requests that wait, and tokens of their prompts; more are refused. None: no limit.
    max_waiting: int | None = None
    max_waiting_tokens: int | None = None
    # Bits of the weights of linear layers: "int8" or "int4"; None keeps them in the dtype.
    quantization: str | None = None
    # Steps with one adapter alone before it goes into the base weights; None never does that.
    fuse_after: int | None = None
    # Adapters that are counted by name at a time; the busiest, for those who measure.
    named_adapters: int = 100
    # Balance the pool's books whenever the engine goes idle; for tests and debug runs.
    check_integrity: bool = False
