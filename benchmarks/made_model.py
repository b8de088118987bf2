"""A model of any size that never was a file: random weights, and words that stand for nothing."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from functools import cached_property

import torch
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.layers import fused_linears, norm_parts
from polydelta.engine.models.tokenizer import Tokenizer


class RandomTensors:
    """A tensor source. Numbers are made when they are asked for, the same ones each time."""

    def __init__(self, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        """device: where the numbers are made; others make other ones."""
        self._model = model
        self._device = device
        self._dtype = dtype

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def read(self, name: str) -> Tensor:
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        shape = self._shapes[name]
        noise = torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)
        if len(shape) == 1:
            return 1 + 0.1 * noise
        # So that outputs are about as large as inputs; rows of the embedding are looked up.
        scale = 1.0 if name.startswith("model.embed") else 1 / math.sqrt(shape[1])
        return noise.mul_(scale)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        model = self._model
        matrix = (model.vocab_size, model.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": matrix}
        for layer in range(model.num_layers):
            prefix = f"model.layers.{layer}"
            for fused in fused_linears(model):
                for part in fused.parts:
                    size = (part.out_features, fused.in_features)
                    shapes[f"{prefix}.{part.name}.weight"] = size
            for norm in norm_parts(model):
                shapes[f"{prefix}.{norm.name}.weight"] = (norm.size,)
        return shapes | {"model.norm.weight": (model.hidden_size,), "lm_head.weight": matrix}


def made_checkpoint(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Without biases, and with a head of its own."""
    words = {f"w{token}": token for token in range(model.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Backend(WordLevel(words, unk_token="w0")))
    return Checkpoint("made", model, RandomTensors(model, device, dtype), Tokenizer(tokenizer, ()))
