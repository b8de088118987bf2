from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import EMBEDDING, HEAD, BaseLayout
from polydelta.adapters_store.delta import Bias, NormWeight, Rows, TokenRows
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import saved_modules
from polydelta.adapters_store.formats.outline import ModuleOutline

PREFIX = "base_model.model."
K0 = "model.layers.0.self_attn.k_proj"
NORM = "model.layers.2.input_layernorm"


@pytest.fixture
def layout(
    biased_model: LlamaForCausalLM, layout_of: Callable[[LlamaForCausalLM], BaseLayout]
) -> BaseLayout:
    return layout_of(biased_model)


SAVED_NAMES = {
    "modules_to_save": f"{PREFIX}{K0}.weight",
    "a bias": f"{PREFIX}{K0}.bias",
    "a trained bias of an adapted layer": f"{PREFIX}{K0}.base_layer.bias",
    "an adapted embedding": f"{PREFIX}{EMBEDDING}.base_layer.weight",
    "an embedding with trained tokens": f"{PREFIX}{EMBEDDING}.token_adapter.base_layer.weight",
    "the head": f"{PREFIX}{HEAD}.weight",
    "the last norm": f"{PREFIX}model.norm.weight",
    "a norm within attention": f"{PREFIX}model.layers.0.self_attn.q_norm.weight",
    "a module beside a prompt": "base_model.model.layers.0.mlp.up_proj.weight",
    "the head beside a prompt": "base_model.lm_head.weight",
    "the last norm beside a prompt": "base_model.model.norm.weight",
}
OTHER_NAMES = {
    "LoRA": f"{PREFIX}{K0}.lora_A.weight",
    "LoRA's bias": f"{PREFIX}{K0}.lora_B.bias",
    "OFT": f"{PREFIX}{K0}.oft_R.weight",
    "a tuned norm": f"{PREFIX}{NORM}.ln_tuning_layers.weight",
    "trained tokens": f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta",
    "a prompt": "prompt_embeddings",
    "a classifier": f"{PREFIX}score.weight",
    "no prefix": f"{K0}.weight",
    "a saved module without itself": f"{PREFIX}{HEAD}.modules_to_save.weight",
}


@pytest.mark.parametrize("name", SAVED_NAMES.values(), ids=SAVED_NAMES.keys())
def test_tensors_that_are_called_as_the_bases_are_taken_out(name: str) -> None:
    assert saved_modules.take_out({name: 1}) == ({name: 1}, {})


@pytest.mark.parametrize("name", OTHER_NAMES.values(), ids=OTHER_NAMES.keys())
def test_tensors_of_tuners_are_left_to_them(name: str) -> None:
    assert saved_modules.take_out({name: 1}) == ({}, {name: 1})


@pytest.mark.parametrize(
    "name",
    [
        f"{PREFIX}{HEAD}.original_module.weight",
        f"{PREFIX}{HEAD}.modules_to_save.weight",
        f"{PREFIX}{HEAD}.modules_to_save.mine.weight",
    ],
)
def test_what_peft_saves_twice_is_read_once(name: str) -> None:
    saved = {f"{PREFIX}{HEAD}.weight": 1}
    assert saved_modules.take_out(saved | {name: 2}) == (saved, {})


def read(layout: BaseLayout, tensors: dict[str, Tensor], **config: Any) -> dict[str, Any]:
    named = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    return saved_modules.read(config, named, layout)


def test_only_rows_that_differ_are_kept_of_a_linear_layer(layout: BaseLayout) -> None:
    weight = layout.weight(K0).clone()
    weight[[2, 11]] += torch.randn(2, 36)
    ((rows,),) = read(layout, {f"{K0}.weight": weight}).values()
    assert isinstance(rows, Rows)
    assert (rows.indices.tolist(), rows.indices.dtype) == ([2, 11], torch.int32)
    torch.testing.assert_close(layout.weight(K0) + rows.dense(), weight)


