from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Columns
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.registry import format_of
from polydelta.adapters_store.merged_weight import merge_into

PREFIX = "base_model.model."
SHAPES = {
    "model.layers.0.self_attn.k_proj": (12, 36),
    "model.layers.2.mlp.down_proj": (36, 52),
    "lm_head": (40, 36),
}
RANK, ALPHA = 3, 8
CONFIG = {"peft_type": "PACA", "r": RANK, "paca_alpha": ALPHA, "bias": "none"}
LayoutOf = Callable[[LlamaForCausalLM], BaseLayout]


def paca_tensors(
    columns: str = "paca_w", dtype: torch.dtype = torch.int64, **changed: Tensor
) -> dict[str, Tensor]:
    torch.manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for module, (out_features, in_features) in SHAPES.items():
        parts = {
            columns: torch.randn(out_features, RANK),
            "paca_indices": torch.randperm(in_features)[:RANK].to(dtype),
        }
        tensors |= {f"{PREFIX}{module}.{name}": part for name, part in (parts | changed).items()}
    return tensors


def read(config: dict[str, Any], tensors: dict[str, Tensor], layout: BaseLayout) -> dict[str, Any]:
    _, parser = format_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    outline = parser.outline(config, shapes)
    deltas = parser.read(config, tensors, layout)
    assert outline.keys() == deltas.keys()
    assert all((part.kind, part.rank) == (Columns.kind, 0) for part in outline.values())
    return dict(deltas)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_columns_of_the_fork_take_the_place_of_the_base_s(
    dtype: torch.dtype, biased_model: LlamaForCausalLM, layout_of: LayoutOf
) -> None:
    layout, tensors = layout_of(biased_model), paca_tensors(dtype=dtype)
    for module, deltas in read(CONFIG, tensors, layout).items():
        base = biased_model.get_submodule(module)
        weight = base.weight.detach().clone()
        for place, column in zip(
            tensors[f"{PREFIX}{module}.paca_indices"].tolist(),
            tensors[f"{PREFIX}{module}.paca_w"].T,
            strict=True,
        ):
            weight[:, place] = column * ALPHA / RANK
        x = torch.randn(5, weight.shape[1])
        merged, bias = merge_into(layout.weight(module), layout.bias(module), deltas)
        got = torch.nn.functional.linear(x, merged, bias)
        want = torch.nn.functional.linear(x, weight, base.bias)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_columns_of_peft_s_own_are_added_to_the_base_s(layout: BaseLayout) -> None:
    tensors = paca_tensors("paca_delta")
    config = CONFIG | {"random_seed": 1, "init_weights": True}
    for module, (delta,) in read(config, tensors, layout).items():
        places = tensors[f"{PREFIX}{module}.paca_indices"]
        want = torch.zeros(SHAPES[module]).index_copy(
            1, places, tensors[f"{PREFIX}{module}.paca_delta"] * (ALPHA / RANK)
        )
        torch.testing.assert_close(delta.dense(), want)


def test_indices_come_out_ascending(layout: BaseLayout) -> None:
    indices = torch.tensor([30, 2, 17])
    for (delta,) in read(CONFIG, paca_tensors("paca_delta", paca_indices=indices), layout).values():
        assert delta.indices.tolist() == [2, 17, 30]
        assert delta.indices.dtype == torch.int32


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "another rank": ({"r": 4}, {}, "but r = 4 in adapter_config.json asks for"),
    "a rank beyond floats": ({"r": 10**400}, {}, "r is 1000.* below 2147483648"),
    "no scale": ({"paca_alpha": None}, {}, "paca_alpha is None"),
    "ranks of some modules": ({"rank_pattern": {"k_proj": 2}}, {}, "rank_pattern is"),
    "scales of some modules": ({"alpha_pattern": {"k_proj": 2}}, {}, "alpha_pattern is"),
    "another number of layers": ({"layer_replication": [[0, 2]]}, {}, "layer_replication is"),
    "Megatron": ({"megatron_config": {"a": 1}}, {}, "megatron_config is"),
    "a column twice": ({}, {"paca_indices": torch.tensor([5, 1, 5])}, "twice"),
    "a column too many": ({}, {"paca_indices": torch.tensor([5, 1, 36])}, "outside"),
    "a negative column": ({}, {"paca_indices": torch.tensor([5, -1, 3])}, "outside"),
    "columns that are no integers": ({}, {"paca_indices": torch.ones(3)}, "must be integers"),
    "fewer columns than indices": ({}, {"paca_w": torch.ones(12, 2)}, "but r = 3"),
    "columns of another layer": ({}, {"paca_w": torch.ones(13, 3)}, "base model's layer asks"),
    "infinite columns": ({}, {"paca_w": torch.full((12, 3), torch.inf)}, "has NaN or infinite"),
    "both kinds of columns": ({}, {"paca_delta": torch.ones(12, 3)}, "paca_w or paca_delta, and"),
}


@pytest.mark.parametrize(("option", "changed", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_is_refused_by_name(
    option: dict[str, Any],
    changed: dict[str, Tensor],
    message: str,
    base_model: LlamaForCausalLM,
    layout_of: LayoutOf,
) -> None:
    k0 = f"{PREFIX}model.layers.0.self_attn.k_proj"
    tensors = {name: tensor for name, tensor in paca_tensors().items() if name.startswith(k0)}
    tensors |= {f"{k0}.{parameter}": tensor for parameter, tensor in changed.items()}
    with pytest.raises(InvalidAdapterError, match=message):
        read(CONFIG | option, tensors, layout_of(base_model))


@pytest.mark.parametrize("missing", ["paca_w", "paca_indices"])
def test_indices_and_columns_must_come_together(missing: str, layout: BaseLayout) -> None:
    tensors = {name: tensor for name, tensor in paca_tensors().items() if missing not in name}
    with pytest.raises(InvalidAdapterError, match=missing):
        read(CONFIG, tensors, layout)


def test_the_embedding_is_no_linear_layer(layout: BaseLayout) -> None:
    name = f"{PREFIX}model.embed_tokens"
    tensors = {
        f"{name}.paca_delta": torch.ones(36, RANK),
        f"{name}.paca_indices": torch.arange(RANK),
    }
    with pytest.raises(InvalidAdapterError, match=r"model\.embed_tokens"):
        read(CONFIG, tensors, layout)
