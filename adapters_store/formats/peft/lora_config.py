"""What the config of PEFT's LoRA says about the numbers."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from enum import StrEnum

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_config import (
    Config,
    flag,
    key_rules,
    mapping,
    positive_int,
    strings,
    token_ids,
)
from polydelta.adapters_store.formats.peft_options import alpha_table, rank_table
from polydelta.adapters_store.formats.peft_patterns import PatternTable
from polydelta.adapters_store.reference import CONFIG_FILE

KEY_RULES = key_rules(
    honoured={
        "alora_invocation_tokens",
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "kasa_config",
        "lora_alpha",
        "lora_bias",
        "monteclora_config",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    },
    harmless={
        # How weights were started; where that changed the base, `init_lora_weights` says so.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        # The file has the tensors of both of two modules that were kept the same.
        "ensure_weight_tying",
        # Training, and how PEFT itself runs.
        "lora_dropout",
        "megatron_core",
        "runtime_config",
    },
    refused={
        "arrow_config": "Arrow routes between several adapters, token by token, and is not served: "
        "load each of the adapters by itself",
        "layer_replication": "it gives the base another number of layers: train without it, or "
        "serve the base with its layers replicated",
        "megatron_config": "adapters split for Megatron are not served: convert it to plain LoRA",
        "target_parameters": "LoRA on bare parameters (fused experts) is not served: target linear "
        "layers with target_modules",
    },
)

# Ways to start training which leave the base weights as they are.
_PLAIN_INITS = ("eva", "gaussian", "mica", "orthogonal")
# Those that do not, and that PEFT can convert.
_CONVERTED_INITS = ("pissa", "corda", "olora", "lora_ga")


# Each is looked for in each module's name.
_MAX_NAME_PARTS = 64


class Variant(StrEnum):
    """Variants that PEFT's layers know, by the key that switches them on; one at most."""

    DORA = "use_dora"
    BD_LORA = "use_bdlora"
    ALORA = "alora_invocation_tokens"
    KASA = "kasa_config"
    # These change the training alone.
    VELORA = "velora_config"
    MONTECLORA = "monteclora_config"
    MICA = "init_lora_weights"


@dataclass(frozen=True)
class BlockPatterns:
    """BD-LoRA: which modules have a block-diagonal A or B, of which the file has the blocks."""

    # Parts of module names.
    a: tuple[str, ...]
    b: tuple[str, ...]
    count: int
    strict: bool

    def is_a(self, module: str) -> bool:
        return any(part in module for part in self.a)

    def is_b(self, module: str) -> bool:
        return any(part in module for part in self.b)

    def counts(self, module: str) -> tuple[int, int]:
        """In how many blocks A and B lie; 1 for a full matrix. Raises InvalidAdapterError for a
        module that the patterns do not decide."""
        a, b = self.is_a(module), self.is_b(module)
        if (a and b) or (self.strict and not (a or b)):
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: use_bdlora names {module[:200]!r} in "
                f"{'both' if a else 'neither'} of target_modules_bd_a and target_modules_bd_b: "
                "take the config of the training."
            )
        return self.count if a else 1, self.count if b else 1


@dataclass(frozen=True)
class LoraSettings:
    """Of one adapter, checked."""

    # By full module path.
    ranks: PatternTable[int]
    alphas: PatternTable[float]
    rank_stabilised: bool
    variant: Variant | None
    # Whether B has a bias.
    bias: bool
    # QALoRA's group size; None without it.
    group: int | None
    blocks: BlockPatterns | None

    @classmethod
    def of(cls, config: Config) -> LoraSettings:
        """Raises InvalidAdapterError."""
        _check_bias(config)
        _check_init(config)
        variant = _variant(config)
        bias = flag("lora_bias", config.get("lora_bias"))
        group = _group(config)
        if group is not None and variant is not None:
            raise _cannot_combine(("use_qalora", variant))
        if bias and (group is not None or variant is Variant.DORA):
            raise _cannot_combine(("lora_bias", "use_dora" if group is None else "use_qalora"))
        return cls(
            rank_table(config),
            alpha_table("lora_alpha", config),
            flag("use_rslora", config.get("use_rslora")),
            variant,
            bias,
            group,
            _block_patterns(config) if variant is Variant.BD_LORA else None,
        )

    def scale(self, module: str) -> float:
        rank = self.ranks[module]
        return self.alphas[module] / (math.sqrt(rank) if self.rank_stabilised else rank)


