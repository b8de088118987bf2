"""How much of a GPU's memory is left for the pool, measured by the largest steps there can be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from polydelta.engine.kv_rules import KVRules
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.decoder import Decoder
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.layers import fused_linears
from polydelta.engine.paged_kv import PagedKV
from polydelta.kernels.kv_selection import BY_QUERY, FULL
from polydelta.kernels.ops import Kernels, SequenceSlice
from polydelta.kernels.sampling import SamplingRows

# Recorded steps keep what they compute with and what they read, by count 0.7 GiB for 256 rows of
# Llama 3 8B; adapters on their way to the pool take half a GiB; libraries loaded later, some.
RESERVE = 3 << 29


def memory_for_pool(
    decoder: Decoder,
    kernels: Kernels,
    spec: KVSpec,
    rules: KVRules,
    rows: int,
    samples: int,
    utilization: float,
    fuses: bool,
) -> int:
    """Bytes. The decoder is on the GPU already, and nothing is wrapped around it.

    rules: of the server. rows, samples: of the largest step, tokens and sequences. utilization: the
    share of the GPU's memory that this process may take, 0 to 1. fuses: whether adapters are fused,
    which takes a second copy of all linear layers. Raises ModelError when nothing is left.
    """
    device = kernels.device
    torch.cuda.reset_peak_memory_stats(device)
    largest_steps(decoder, kernels, spec, rules, rows, samples)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    kept = _bytes_of_linears(decoder, spec.dtype) if fuses else 0
    return share_for_pool(total, others, peak + kept, utilization)


def _bytes_of_linears(decoder: Decoder, dtype: torch.dtype) -> int:
    """Of all decoder layers; one more in float32, in which the sums are made."""
    linears = fused_linears(decoder.config)
    layer = sum(linear.in_features * linear.out_features for linear in linears)
    return layer * (decoder.config.num_layers * dtype.itemsize + torch.float32.itemsize)


def share_for_pool(total: int, others: int, peak: int, utilization: float) -> int:
    """Bytes of a GPU with `total` that are left for the pool. others: what other processes, CUDA
    and its libraries have; peak: of the weights and the largest step. Raises ModelError."""
    left = int(total * utilization) - others - peak - RESERVE
    if left <= 0:
        gib = 1 << 30
        raise ModelError(
            f"No memory is left for the pool: of {total / gib:.1f} GiB, {utilization:.0%} may be "
            f"used, others have {others / gib:.1f} GiB, and the weights with the largest step take "
            f"{peak / gib:.1f} GiB. Raise gpu_memory_utilization, or lower max_batch_tokens."
        )
    return left


@torch.inference_mode()
def largest_steps(
    decoder: Decoder,
    kernels: Kernels,
    spec: KVSpec,
    rules: KVRules,
    rows: int,
    samples: int,
) -> None:
    """A prompt of so many rows over a pool of its own, in full and as the server reads prompts;
    where answers choose by query, one step of so many; and logits for the samples."""
    config = decoder.config
    rows = min(rows, config.context_length)
    num_pages = -(-rows // spec.block_size)
    # All layers share one layer's memory: what they compute does not matter.
    layer = kernels.zeros(1, num_pages, spec.page_bytes)
    storage = layer.expand(config.num_layers, -1, -1)
    kv = PagedKV(storage, spec, kernels, config.context_length, slots=2)
    for slices in _largest(spec, rules, rows, samples):
        places = torch.arange(sum(part.length for part in slices), device=kernels.device)
        kv.prepare(places, slices)
        hidden = decoder.hidden_states(torch.zeros_like(places), places, kv)
    logits = decoder.logits(hidden[:1].expand(samples, -1).contiguous())
    half = torch.full((samples,), 0.5, dtype=torch.float64, device=kernels.device)
    kernels.sample(logits, SamplingRows(half, torch.zeros_like(half), half, half * 0, half))
    torch.log_softmax(logits, -1)


def _largest(
    spec: KVSpec, rules: KVRules, rows: int, samples: int
) -> Iterator[Sequence[SequenceSlice]]:
    """The steps, in two slots."""
    pages = range(-(-rows // spec.block_size))
    for reads in dict.fromkeys((FULL, rules.of_prompts(rules.selection))):
        yield [SequenceSlice(0, rows, rows, pages, reads, slot=0, prompt=rows)]
    if isinstance(rules.selection, BY_QUERY):
        # Scores are as wide as the longest sequence; one page does for all of it.
        longest = spec.config.context_length
        again = [0] * -(-longest // spec.block_size)
        others = (SequenceSlice(row, 1, 1, [0], rules.selection, 1) for row in range(1, samples))
        yield [SequenceSlice(0, 1, longest, again, rules.selection, 0), *others]