def test_only_rows_that_differ_are_kept_of_the_embedding_and_of_the_head(
    layout: BaseLayout,
) -> None:
    embedding, head = layout.weight(EMBEDDING).clone(), layout.weight(HEAD) + 1
    embedding[[39, 4]] = torch.randn(2, 36)
    tensors = {f"{EMBEDDING}.base_layer.weight": embedding, f"{HEAD}.weight": head.double()}
    deltas = read(layout, tensors)
    ((of_embedding,), (of_head,)) = deltas[EMBEDDING], deltas[HEAD]
    assert isinstance(of_embedding, TokenRows)
    assert isinstance(of_head, TokenRows)
    assert (of_embedding.ids.tolist(), of_embedding.ids.dtype) == ([4, 39], torch.int64)
    torch.testing.assert_close(of_embedding.rows, embedding[[4, 39]], atol=0, rtol=0)
    assert of_head.ids.tolist() == list(range(40))
    assert of_head.rows.dtype == torch.float32


def test_a_bias_is_replaced_by_the_difference(layout: BaseLayout) -> None:
    bias = torch.randn(12)
    ((delta,),) = read(layout, {f"{K0}.base_layer.bias": bias}).values()
    assert isinstance(delta, Bias)
    own = layout.bias(K0)
    assert own is not None
    torch.testing.assert_close(own + delta.vector, bias)


def test_a_linear_layer_may_have_both_weight_and_bias_replaced(layout: BaseLayout) -> None:
    tensors = {f"{K0}.weight": torch.randn(12, 36), f"{K0}.bias": torch.randn(12)}
    (deltas,) = read(layout, tensors).values()
    assert [delta.kind for delta in deltas] == ["Rows", "Bias"]


def test_a_norm_is_replaced_as_it_is(layout: BaseLayout) -> None:
    ((delta,),) = read(layout, {f"{NORM}.weight": torch.full((36,), 3.0).bfloat16()}).values()
    assert isinstance(delta, NormWeight)
    assert delta.weight.tolist() == [3.0] * 36


def test_what_is_the_bases_own_gives_nothing(layout: BaseLayout) -> None:
    bias = layout.bias(K0)
    assert bias is not None
    own = {
        f"{EMBEDDING}.weight": layout.weight(EMBEDDING),
        f"{HEAD}.base_layer.weight": layout.weight(HEAD),
        f"{K0}.weight": layout.weight(K0),
        f"{K0}.bias": bias,
    }
    assert read(layout, own) == {}


@dataclass(frozen=True)
class Rounded:
    """Weights as they are where the base is served in another dtype than the checkpoint's."""

    layout: BaseLayout
    dtype: torch.dtype

    def read(self, name: str) -> Tensor:
        assert self.layout.weights is not None
        return self.layout.weights.read(name).to(self.dtype).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_that_is_served_in_fewer_bits_is_still_the_same(
    dtype: torch.dtype, layout: BaseLayout
) -> None:
    served = dataclasses.replace(layout, weights=Rounded(layout, dtype))
    weight = layout.weight(EMBEDDING).clone()
    assert not weight.equal(served.weight(EMBEDDING))
    assert read(served, {f"{EMBEDDING}.weight": weight}) == {}
    weight[5] += 1
    ((delta,),) = read(served, {f"{EMBEDDING}.weight": weight}).values()
    assert delta.ids.tolist() == [5]


def test_unused_tokens_say_nothing_about_the_bases_dtype(layout: BaseLayout) -> None:
    weight = layout.weight(EMBEDDING).clone()
    weight[7] = 0

    class Zeroed:
        def read(self, name: str) -> Tensor:
            return weight.bfloat16().float()

    served = dataclasses.replace(layout, weights=Zeroed())
    assert read(served, {f"{EMBEDDING}.weight": weight}) == {}


