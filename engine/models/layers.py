"""The decoder's parts. They know sizes and weights; how anything is computed is the kernels'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import FusedLinear, LinearPart, NormPart
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.weights import Weights
from polydelta.kernels.delta_groups import Linear
from polydelta.kernels.ops import Kernels, QuantizedKernels
from polydelta.kernels.quantized_weight import stack


class PagedAttention(Protocol):
    """The KV cache as a decoder sees it during one step."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Stores this step's keys and values `[tokens, kv_heads, head_dim]` and lets the queries
        `[tokens, heads, head_dim]` attend to all of their sequence -> like the queries."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """Cosines and sines for the positions of one step, each `[tokens, head_dim]`."""

    cos: Tensor
    sin: Tensor


class Norm(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """x: `[..., size]`; weight: `[size]`, in the place of its own; residual: like x, added to
        it in its place first."""


def norm_parts(config: ModelConfig) -> tuple[NormPart, ...]:
    """The norms of a block, in the order of `DecoderLayer.wrap_norms`."""
    hidden = config.hidden_size
    norms = (NormPart("input_layernorm", hidden), NormPart("post_attention_layernorm", hidden))
    if not config.qk_norm:
        return norms
    heads = (NormPart(f"self_attn.{name}", config.head_dim) for name in ("q_norm", "k_norm"))
    return (*norms, *heads)


def fused_linears(config: ModelConfig) -> tuple[FusedLinear, ...]:
    """The four matrix products of a block, in the order in which a token meets them."""
    q, kv, hidden, inner = (
        config.q_size,
        config.kv_size,
        config.hidden_size,
        config.intermediate_size,
    )
    return (
        FusedLinear(
            "self_attn.qkv_proj",
            hidden,
            (
                LinearPart("self_attn.q_proj", q),
                LinearPart("self_attn.k_proj", kv),
                LinearPart("self_attn.v_proj", kv),
            ),
            config.qkv_bias,
        ),
        FusedLinear(
            "self_attn.o_proj", q, (LinearPart("self_attn.o_proj", hidden),), config.o_bias
        ),
        FusedLinear(
            "mlp.gate_up_proj",
            hidden,
            (LinearPart("mlp.gate_proj", inner), LinearPart("mlp.up_proj", inner)),
            config.mlp_bias,
        ),
        FusedLinear(
            "mlp.down_proj", inner, (LinearPart("mlp.down_proj", hidden),), config.mlp_bias
        ),
    )


def load_linear(fused: FusedLinear, prefix: str, weights: Weights, kernels: Kernels) -> Linear:
    """Stacks the parts' weights, and their biases where the family has them."""
    shapes = {
        f"{prefix}.{part.name}.weight": (part.out_features, fused.in_features)
        for part in fused.parts
    }
    biases = [
        weights.take(f"{prefix}.{part.name}.bias", (part.out_features,))
        for part in fused.parts
        if fused.bias
    ]
    bias = torch.cat(biases) if biases else None
    if weights.bits is None:
        return kernels.linear(torch.cat([weights.take(*each) for each in shapes.items()]), bias)
    parts = [weights.take_quantized(*each, weights.bits) for each in shapes.items()]
    return quantizing(kernels).quantized_linear(stack(parts), bias)


def quantizing(kernels: Kernels) -> QuantizedKernels:
    """Raises ModelError for kernels that take no quantised weights."""
    if isinstance(kernels, QuantizedKernels):
        return kernels
    raise ModelError(
        "quantization needs dtype bfloat16, Linux, a C compiler and a CPU with AVX512-BF16 (AMD "
        "since Zen 4, Intel since Sapphire Rapids): serve without it."
    )


class RMSNorm:
    def __init__(self, name: str, size: int, eps: float, weights: Weights, kernels: Kernels):
        self.weight = weights.take(f"{name}.weight", (size,))
        self.eps = eps
        self.kernels = kernels

    def __call__(
        self, x: Tensor, weight: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """As `Norm` says."""
        weight = self.weight if weight is None else weight
        if residual is None:
            return self.kernels.rms_norm(x, weight, self.eps)
        return self.kernels.add_rms_norm(x, residual, weight, self.eps)


class Attention:
    """Grouped-query attention with rotary positions; q/k norm where the family has it."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        linears: Sequence[FusedLinear],
        weights: Weights,
        kernels: Kernels,
    ) -> None:
        prefix = f"model.layers.{layer}"
        self.config = config
        self.layer = layer
        self.kernels = kernels
        qkv, output = linears
        self.qkv_proj = load_linear(qkv, prefix, weights, kernels)
        self.o_proj = load_linear(output, prefix, weights, kernels)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if config.qk_norm:
            size, eps = config.head_dim, config.rms_norm_eps
            self.q_norm = RMSNorm(f"{prefix}.self_attn.q_norm", size, eps, weights, kernels)
            self.k_norm = RMSNorm(f"{prefix}.self_attn.k_norm", size, eps, weights, kernels)

    def __call__(self, x: Tensor, rotation: Rotation, cache: PagedAttention) -> Tensor:
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        # [tokens, heads + 2 * kv_heads, head_dim]
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.config.head_dim))
        queries_keys, values = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        rotate = partial(self.kernels.rotate, cos=rotation.cos, sin=rotation.sin)
        if self.q_norm and self.k_norm:
            queries, keys = queries_keys.split((heads, kv_heads), 1)
            queries, keys = rotate(self.q_norm(queries)), rotate(self.k_norm(keys))
        else:
            queries, keys = rotate(queries_keys).split((heads, kv_heads), 1)
        mixed = cache.attend(self.layer, queries, keys, values)
        return self.o_proj(mixed.view(len(x), -1))


class MLP:
    """Gated feed-forward: `down(silu(gate(x)) * up(x))`."""

    def __init__(
        self, layer: int, linears: Sequence[FusedLinear], weights: Weights, kernels: Kernels
    ) -> None:
        prefix = f"model.layers.{layer}"
        gate_up, down = linears
        self.kernels = kernels
        self.gate_up_proj = load_linear(gate_up, prefix, weights, kernels)
        self.down_proj = load_linear(down, prefix, weights, kernels)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down_proj(self.kernels.silu_mul(self.gate_up_proj(x)))
