"""`config.json` of a model that is written: the base's own, or one made from a GGUF file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from polydelta.engine.models.checkpoint import Checkpoint
from polydelta.engine.models.config import ModelConfig
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.hf_folder import HfFolder

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_QKV = frozenset({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"})
_ATTENTION = _QKV | {"self_attn.o_proj"}
_MLP = frozenset({"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"})
# Parts of a block that have biases in every model of the family.
_ALWAYS_BIASED: Mapping[str, frozenset[str]] = {"qwen2": _QKV}
# Those that get them together, by a key of the config.
_BIAS_KEYS: Mapping[str, Mapping[str, frozenset[str]]] = {
    "llama": {"attention_bias": _ATTENTION, "mlp_bias": _MLP},
    "qwen3": {"attention_bias": _ATTENTION},
}


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The base's `config.json`. Raises ModelError for what only a GGUF file can say."""
    if isinstance(checkpoint.tensors, HfFolder):
        return checkpoint.tensors.raw_config()
    ids = checkpoint.tokenizer.eos_token_ids
    return from_gguf(checkpoint.config) | {
        "bos_token_id": checkpoint.tokenizer.bos_token_id,
        "eos_token_id": ids[0] if len(ids) == 1 else list(ids),
    }


def from_gguf(config: ModelConfig) -> dict[str, Any]:
    """What transformers asks for, versions 4 and 5, from the shape that a GGUF file tells. Raises
    ModelError."""
    rope = config.rope
    if rope.type == "divided":
        raise ModelError(
            "The GGUF file lists a divisor for each rotary frequency (rope_freqs.weight), for "
            "which config.json has no key: name the model's Hugging Face folder with --model."
        )
    return {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.context_length,
        "rope_theta": rope.theta,
        "rope_scaling": (
            None if rope.type == "default" else {"rope_type": rope.type, **rope.scaling}
        ),
        # GGUF files tell of none.
        "sliding_window": None,
    }


def bias_keys(family: str, biased: Collection[str]) -> tuple[dict[str, bool], frozenset[str]]:
    """The keys of the config that give these modules biases, and the parts of every block that have
    one then.

    biased: full module paths. Raises ModelError for one that cannot have a bias in this family.
    """
    parts = {module.split(".", 3)[-1] for module in biased}
    by_key = _BIAS_KEYS.get(family, {})
    keys = {key: bool(parts & of_key) for key, of_key in by_key.items()}
    have = _ALWAYS_BIASED.get(family, frozenset()).union(
        *(of_key for key, of_key in by_key.items() if keys[key])
    )
    if homeless := sorted(parts - have):
        raise ModelError(
            f"The adapter gives {homeless[0]} a bias, for which config.json of a {family} model "
            "has no place: serve the adapter as it is, or write a LoRA (--to lora)."
        )
    return keys, have