def invocation_tokens(config: Config) -> tuple[int, ...]:
    """Of aLoRA; PEFT takes an empty list for a plain LoRA. Raises InvalidAdapterError."""
    return tuple(token_ids(Variant.ALORA, config.get(Variant.ALORA)))


def _check_bias(config: Config) -> None:
    """The biases themselves are among the saved modules."""
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: bias is {reprlib.repr(config['bias'])}, but must be 'none', 'all' or "
            "'lora_only'."
        )


def _check_init(config: Config) -> None:
    init = config.get("init_lora_weights")
    if init is None or isinstance(init, bool):
        return
    name = init.lower() if isinstance(init, str) else ""
    if name in _PLAIN_INITS:
        return
    if name.startswith(_CONVERTED_INITS):
        why = (
            "which changes the base weights, so the adapter is wrong over the original base: save "
            "it again with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`, "
            "which turns it into a plain LoRA"
        )
    elif name == "loftq":
        why = (
            "which quantises the base weights anew, so the adapter is wrong over the original "
            "base: serve the base as LoftQ left it, and set init_lora_weights to true"
        )
    else:
        why = (
            "which is not known here, so whether it changes the base weights is not either: save "
            "it as a plain LoRA, with init_lora_weights true"
        )
    raise InvalidAdapterError(f"{CONFIG_FILE}: init_lora_weights is {reprlib.repr(init)}, {why}.")


def _variant(config: Config) -> Variant | None:
    """Raises InvalidAdapterError for several: PEFT has no layer for them."""
    init = config.get("init_lora_weights")
    on = {
        Variant.DORA: flag("use_dora", config.get("use_dora")),
        Variant.ALORA: bool(invocation_tokens(config)),
        Variant.MICA: isinstance(init, str) and init.lower() == "mica",
    }
    for variant in (Variant.BD_LORA, Variant.KASA, Variant.VELORA, Variant.MONTECLORA):
        mapping(variant, config.get(variant))
        # An empty object is a variant with its defaults.
        on[variant] = config.get(variant) is not None
    variants = [variant for variant, is_on in on.items() if is_on]
    if len(variants) > 1:
        raise _cannot_combine(variants)
    return variants[0] if variants else None


def _group(config: Config) -> int | None:
    if not flag("use_qalora", config.get("use_qalora")):
        return None
    group = positive_int("qalora_group_size", config.get("qalora_group_size"))
    if group == 1:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: qalora_group_size is 1, so A looks like that of a plain LoRA, and "
            "whether inputs were pooled is not certain: train without use_qalora."
        )
    return group


def _block_patterns(config: Config) -> BlockPatterns:
    options = mapping("use_bdlora", config["use_bdlora"])
    known = {"target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict"}
    for key in options.keys() - known:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: use_bdlora has the key {key[:80]!r}, which is not known here, so what "
            "it does to the weights is not either: remove it if it is about training only."
        )
    return BlockPatterns(
        _name_parts("target_modules_bd_a", options),
        _name_parts("target_modules_bd_b", options),
        positive_int("nblocks", options.get("nblocks", 1)),
        flag("match_strict", options.get("match_strict", True)),
    )


def _name_parts(field: str, options: Config) -> tuple[str, ...]:
    parts = strings(field, options.get(field))
    if len(parts) > _MAX_NAME_PARTS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {field} of use_bdlora has {len(parts)} parts of names, more than "
            f"{_MAX_NAME_PARTS}: write those that modules have in common."
        )
    return tuple(parts)


def _cannot_combine(keys: tuple[str, ...] | list[Variant]) -> InvalidAdapterError:
    return InvalidAdapterError(
        f"{CONFIG_FILE}: {' and '.join(keys)} are both on, which PEFT itself cannot compute: take "
        "the config of the training."
    )
