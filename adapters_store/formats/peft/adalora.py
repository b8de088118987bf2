"""PEFT's AdaLoRA (arXiv:2303.10512): a LoRA in the form of a singular value decomposition, whose
rank was cut module by module while it was trained.

`y += alpha / (init_r + 1e-5) * B (E * (A x))`: PEFT keeps the scale of the rank before the cut. An
alpha of 0 or less stands for the rank after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    MERGE_INSTEAD,
    Config,
    key_rules,
    mapping,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_options import linear_layers
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_A, _B, _E = "lora_A", "lora_B", "lora_E"
_EPSILON = 1e-5


@dataclass(frozen=True)
class _Settings:
    init_rank: int
    alpha: float
    # Module -> its rank after the cut; others have the one they began with.
    ranks: Mapping[str, int]

    def rank(self, module: str) -> int:
        return self.ranks.get(module, self.init_rank)

    def scale(self, module: str) -> float:
        alpha = self.alpha if self.alpha > 0 else self.rank(module)
        return alpha / (self.init_rank + _EPSILON)


def _settings(config: Config) -> _Settings:
    init_rank = positive_int("init_r", config.get("init_r"))
    masks = mapping("rank_pattern", config.get("rank_pattern"))
    ranks: dict[str, int] = {}
    for name, mask in masks.items():
        module, dot, parameter = name.rpartition(".")
        is_mask = isinstance(mask, list) and all(isinstance(kept, bool) for kept in mask)
        if not is_mask or len(mask) != init_rank or f"{dot}{parameter}" != f".{_E}":
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: rank_pattern[{name[:80]!r}] must be of a module's {_E} and have "
                f"{init_rank} truth values (init_r): save the adapter again from the trained model."
            )
        ranks[module] = sum(mask)
    return _Settings(init_rank, number("lora_alpha", config.get("lora_alpha")), ranks)


def _outline(settings: _Settings, shapes: ModuleShapes) -> ModuleOutline:
    rank = settings.rank(shapes.module)
    why = f"rank {rank} (init_r and rank_pattern in {CONFIG_FILE})"
    shapes.check_factors(_A, _B, rank, why)
    shapes.check(_E, (rank, 1), why)
    return ModuleOutline(LowRank.kind, rank)


def _read(settings: _Settings, tensors: ModuleTensors) -> tuple[LowRank, ...]:
    rank = settings.rank(tensors.module)
    tensors.check_factors(_A, _B, rank)
    if rank == 0:
        return ()
    scales = tensors[_E].T * settings.scale(tensors.module)
    return (LowRank(tensors[_A], tensors[_B] * scales),)


FORMAT = PeftFormat(
    rules=key_rules(
        honoured={"init_r", "lora_alpha", "rank_pattern"},
        harmless={
            # Of LoRA's config, which AdaLoRA's extends; its layers do not look at them.
            "alpha_pattern",
            "corda_config",
            "eva_config",
            "init_lora_weights",
            "lora_ga_config",
            "qalora_group_size",
            "r",
            "use_rslora",
            # Training, and how PEFT itself runs.
            "beta1",
            "beta2",
            "deltaT",
            "ensure_weight_tying",
            "lora_dropout",
            "megatron_core",
            "orth_reg_weight",
            "runtime_config",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
        },
        refused={
            "alora_invocation_tokens": "PEFT's AdaLoRA cannot be activated by tokens: remove it",
            "arrow_config": "PEFT's AdaLoRA cannot be routed: remove it",
            "kasa_config": "PEFT's AdaLoRA has no KaSA: remove it",
            "layer_replication": "it gives the base another number of layers: train without it",
            "loftq_config": "PEFT's AdaLoRA has no LoftQ: remove it",
            "lora_bias": "PEFT's AdaLoRA has no bias on B: remove it",
            "megatron_config": "adapters split for Megatron are not served: convert it to plain "
            "LoRA",
            "monteclora_config": "PEFT's AdaLoRA has no MonteCLoRA: remove it",
            "target_parameters": "AdaLoRA on bare parameters (fused experts) is not served: target "
            "linear layers with target_modules",
            "trainable_token_indices": "changed rows of the embedding are not served with AdaLoRA: "
            "train without trainable_token_indices",
            "use_bdlora": "PEFT's AdaLoRA has no block-diagonal form: remove it",
            "use_dora": f"PEFT's AdaLoRA has no DoRA: {MERGE_INSTEAD}",
            "use_qalora": "PEFT's AdaLoRA has no QALoRA: remove it",
            "velora_config": "PEFT's AdaLoRA has no VeLoRA: remove it",
        },
    ),
    parameters=Parameters((_A, _B, _E)),
    outline_module=_outline,
    read_module=_read,
    targets=linear_layers,
    settings=_settings,
)