WRONG: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "a larger vocabulary": (
        {f"{EMBEDDING}.weight": torch.ones(44, 36)},
        {},
        "has rows for 44 tokens, but the base model has 40: resize the base's embeddings",
    ),
    "a head of another hidden size": (
        {f"{HEAD}.weight": torch.ones(40, 35)},
        {},
        r"shape \[40, 35\], but the base model's embedding asks for \[40, 36\]",
    ),
    "a scalar": ({f"{HEAD}.weight": torch.ones(())}, {}, r"shape \[\], but the base"),
    "a linear layer of another size": (
        {f"{K0}.weight": torch.ones(36, 12)},
        {},
        r"shape \[36, 12\], but the base model's layer asks for \[12, 36\]",
    ),
    "a norm of another size": (
        {f"{NORM}.weight": torch.ones(1)},
        {},
        r"shape \[1\], but the base model's norm asks for \[36\]",
    ),
    "a bias of another size": (
        {f"{K0}.bias": torch.ones(36)},
        {},
        r"shape \[36\], but the base model's bias asks for \[12\]",
    ),
    "NaN": ({f"{NORM}.weight": torch.full((36,), torch.nan)}, {}, "has NaN or infinite"),
    "integers": ({f"{K0}.weight": torch.ones(12, 36, dtype=torch.int8)}, {}, "is torch.int8"),
    "a layer too many": (
        {"model.layers.3.mlp.up_proj.weight": torch.ones(52, 36), f"{K0}.bias": torch.ones(12)},
        {},
        "replaces 'model.layers.3.mlp.up_proj', but the base model has no such module in its 3",
    ),
    "one module twice": (
        {f"{K0}.weight": torch.ones(12, 36), f"{K0}.base_layer.weight": torch.ones(12, 36)},
        {},
        "has the weight of '.*k_proj' twice, as '.*k_proj.weight' and '.*base_layer.weight'",
    ),
    "a module of the config that is not there": (
        {"model.norm.weight": torch.ones(36)},
        {"modules_to_save": ["norm", "lm_head"]},
        r"modules_to_save is \['norm', 'lm_head'\], but .* no weight of 'lm_head'",
    ),
    "a block that is not there whole": (
        {"model.layers.1.mlp.up_proj.weight": torch.ones(52, 36)},
        {"modules_to_save": ["layers.1.mlp"]},
        "no weight of 'model.layers.1.mlp.gate_proj'",
    ),
    "one name for a list": ({}, {"modules_to_save": "lm_head"}, "must be a list of strings"),
}


@pytest.mark.parametrize(("tensors", "config", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_replace_the_bases_is_refused_by_name(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, tensors, **config)


def test_a_bias_that_the_base_does_not_have_is_refused(
    base_model: LlamaForCausalLM, layout_of: Callable[[LlamaForCausalLM], BaseLayout]
) -> None:
    with pytest.raises(InvalidAdapterError, match="the base model has none there"):
        read(layout_of(base_model), {f"{K0}.bias": torch.ones(12)})


def test_modules_to_save_that_no_base_has_are_of_no_account(layout: BaseLayout) -> None:
    deltas = read(layout, {f"{NORM}.weight": torch.ones(36)}, modules_to_save=["classifier"])
    assert deltas.keys() == {NORM}


def test_an_outline_says_what_may_differ() -> None:
    shapes = {
        f"{PREFIX}{EMBEDDING}.base_layer.weight": (40, 36),
        f"{PREFIX}{NORM}.weight": (36,),
        f"{PREFIX}{K0}.weight": (12, 36),
        f"{PREFIX}{K0}.bias": (12,),
    }
    assert saved_modules.outline(shapes) == {
        EMBEDDING: ModuleOutline("TokenRows", 0),
        NORM: ModuleOutline("NormWeight", 0),
        K0: ModuleOutline("Rows", 0, ("Bias",)),
    }


@pytest.mark.parametrize("module", [NORM, HEAD, EMBEDDING])
def test_a_bias_where_no_base_has_one_is_refused_without_a_base(module: str) -> None:
    with pytest.raises(InvalidAdapterError, match=f"has a bias of '{module}', but norms"):
        saved_modules.outline({f"{PREFIX}{module}.bias": (36,)})


def test_the_base_beneath_has_no_weight_of_a_replaced_module(layout: BaseLayout) -> None:
    beneath = saved_modules.layout_beneath(layout, {HEAD})
    assert beneath.weight(EMBEDDING).equal(layout.weight(EMBEDDING))
    assert beneath.module_shapes == layout.module_shapes
    with pytest.raises(InvalidAdapterError, match="replaces the weight of 'lm_head'"):
        beneath.weight(HEAD)
