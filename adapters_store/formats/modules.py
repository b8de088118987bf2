"""What an adapter's file says of each module.

It has the tensors of its format, and may have, whatever that is, whole modules that replace the
base's and rows of trained tokens. Each reads its own, and the deltas of a module are put together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Delta, Invocation, NormWeight, Rows, TokenRows
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import saved_modules, trainable_tokens
from polydelta.adapters_store.formats.files import Shape
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.peft_config import Config
from polydelta.adapters_store.formats.registry import Format, format_of
from polydelta.adapters_store.reference import WEIGHTS_FILE

# Full module path -> its deltas.
Modules = dict[str, tuple[Delta, ...]]


def outline_adapter(
    config: Config, shapes: Mapping[str, Shape]
) -> tuple[str, dict[str, ModuleOutline]]:
    """The format's name, and what each module gets, from the config and the tensors' shapes alone.

    Raises InvalidAdapterError for all that is wrong whatever the base.
    """
    name, parser = format_of(config)
    saved, rest = saved_modules.take_out(shapes)
    tokens, own = trainable_tokens.take_out(rest)
    modules: dict[str, ModuleOutline] = {}
    for outline in (
        parser.outline(config, own),
        trainable_tokens.outline_beside(config, tokens),
        saved_modules.outline(saved),
    ):
        for module, one in outline.items():
            first = modules.get(module)
            modules[module] = (
                one if first is None else replace(first, also=(*first.also, *one.kinds))
            )
    _check_any(modules)
    return name, modules


def read_modules(
    parser: Format, config: Config, tensors: Mapping[str, Tensor], layout: BaseLayout
) -> Modules:
    """Full module path -> its deltas, in float32, checked against the base.

    Raises InvalidAdapterError, also when there are none.
    """
    saved, rest = saved_modules.take_out(tensors)
    tokens, own = trainable_tokens.take_out(rest)
    beneath = _join(
        saved_modules.read(config, saved, layout),
        trainable_tokens.read_beside(config, tokens, layout),
    )
    replaced = {module for module, deltas in beneath.items() if any(map(_is_weight, deltas))}
    on_top = parser.read(config, own, saved_modules.layout_beneath(layout, replaced))
    _check_pair(beneath, on_top)
    modules = _join(beneath, on_top)
    _check_any(modules)
    return modules


def _is_weight(delta: Delta) -> bool:
    return isinstance(delta, TokenRows | Rows | NormWeight)


def _check_any(modules: Mapping[str, object]) -> None:
    if not modules:
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} changes no module, so it would give the base model's answers: "
            "save the adapter again from the trained model."
        )


def _check_pair(beneath: Modules, on_top: Modules) -> None:
    """Raises InvalidAdapterError for saved modules and deltas that do not add up."""
    for module in beneath.keys() & on_top.keys():
        if any(isinstance(delta, Rows | NormWeight) for delta in beneath[module]):
            raise InvalidAdapterError(
                f"{WEIGHTS_FILE} both replaces the weight of {module!r} and changes the module, "
                "which PEFT does not write: save the adapter again from the trained model."
            )
    if beneath and any(isinstance(delta, Invocation) for delta in on_top.get(MODEL, ())):
        raise InvalidAdapterError(
            f"{WEIGHTS_FILE} replaces {next(iter(beneath))!r} for all tokens, while activated LoRA "
            "acts on some: train without modules_to_save, trainable_token_indices and bias, or "
            "without alora_invocation_tokens."
        )


def _join(beneath: Modules, on_top: Modules) -> Modules:
    joined: Modules = {}
    for module in {**beneath, **on_top}:
        deltas = (*beneath.get(module, ()), *on_top.get(module, ()))
        rows = [delta for delta in deltas if isinstance(delta, TokenRows)]
        others = tuple(delta for delta in deltas if not isinstance(delta, TokenRows))
        joined[module] = (reduce(_override, rows), *others) if rows else others
    return joined


def _override(beneath: TokenRows, on_top: TokenRows) -> TokenRows:
    kept = ~torch.isin(beneath.ids, on_top.ids)
    ids, order = torch.cat((beneath.ids[kept], on_top.ids)).sort()
    return TokenRows(ids, torch.cat((beneath.rows[kept], on_top.rows))[order])
