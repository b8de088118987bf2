"""PEFT's LoRA (arXiv:2106.09685), rank-stabilised LoRA (arXiv:2312.03732) and the variants that its
config switches on.

`y += scale * (B (A x) + bias)`, where scale is alpha / r, or alpha / sqrt(r) with `use_rslora`, and
both alpha and r may differ from module to module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, MODEL, BaseLayout
from polydelta.adapters_store.delta import Bias, Delta, Invocation, LowRank, Scale, Side
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft.lora_config import (
    KEY_RULES,
    LoraSettings,
    Variant,
    invocation_tokens,
)
from polydelta.adapters_store.formats.peft.lora_variants import (
    block_diagonal,
    dora_gains,
    ungroup,
    without_smallest,
)
from polydelta.adapters_store.formats.peft_config import MERGE_INSTEAD, Config
from polydelta.adapters_store.formats.peft_format import ModuleShapes, ModuleTensors, PeftFormat
from polydelta.adapters_store.formats.peft_tensors import Parameters
from polydelta.adapters_store.reference import CONFIG_FILE

_LINEAR = ("lora_A.weight", "lora_B.weight")
# The embedding is a linear layer over token ids: `[rank, vocab]` and `[hidden, rank]`.
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
# `[out]`, `[out]` and `[rank]`.
_BIAS, _MAGNITUDE, _DIAGONAL = "lora_B.bias", "lora_magnitude_vector", "lora_diag"
# What VeLoRA's backward pass and MonteCLoRA's samples are made of; answers are made without.
_TRAINING_ONLY = (
    "lora_velora_embed",
    "lora_monteclora_sampler.expert_weights",
    "lora_monteclora_sampler.expert_weights_prior",
    "lora_monteclora_sampler.gaussian_var_prior",
    "lora_monteclora_sampler.std_prior",
)
# Variants that PEFT has for an embedding.
_OF_EMBEDDINGS = (None, Variant.DORA, Variant.MICA)


def outline(config: Config, shapes: Mapping[str, Shape]) -> dict[str, ModuleOutline]:
    """What each module gets, from the config and the tensors' shapes alone.

    Raises InvalidAdapterError for all that is wrong whatever the base.
    """
    modules = _FORMAT.outline(config, shapes)
    if modules and invocation_tokens(config):
        modules[MODEL] = ModuleOutline(Invocation.kind, 0)
    return modules


def read(
    config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> dict[str, tuple[Delta, ...]]:
    """Module path -> its deltas, in float32, with the scale folded into B.

    Raises InvalidAdapterError.
    """
    modules = _FORMAT.read(config, tensors, layout)
    invocation = invocation_tokens(config)
    if modules and invocation:
        if max(invocation) >= layout.vocab_size:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: alora_invocation_tokens has the id {max(invocation)}, but the "
                f"base model has {layout.vocab_size} tokens, so the adapter would never act: load "
                "it over the base that it was trained on."
            )
        modules[MODEL] = (Invocation(invocation),)
    return modules


def _outline_module(settings: LoraSettings, shapes: ModuleShapes) -> ModuleOutline:
    module = shapes.module
    rank = settings.ranks[module]
    a, b = _names(module)
    optional = _optional(settings, module)
    shapes.need(a, b, *optional)
    _check_known(shapes, {a, b, *optional})
    why = f"rank {rank} (r and rank_pattern in {CONFIG_FILE})"
    in_blocks, out_blocks = _blocks(settings, module)
    if rank % (in_blocks * out_blocks):
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: the rank of {module[:200]!r} is {rank}, which use_bdlora's "
            f"{in_blocks * out_blocks} blocks do not divide: take the config of the training."
        )
    shapes.check(a, (rank, *shapes[a][-1:]), why)
    shapes.check(b, (*shapes[b][:1], rank // out_blocks), why)
    for parameter in optional:
        size = rank if parameter == _DIAGONAL else shapes[b][0]
        shapes.check(parameter, (size,), f"the module's {b}")
    also: tuple[str, ...] = ()
    if settings.variant is Variant.DORA:
        also = (Scale.kind,)
    elif _BIAS in optional:
        also = (Bias.kind,)
    return ModuleOutline(LowRank.kind, rank * 2 if _DIAGONAL in optional else rank, also)


def _read_module(settings: LoraSettings, tensors: ModuleTensors) -> tuple[Delta, ...]:
    module, scale = tensors.module, settings.scale(tensors.module)
    a, b = _factors(settings, tensors)
    b = b * scale
    if settings.variant is Variant.KASA:
        a, b = _with_correction(a, b * tensors[_DIAGONAL], tensors)
    if settings.variant is Variant.DORA:
        weight = tensors.weight()
        gains = dora_gains(tensors[_MAGNITUDE], weight.T if module == EMBEDDING else weight, b @ a)
        bias = tensors.bias()
        # PEFT leaves the base's bias as it is, and Scale multiplies it.
        kept = () if bias is None else (Bias((1 - gains) * bias),)
        return LowRank(a, b * gains.unsqueeze(1)), Scale(gains, Side.OUTPUT), *kept
    if _BIAS in tensors:
        return LowRank(a, b), Bias(tensors[_BIAS] * scale)
    return (LowRank(a, b),)


def _factors(settings: LoraSettings, tensors: ModuleTensors) -> tuple[Tensor, Tensor]:
    """A `[rank, in]` and B `[out, rank]` without the scale."""
    a_name, b_name = _names(tensors.module)
    rank = settings.ranks[tensors.module]
    in_blocks, out_blocks = _blocks(settings, tensors.module)
    # PEFT pools the inputs of GPTQ layers only, and has a plain A for all others.
    group = settings.group or 1
    if tensors.shapes[a_name][1] == tensors.in_features:
        group = 1
    for size, parts in (
        (tensors.in_features, in_blocks * group),
        (tensors.out_features, out_blocks),
    ):
        if size % parts:
            raise InvalidAdapterError(
                f"Module {tensors.module[:200]!r} is cut into {parts} equal parts by the config, "
                f"but the base model has {size} there: load it over the base that it was trained "
                "on."
            )
    tensors.check(a_name, (rank, tensors.in_features // in_blocks // group))
    tensors.check(b_name, (tensors.out_features, rank // out_blocks))
    a, b = tensors[a_name], tensors[b_name]
    a = ungroup(a, group) if group > 1 else block_diagonal(a, in_blocks)
    return a, block_diagonal(b, out_blocks)


def _with_correction(a: Tensor, b: Tensor, tensors: ModuleTensors) -> tuple[Tensor, Tensor]:
    rank = a.shape[0]
    if rank >= min(tensors.out_features, tensors.in_features):
        raise InvalidAdapterError(
            f"Module {tensors.module[:200]!r} has rank {rank}, but KaSA needs a lower one than the "
            f"base model's layer of shape {[tensors.out_features, tensors.in_features]} has: load "
            "it over the base that it was trained on."
        )
    a_lost, b_lost = without_smallest(tensors.weight(), rank)
    return torch.cat((a, a_lost)), torch.cat((b, b_lost), dim=1)


def _names(module: str) -> tuple[str, str]:
    """What A and B are called."""
    return _EMBEDDING if module == EMBEDDING else _LINEAR


def _optional(settings: LoraSettings, module: str) -> tuple[str, ...]:
    """What a module has besides A and B. Raises InvalidAdapterError for a variant that is not for
    the module."""
    variant = settings.variant
    if module == EMBEDDING and variant not in _OF_EMBEDDINGS:
        raise InvalidAdapterError(
            f"{CONFIG_FILE}: {variant} is on, which PEFT itself cannot compute for {module!r}: "
            "take the config of the training."
        )
    match variant:
        case Variant.DORA:
            return (_MAGNITUDE,)
        case Variant.KASA if module == HEAD:
            raise InvalidAdapterError(
                f"{CONFIG_FILE}: kasa_config is on, and changes the weights of {HEAD!r}, and those "
                f"of {EMBEDDING!r} where they are the same: {MERGE_INSTEAD}."
            )
    diagonal = (_DIAGONAL,) if variant is Variant.KASA else ()
    # PEFT's block-diagonal B has no bias.
    in_blocks = settings.blocks is not None and settings.blocks.is_b(module)
    has_bias = settings.bias and module != EMBEDDING and not in_blocks
    return (*diagonal, _BIAS) if has_bias else diagonal


def _blocks(settings: LoraSettings, module: str) -> tuple[int, int]:
    """In how many blocks A and B lie."""
    return (1, 1) if settings.blocks is None else settings.blocks.counts(module)


def _check_known(shapes: ModuleShapes, expected: set[str]) -> None:
    for parameter in _FORMAT.parameters.optional:
        if parameter in shapes and parameter not in expected:
            raise InvalidAdapterError(
                f"Module {shapes.module[:200]!r} has {parameter}, which the options in "
                f"{CONFIG_FILE} do not give it: the weights belong to another config; save the "
                "adapter again from the trained model."
            )


_FORMAT = PeftFormat(
    rules=KEY_RULES,
    parameters=Parameters(
        required=(),
        optional=(*_LINEAR, *_EMBEDDING, _BIAS, _MAGNITUDE, _DIAGONAL),
        ignored=_TRAINING_ONLY,
    ),
    outline_module=_outline_module,
    read_module=_read_module,
    settings=LoraSettings.of,
)
