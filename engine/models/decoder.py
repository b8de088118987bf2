"""A Llama-like decoder over a paged KV cache. It knows nothing of adapters: what they change is
put around its parts after it is made (see `engine/deltas.py`)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout, BaseWeights
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.layers import (
    MLP,
    Attention,
    Norm,
    PagedAttention,
    RMSNorm,
    Rotation,
    fused_linears,
    norm_parts,
    quantizing,
)
from polydelta.engine.models.rope import rope_tables
from polydelta.engine.models.weights import Weights
from polydelta.kernels.delta_groups import Linear
from polydelta.kernels.ops import Kernels

# The head is read in every step and says the most about quality: it never gets fewer.
HEAD_BITS = 8


class DecoderLayer:
    def __init__(self, config: ModelConfig, layer: int, weights: Weights, kernels: Kernels):
        prefix, size, eps = f"model.layers.{layer}", config.hidden_size, config.rms_norm_eps
        linears = fused_linears(config)
        self.attention_norm: Norm = RMSNorm(
            f"{prefix}.input_layernorm", size, eps, weights, kernels
        )
        self.attention = Attention(config, layer, linears[:2], weights, kernels)
        self.mlp_norm: Norm = RMSNorm(
            f"{prefix}.post_attention_layernorm", size, eps, weights, kernels
        )
        self.mlp = MLP(layer, linears[2:], weights, kernels)

    def __call__(
        self, hidden: Tensor, update: Tensor | None, rotation: Rotation, cache: PagedAttention
    ) -> tuple[Tensor, Tensor]:
        """hidden: `[tokens, hidden]`; update: like it, what the layer before adds to it; None in
        the first layer. Returns both for the next: sums are left to the norms that read them."""
        if update is None:
            normed = self.attention_norm(hidden)
        else:
            normed = self.attention_norm(update, residual=hidden)
            hidden = update
        attended = self.attention(normed, rotation, cache)
        normed = self.mlp_norm(attended, residual=hidden)
        return attended, self.mlp(normed)

    def wrap_linears(self, wrap: Callable[[int, Linear], Linear]) -> None:
        """Puts `wrap(index, linear)` in the place of each linear layer, the index being the one
        in `BaseLayout.linears`."""
        self.attention.qkv_proj = wrap(0, self.attention.qkv_proj)
        self.attention.o_proj = wrap(1, self.attention.o_proj)
        self.mlp.gate_up_proj = wrap(2, self.mlp.gate_up_proj)
        self.mlp.down_proj = wrap(3, self.mlp.down_proj)

    def wrap_norms(self, wrap: Callable[[int, Norm], Norm]) -> None:
        """Puts `wrap(index, norm)` in the place of each norm, the index being the one in
        `BaseLayout.norms`."""
        self.attention_norm = wrap(0, self.attention_norm)
        self.mlp_norm = wrap(1, self.mlp_norm)
        attention = self.attention
        if attention.q_norm is not None and attention.k_norm is not None:
            attention.q_norm = wrap(2, attention.q_norm)
            attention.k_norm = wrap(3, attention.k_norm)


class Decoder:
    """Token ids in, logits out, for any of the families in `config.py`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        kernels: Kernels,
        max_positions: int,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.kernels = kernels
        embedding_shape = (config.vocab_size, config.hidden_size)
        embedding_name = head_name = "model.embed_tokens.weight"
        embedding = weights.take(embedding_name, embedding_shape)
        # tokens [tokens] int64 -> [tokens, hidden]
        self.embed: Linear = partial(kernels.gather, embedding)
        self.layers = [
            DecoderLayer(config, layer, weights, kernels) for layer in range(config.num_layers)
        ]
        size, eps = config.hidden_size, config.rms_norm_eps
        self.norm: Norm = RMSNorm("model.norm", size, eps, weights, kernels)
        if config.tie_embeddings:
            weights.leave("lm_head.weight")  # some checkpoints store the tied copy too
        else:
            head_name = "lm_head.weight"
        self.lm_head: Linear
        if weights.bits is not None:
            quantized = weights.take_quantized(head_name, embedding_shape, HEAD_BITS)
            self.lm_head = quantizing(kernels).quantized_head(quantized)
        elif config.tie_embeddings:
            self.lm_head = kernels.head(embedding)
        else:
            self.lm_head = kernels.head(weights.take(head_name, embedding_shape))
        tables = rope_tables(config.rope, config.head_dim, max_positions, dtype)
        self.cos, self.sin = (table.to(kernels.device) for table in tables)
        weights.finish()

    def hidden_states(self, tokens: Tensor, positions: Tensor, cache: PagedAttention) -> Tensor:
        """tokens, positions: `[tokens]` int64 -> `[tokens, hidden]`, before the last norm."""
        return self.forward_embedded(self.embed(tokens), positions, cache)

    def forward_embedded(self, hidden: Tensor, positions: Tensor, cache: PagedAttention) -> Tensor:
        """hidden: `[tokens, hidden]`, embeddings -> the same shape, before the last norm."""
        gather = self.kernels.gather
        rotation = Rotation(gather(self.cos, positions), gather(self.sin, positions))
        update = None
        for layer in self.layers:
            hidden, update = layer(hidden, update, rotation, cache)
        return hidden if update is None else self.kernels.add(update, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[rows, hidden]` -> `[rows, vocab]`, float32."""
        return self.lm_head(self.norm(hidden))


def base_layout(
    config: ModelConfig, model_id: str, weights: BaseWeights | None = None
) -> BaseLayout:
    """What adapters need to know of this decoder; some formats need the weights, too."""
    return BaseLayout(
        hashlib.sha256(f"{model_id}\n{config}".encode()).hexdigest(),
        config.num_layers,
        fused_linears(config),
        norm_parts(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tied=config.tie_embeddings,
        weights=weights,
    )
