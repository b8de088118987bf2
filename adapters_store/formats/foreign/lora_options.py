"""What the configs of LoRA's relatives outside PEFT have in common: they are LoRA's, with fewer
options."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_config import (
    Config,
    KeyRules,
    flag,
    key_rules,
    number,
    positive_int,
)
from polydelta.adapters_store.reference import CONFIG_FILE

_HONOURED = frozenset({"init_lora_weights", "lora_alpha", "r"})
# How weights were started, training, and how PEFT itself runs.
_HARMLESS = frozenset(
    {
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)
_REFUSED = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
)

# Ways to start training which leave the base weights as they are.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def lora_rules(*own: str) -> KeyRules:
    """own: keys that the format's parser reads itself; `use_rslora`, when the scale heeds it."""
    return key_rules(
        honoured=_HONOURED | {*own},
        harmless=_HARMLESS,
        refused=dict.fromkeys(
            _REFUSED, "it is an option of PEFT's LoRA, which this format lacks: train without"
        ),
    )


@dataclass(frozen=True)
class LoraOptions:
    """The same for all modules of an adapter."""

    rank: int
    alpha: float
    rank_stabilised: bool

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    @property
    def why(self) -> str:
        return f"rank {self.rank} (r in {CONFIG_FILE})"


def lora_options(config: Config) -> LoraOptions:
    """Raises InvalidAdapterError."""
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: init_lora_weights is {reprlib.repr(init)}, which changes the base "
            "weights, so the adapter is wrong over the original base: train with "
            "init_lora_weights=True."
        )
    return LoraOptions(
        positive_int("r", config.get("r")),
        number("lora_alpha", config.get("lora_alpha")),
        flag("use_rslora", config.get("use_rslora")),
    )
