from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftConfig, PeftModel, PrefixTuningConfig
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Adapter, Prefix
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.registry import format_of
from polydelta.adapters_store.reference import AdapterRef

COUNT, LAYERS, KV_HEADS, HEAD_DIM = 5, 3, 3, 8

CONFIGS: dict[str, PeftConfig] = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT),
    "projected prefix": PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=COUNT,
        prefix_projection=True,
        encoder_hidden_size=7,
    ),
    "cartridge": CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=COUNT, num_frozen_tokens=2
    ),
}


@pytest.fixture
def grouped_model() -> LlamaForCausalLM:
    """With several heads that have keys, and twice as many that ask."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=36,
            intermediate_size=52,
            num_hidden_layers=LAYERS,
            num_attention_heads=2 * KV_HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            vocab_size=40,
        )
    ).eval()


@pytest.fixture
def grouped_layout(layout: BaseLayout) -> BaseLayout:
    return dataclasses.replace(layout, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def made(
    request: pytest.FixtureRequest,
    make_peft: Callable[..., PeftModel],
    grouped_model: LlamaForCausalLM,
    grouped_layout: BaseLayout,
    tmp_path: Path,
) -> tuple[PeftModel, Adapter]:
    peft = make_peft(request.param, grouped_model, std=0.7)
    return peft, read_adapter(AdapterRef("adapter", 1, tmp_path / "adapter"), grouped_layout)


def prefix_of(adapter: Adapter) -> Tensor:
    ((module, (delta,)),) = adapter.modules.items()
    assert module == MODEL
    assert isinstance(delta, Prefix)
    return delta.keys_values


def test_keys_and_values_are_those_of_peft_s_cache(made: tuple[PeftModel, Adapter]) -> None:
    peft, adapter = made
    keys_values = prefix_of(adapter)
    assert keys_values.shape == (LAYERS, 2, COUNT, KV_HEADS, HEAD_DIM)
    assert (keys_values.dtype, keys_values.is_contiguous()) == (torch.float32, True)
    with torch.no_grad():
        cache = peft.get_prompt(batch_size=1)
    for layer, (keys, values) in zip(cache.layers, keys_values, strict=True):
        # [1, kv_heads, n, head_dim]
        torch.testing.assert_close(keys.transpose(0, 1), layer.keys[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(values.transpose(0, 1), layer.values[0], rtol=0, atol=1e-6)


def test_a_model_with_the_prefix_in_its_cache_answers_as_peft_does(
    made: tuple[PeftModel, Adapter], grouped_model: LlamaForCausalLM
) -> None:
    peft, adapter = made
    ids = torch.tensor([[3, 17, 0, 39, 5, 5, 21]])
    cache = DynamicCache()
    for layer, keys_values in enumerate(prefix_of(adapter)):
        keys, values = keys_values.transpose(1, 2).unsqueeze(1)
        cache.update(keys, values, layer)
    with torch.no_grad():
        want = peft(input_ids=ids).logits
        got = grouped_model(
            input_ids=ids,
            past_key_values=cache,
            position_ids=torch.arange(COUNT, COUNT + ids.shape[1]).unsqueeze(0),
        ).logits
        plain = grouped_model(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (want - plain).abs().max() > 0.01


CONFIG: dict[str, Any] = {
    "peft_type": "PREFIX_TUNING",
    "num_virtual_tokens": COUNT,
    "num_layers": LAYERS,
    "num_attention_heads": KV_HEADS,
    "token_dim": KV_HEADS * HEAD_DIM,
    "num_transformer_submodules": 1,
}
SIZE = 2 * LAYERS * KV_HEADS * HEAD_DIM


def read(
    layout: BaseLayout, config: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> None:
    given = {"prompt_embeddings": torch.ones(COUNT, SIZE)} if tensors is None else tensors
    _, parser = format_of(CONFIG | config)
    parser.read(CONFIG | config, given, layout)


def test_its_outline_is_one_prefix_of_the_model(grouped_layout: BaseLayout) -> None:
    _, parser = format_of(CONFIG)
    outline = parser.outline(CONFIG, {"prompt_embeddings": (COUNT, SIZE)})
    assert outline == {MODEL: ModuleOutline("Prefix", 0)}


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an encoder and a decoder": ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
    "no number of tokens": ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
    "another number of tokens": ({"num_virtual_tokens": 6}, r"asks for \[6, 144\]"),
    "other heads of the same size": ({"num_attention_heads": 4}, "is 4, but the base model has 3"),
}


@pytest.mark.parametrize("peft_type", ["PREFIX_TUNING", "CARTRIDGE"])
@pytest.mark.parametrize(
    ("option", "message"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS.keys()
)
def test_an_option_that_is_not_served_is_refused_by_name(
    option: dict[str, Any], message: str, peft_type: str, grouped_layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(grouped_layout, option | {"peft_type": peft_type})


@pytest.mark.parametrize(
    ("size", "field"),
    [
        ({"num_layers": LAYERS + 1}, "num_layers is 3, but the base model has 4"),
        ({"num_kv_heads": KV_HEADS + 1}, "num_attention_heads is 3, but the base model has 4"),
        ({"head_dim": HEAD_DIM * 2}, "token_dim is 24, but the base model has 48"),
    ],
)
def test_a_prefix_of_another_base_is_refused_by_name(
    size: dict[str, int], field: str, grouped_layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=field):
        read(dataclasses.replace(grouped_layout, **size), {})


WRONG_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "none": ({}, "has no prompt_embeddings"),
    "another one": (
        {"prompt_embeddings": torch.ones(COUNT, SIZE), "prefix_task_cols": torch.ones(1)},
        "'prefix_task_cols' cannot be served",
    ),
    "layers apart": (
        {"prompt_embeddings": torch.ones(COUNT, LAYERS, SIZE // LAYERS)},
        r"\[5, 3, 48\]",
    ),
    "integers": ({"prompt_embeddings": torch.ones(COUNT, SIZE).int()}, "is torch.int32"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_wrong_tensors_are_refused_by_name(
    tensors: dict[str, Tensor], message: str, grouped_layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(grouped_layout, {}, tensors)
