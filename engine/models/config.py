"""The shape of a decoder, read from a Hugging Face config or from GGUF metadata.

One decoder serves every family here; what differs between them is a field of `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polydelta.engine.models.errors import ModelError

# Hugging Face `model_type` -> what the family does that its config file does not say.
FAMILIES: Mapping[str, Mapping[str, bool]] = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "mistral": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is stretched beyond its training."""

    theta: float
    # "default", "linear", "llama3", "yarn", or "divided" by a list of divisors (GGUF)
    type: str = "default"
    # The scaling's own parameters, by the names of Hugging Face configs.
    scaling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a Llama-like decoder."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    # Tokens: the longest sequence that the model was made for.
    context_length: int
    rope: RopeConfig
    tie_embeddings: bool
    # Bias on q, k and v (Qwen2; Llama with attention_bias).
    qkv_bias: bool = False
    # Bias on the attention's output (Llama with attention_bias).
    o_bias: bool = False
    mlp_bias: bool = False
    # RMS norm of each head of q and k before the rotation (Qwen3).
    qk_norm: bool = False
    # For each layer: how many tokens back it sees, itself included; None sees all.
    sliding_windows: tuple[int | None, ...] = ()
    eos_token_ids: tuple[int, ...] = ()

    @property
    def has_sliding_windows(self) -> bool:
        return any(window is not None for window in self.sliding_windows)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """Reads a Hugging Face `config.json`. Raises ModelError for what is not served."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise ModelError(
            f"model_type {family!r} is not supported; PolyDelta serves {', '.join(FAMILIES)}."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act {config['hidden_act']!r} is not supported; only silu is.")
    try:
        num_layers = int(config["num_hidden_layers"])
        num_heads = int(config["num_attention_heads"])
        hidden_size = int(config["hidden_size"])
        # Only Llama and Qwen3 make this a switch: for q, k, v and o alike.
        attention_bias = family in ("llama", "qwen3") and bool(config.get("attention_bias"))
        return ModelConfig(
            family=family,
            vocab_size=int(config["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(config["intermediate_size"]),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            rms_norm_eps=float(config["rms_norm_eps"]),
            context_length=int(config["max_position_embeddings"]),
            rope=_rope(config),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=FAMILIES[family]["qkv_bias"] or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
            qk_norm=FAMILIES[family]["qk_norm"],
            sliding_windows=_sliding_windows(config, family, num_layers),
            eos_token_ids=token_ids(config.get("eos_token_id")),
        )
    except KeyError as missing:
        raise ModelError(f"config.json lacks the key {missing}.") from None


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Token ids that configs write as nothing, a number or a list."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`.
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    theta = scaling.get("rope_theta") or config.get("rope_theta") or 10000.0
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ModelError(
            f"rope scaling {kind!r} is not supported; default, linear, llama3 and yarn are."
        )
    if float(config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelError("partial_rotary_factor other than 1 is not supported.")
    scaling.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return RopeConfig(float(theta), kind, scaling)


def _sliding_windows(
    config: Mapping[str, Any], family: str, num_layers: int
) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if family == "llama" or window is None:
        return (None,) * num_layers
    if family == "mistral":
        return (int(window),) * num_layers
    # Qwen: windows only where switched on, and from layer `max_window_layers` upwards.
    if not config.get("use_sliding_window"):
        return (None,) * num_layers
    if layer_types := config.get("layer_types"):
        return tuple(int(window) if kind == "sliding_attention" else None for kind in layer_types)
    first = int(config.get("max_window_layers", num_layers))
    return tuple(int(window) if layer >= first else None for layer in range(num_layers))
