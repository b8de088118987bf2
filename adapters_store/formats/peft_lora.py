"""PEFT's LoRA (arXiv:2106.09685), rank-stabilised LoRA (arXiv:2312.03732) included.

`y += scale * B (A x)`, where scale is alpha / r, or alpha / sqrt(r) with `use_rslora`, and both
alpha and r may differ from module to module.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Delta, LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape, to_float32
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import (
    COMMON_HARMLESS,
    COMMON_REFUSED,
    MERGE_INSTEAD,
    Config,
    KeyRules,
    flag,
    mapping,
    number,
    positive_int,
)
from polydelta.adapters_store.formats.peft_patterns import PatternTable
from polydelta.adapters_store.formats.peft_tensors import (
    check_modules,
    check_shape,
    group_by_module,
)
from polydelta.adapters_store.reference import CONFIG_FILE

KEY_RULES = KeyRules(
    honoured=frozenset(
        {
            "alpha_pattern",
            "bias",
            "init_lora_weights",
            "lora_alpha",
            "r",
            "rank_pattern",
            "use_rslora",
        }
    ),
    harmless=COMMON_HARMLESS
    | {
        # How weights were started; where that changed the base, `init_lora_weights` says so.
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        # Which modules were adapted; the tensors' names say it.
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        # Training, and how PEFT itself runs.
        "ensure_weight_tying",
        "lora_dropout",
        "megatron_core",
        "runtime_config",
        "velora_config",
        # Without effect unless `use_qalora`, which is refused.
        "qalora_group_size",
    },
    refused={
        **COMMON_REFUSED,
        "alora_invocation_tokens": (
            "activated LoRA, which acts from these tokens on, is not served yet: train a plain LoRA"
        ),
        "arrow_config": "Arrow routes between several adapters and is not served yet: load each "
        "adapter by itself",
        "kasa_config": f"KaSA changes the base weights and is not served yet: {MERGE_INSTEAD}",
        "layer_replication": "it gives the base another number of layers: train without it",
        "lora_bias": f"a bias on B is not served yet: {MERGE_INSTEAD}",
        "megatron_config": "adapters split for Megatron are not served: convert it to plain LoRA",
        "monteclora_config": f"MonteCLoRA is not served yet: {MERGE_INSTEAD}",
        "target_parameters": "LoRA on bare parameters (fused experts) is not served yet: target "
        "linear layers with target_modules",
        "trainable_token_indices": "changed rows of the embedding are not served yet: train "
        "without trainable_token_indices",
        "use_bdlora": f"block-diagonal LoRA is not served yet: {MERGE_INSTEAD}",
        "use_dora": f"DoRA is not served yet: {MERGE_INSTEAD}",
        "use_qalora": f"QALoRA is not served yet: {MERGE_INSTEAD}",
    },
)

# Ways to start training which leave the base weights as they are.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

_A, _B = "lora_A.weight", "lora_B.weight"
# VeLoRA's backward pass keeps its projection in the file; the forward pass has no use for it.
_TRAINING_ONLY = ("lora_velora_embed",)


@dataclass(frozen=True)
class _Scaling:
    """Rank, alpha and scale of each module, by its full path."""

    ranks: PatternTable[int]
    alphas: PatternTable[float]
    rank_stabilised: bool

    def scale(self, module: str) -> float:
        rank = self.ranks[module]
        return self.alphas[module] / (math.sqrt(rank) if self.rank_stabilised else rank)


def outline(config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """What each module gets, from the config and the tensors' shapes alone.

    Raises InvalidAdapterError for all that is wrong whatever the base.
    """
    scaling = _check_config(config)
    modules: dict[str, ModuleOutline] = {}
    for module, names in group_by_module(shapes, (_A, _B), _TRAINING_ONLY).items():
        a, b, rank = shapes[names[_A]], shapes[names[_B]], scaling.ranks[module]
        why = f"rank {rank} (r and rank_pattern in {CONFIG_FILE})"
        check_shape(names[_A], a, (rank, *a[-1:]), why)
        check_shape(names[_B], b, (*b[:1], rank), why)
        modules[module] = ModuleOutline(LowRank.kind, rank)
    return modules


def read(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    """Module path -> its delta, in float32, with the scale folded into B.

    Raises InvalidAdapterError.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_modules(outline(config, shapes), layout)
    scaling = _check_config(config)
    deltas: dict[str, tuple[Delta, ...]] = {}
    for module, names in group_by_module(tensors, (_A, _B), _TRAINING_ONLY).items():
        rank, (out_features, in_features) = scaling.ranks[module], layout.module_shapes[module]
        check_shape(names[_A], shapes[names[_A]], (rank, in_features), "the base model's layer")
        check_shape(names[_B], shapes[names[_B]], (out_features, rank), "the base model's layer")
        a, b = (to_float32(names[parameter], tensors[names[parameter]]) for parameter in (_A, _B))
        deltas[module] = (LowRank(a, _scaled(names[_B], b, scaling.scale(module))),)
    return deltas


def _scaled(name: str, b: Tensor, scale: float) -> Tensor:
    scaled = b * scale
    if not torch.isfinite(scaled).all():
        raise InvalidAdapterError(
            f"Tensor {name!r} times its scale of {scale:g} is more than float32 holds: check "
            f"lora_alpha and alpha_pattern in {CONFIG_FILE}."
        )
    return scaled


def _check_config(config: Config) -> _Scaling:
    KEY_RULES.check(config)
    if config.get("bias") not in (None, "none"):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: bias is {reprlib.repr(config['bias'])}; trained biases of the base "
            "are not served yet: train with bias='none'."
        )
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: init_lora_weights is {reprlib.repr(init)}, which changes the base "
            "weights, so the adapter is wrong over the original base: save it again with "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`, which turns it "
            "into a plain LoRA."
        )
    ranks = mapping("rank_pattern", config.get("rank_pattern"))
    alphas = mapping("alpha_pattern", config.get("alpha_pattern"))
    return _Scaling(
        PatternTable("rank_pattern", ranks, positive_int("r", config.get("r")), positive_int),
        PatternTable(
            "alpha_pattern", alphas, number("lora_alpha", config.get("lora_alpha")), number
        ),
        flag("use_rslora", config.get("use_rslora")),
    )
