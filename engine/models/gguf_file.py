"""GGUF files: shapes from their metadata, tensors dequantised by the `gguf` library."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from polydelta.engine.models.config import FAMILIES, ModelConfig, RopeConfig
from polydelta.engine.models.errors import ModelError
from polydelta.engine.models.gguf_codes import quantized_weight
from polydelta.engine.models.gguf_head import GgufTensor, read_head
from polydelta.kernels.quantized_weight import QuantizedWeight

# GGUF's tensor names -> Hugging Face's, within a block and outside of blocks.
_BLOCK_NAMES: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Llama 3's stretched frequencies come as a tensor of divisors, not as metadata.
_ROPE_DIVISORS = "rope_freqs.weight"
# Rows that are dequantised as one.
JOINED_ROWS = 16


class GgufFile:
    """One GGUF file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            head = read_head(path)
        except FileNotFoundError:
            raise ModelError(f"There is no file {path}.") from None
        except Exception as damage:  # whatever its parsing runs into
            raise ModelError(f"{path.name} is not a readable GGUF file: {damage}") from None
        self._metadata = head.metadata
        self._tensors = head.tensors
        self._hf_names = {
            hf_name: name for name in self._tensors if (hf_name := _hf_name(name)) is not None
        }
        self.config = self._read_config()

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata value, or the default."""
        return self._metadata.get(key, default)

    def names(self) -> Collection[str]:
        known = set(self._hf_names)
        return known | {n for n in self._tensors if _hf_name(n) is None and n != _ROPE_DIVISORS}

    def read(self, name: str) -> Tensor:
        tensor = self._tensors[self._hf_names[name]]
        return self._in_order(name, self._dequantised(tensor))

    def read_quantized(self, name: str) -> QuantizedWeight | None:
        weight = quantized_weight(self._tensors[self._hf_names[name]])
        return None if weight is None else weight.map_rows(partial(self._in_order, name))

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """The rows of a tensor as Hugging Face has them."""
        if self.config.family == "llama" and (".q_proj." in name or ".k_proj." in name):
            heads = self.config.num_heads if ".q_proj." in name else self.config.num_kv_heads
            return _unpermuted(rows, heads)
        return rows

    def _dequantised(self, tensor: GgufTensor) -> Tensor:
        # The library takes 16 rows at a time. Several rows as one make its operations fewer: all
        # of the default model in 0.20 s, not 0.38 s.
        rows = math.prod(tensor.data.shape[:-1])
        together = tensor.data.reshape(rows // math.gcd(rows, JOINED_ROWS), -1)
        try:
            values = gguf.dequantize(together, tensor.kind)
        except NotImplementedError:
            raise ModelError(
                f"Tensor {tensor.name!r} of {self.path.name} has the type "
                f"{tensor.kind.name}, which the gguf library cannot dequantise."
            ) from None
        if not values.flags.writeable:  # float32 as it lies in the file, which torch must not hold
            values = values.copy()
        return torch.from_numpy(values.reshape(tensor.shape))

    def _read_config(self) -> ModelConfig:
        family = str(self.field("general.architecture"))
        if family not in FAMILIES:
            raise ModelError(
                f"{self.path.name} has the architecture {family!r}, which is not supported; "
                f"PolyDelta serves {', '.join(FAMILIES)}."
            )

        def required(key: str) -> Any:
            value = self.field(f"{family}.{key}")
            if value is None:
                raise ModelError(f"{self.path.name} lacks the metadata key {family}.{key}.")
            return value

        hidden, heads = int(required("embedding_length")), int(required("attention.head_count"))
        layers = int(required("block_count"))
        if "token_embd.weight" not in self._tensors:
            raise ModelError(f"{self.path.name} has no tensor 'token_embd.weight'.")
        eos = [self.field(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
        return ModelConfig(
            family=family,
            vocab_size=self._tensors["token_embd.weight"].shape[0],
            hidden_size=hidden,
            intermediate_size=int(required("feed_forward_length")),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=int(self.field(f"{family}.attention.head_count_kv", heads)),
            head_dim=int(self.field(f"{family}.attention.key_length", hidden // heads)),
            rms_norm_eps=float(required("attention.layer_norm_rms_epsilon")),
            context_length=int(required("context_length")),
            rope=self._read_rope(family),
            tie_embeddings="output.weight" not in self._tensors,
            qkv_bias="blk.0.attn_q.bias" in self._tensors,
            o_bias="blk.0.attn_output.bias" in self._tensors,
            mlp_bias="blk.0.ffn_gate.bias" in self._tensors,
            qk_norm=FAMILIES[family]["qk_norm"],
            sliding_windows=(None,) * layers,
            eos_token_ids=tuple(dict.fromkeys(int(i) for i in eos if i is not None)),
        )

    def _read_rope(self, family: str) -> RopeConfig:
        theta = float(self.field(f"{family}.rope.freq_base", 10000.0))
        if divisors := self._tensors.get(_ROPE_DIVISORS):
            return RopeConfig(theta, "divided", {"divisors": self._dequantised(divisors).tolist()})
        kind = str(self.field(f"{family}.rope.scaling.type", "none"))
        if kind == "none":
            return RopeConfig(theta)
        if kind not in ("linear", "yarn"):
            raise ModelError(f"rope scaling {kind!r} is not supported in a GGUF file.")
        prefix = f"{family}.rope.scaling"
        original = self.field(f"{prefix}.original_context_length")
        return RopeConfig(
            theta,
            kind,
            {
                "factor": self.field(f"{prefix}.factor", 1.0),
                "original_max_position_embeddings": original
                or self.field(f"{family}.context_length"),
            },
        )


def _hf_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None when unknown."""
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{suffix}"
    match stem.split("."):
        case ["blk", layer, part] if part in _BLOCK_NAMES:
            return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{suffix}"
    return None


def _unpermuted(values: Tensor, heads: int) -> Tensor:
    """GGUF interleaves the two rotary halves of each Llama head's q and k rows; Hugging Face's
    order, which the rotation here expects, has them one after the other."""
    rows = values.shape[0]
    halves = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)
