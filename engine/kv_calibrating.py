"""Finds a model's label channels for double sparsity, by running it over a text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

from polydelta.engine.device import choose_device, dtype_on
from polydelta.engine.kv_labels import Labels
from polydelta.engine.kv_spec import KVSpec
from polydelta.engine.models.checkpoint import open_checkpoint
from polydelta.engine.models.decoder import Decoder, base_layout
from polydelta.engine.models.layers import PagedAttention
from polydelta.engine.models.weights import Weights
from polydelta.engine.paged_kv import PagedKV
from polydelta.kernels.kv_calibration import ChannelScores
from polydelta.kernels.ops import SequenceSlice, kernels_for

# Tokens that the model reads at a time, each part by itself, and in all.
WINDOW, MOST_TOKENS = 512, 8192
_BLOCK_SIZE = 16
# Its end: benchmarks read it from the beginning.
_OWN_TEXT = "the end of pydoc_data.topics (Python, PSF licence)"
_OWN_CHARACTERS = 100_000


def calibrate_model(
    model: str | None,
    device: str = "auto",
    dtype: str = "bfloat16",
    text: str | None = None,
    report: Callable[[int, int], None] = lambda *_: None,
) -> Labels:
    """model: as `open_checkpoint` has it; device, dtype: as `EngineConfig` has them; text: None for
    the end of Python's own documentation; report: tokens read, and to be read. Raises ModelError,
    and ValueError for a text that is too short."""
    place = choose_device(device)
    numbers = dtype_on(place, dtype)
    kernels = kernels_for(place, numbers)
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    read = "\n\n".join(topics.values())[-_OWN_CHARACTERS:] if text is None else text
    tokens = torch.tensor(checkpoint.tokenizer.encode(read)[:MOST_TOKENS], dtype=torch.int64)
    kernels.enter_thread()
    weights = Weights(checkpoint.tensors, numbers, lambda *_: None, device=place)
    decoder = Decoder(config, weights, kernels, WINDOW, numbers)
    return Labels(
        checkpoint.id,
        base_layout(config, checkpoint.id).fingerprint,
        _OWN_TEXT if text is None else "a text of the operator's",
        len(tokens),
        calibrate(decoder, tokens, numbers, report),
    )


@torch.inference_mode()
def calibrate(
    decoder: Decoder,
    tokens: Tensor,
    dtype: torch.dtype,
    report: Callable[[int, int], None] = lambda *_: None,
) -> Tensor:
    """tokens: `[n]` int64, read in windows of WINDOW, the last of which may be shorter; dtype: the
    decoder's -> `[layers, kv_heads, head_dim // 4]` int64, on the CPU. Raises ValueError for fewer
    than WINDOW tokens."""
    if len(tokens) < WINDOW:
        raise ValueError(
            f"The text for calibration has {len(tokens)} tokens, which say little of what matters: "
            f"give at least {WINDOW}."
        )
    config, kernels = decoder.config, decoder.kernels
    spec = KVSpec.of(config, dtype, _BLOCK_SIZE)
    pages = range(WINDOW // spec.block_size)
    cache = PagedKV(kernels.zeros(config.num_layers, len(pages), spec.page_bytes), spec, kernels)
    scores = ChannelScores(config.num_layers, config.num_kv_heads, config.head_dim, kernels.device)
    recording = _Recording(cache, scores)
    done = 0
    for window in tokens.to(kernels.device).split(WINDOW):
        positions = torch.arange(len(window), device=kernels.device)
        cache.prepare(positions, [SequenceSlice(0, len(window), len(window), pages)])
        decoder.hidden_states(window, positions, recording)
        done += len(window)
        report(done, len(tokens))
    return scores.labels().cpu()


@dataclass(frozen=True, eq=False)
class _Recording:
    """Attention as it is, of which is noted what each channel adds."""

    cache: PagedAttention
    scores: ChannelScores

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """As `PagedAttention` says."""
        self.scores.add(layer, queries, keys)
        return self.cache.attend(layer, queries, keys, values)
