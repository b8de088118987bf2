from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CPTConfig, PeftConfig, PeftModel, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import MODEL, BaseLayout
from polydelta.adapters_store.delta import Adapter, Prompt
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.outline import ModuleOutline
from polydelta.adapters_store.formats.registry import format_of
from polydelta.adapters_store.reference import AdapterRef

COUNT, HIDDEN = 5, 36

CONFIGS: dict[str, PeftConfig] = {
    "random": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT),
    "of the vocabulary": PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=COUNT, prompt_tuning_init="SAMPLE_VOCAB"
    ),
    "of an MLP": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=COUNT, encoder_hidden_size=7
    ),
    "of an LSTM": PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=COUNT,
        encoder_hidden_size=7,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=3,
        encoder_dropout=0.1,
    ),
    "of a context": CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[3, 8, 39, 0, 3],
        cpt_mask=[1, 1, 1, 1, 1],
        cpt_tokens_type_mask=[1, 2, 3, 4, 5],
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.9,
        opt_projection_epsilon=0.2,
    ),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def made(
    request: pytest.FixtureRequest,
    make_peft: Callable[..., PeftModel],
    base_model: LlamaForCausalLM,
    layout: BaseLayout,
    tmp_path: Path,
) -> tuple[PeftModel, Adapter]:
    peft = make_peft(request.param, base_model, std=0.7)
    return peft, read_adapter(AdapterRef("adapter", 1, tmp_path / "adapter"), layout)


def prompt_of(adapter: Adapter) -> Tensor:
    ((module, (delta,)),) = adapter.modules.items()
    assert module == MODEL
    assert isinstance(delta, Prompt)
    return delta.embeddings


def test_embeddings_are_those_that_peft_puts_before_the_sequence(
    made: tuple[PeftModel, Adapter],
) -> None:
    peft, adapter = made
    with torch.no_grad():
        (want,) = peft.get_prompt(batch_size=1)
    torch.testing.assert_close(prompt_of(adapter), want, rtol=0, atol=1e-6)


def test_a_model_with_the_embeddings_before_its_own_answers_as_peft_does(
    made: tuple[PeftModel, Adapter], base_model: LlamaForCausalLM
) -> None:
    peft, adapter = made
    ids = torch.tensor([[3, 17, 0, 39, 5, 5, 21]])
    base_model.eval()
    with torch.no_grad():
        own = base_model.get_input_embeddings()(ids)
        got = base_model(
            inputs_embeds=torch.cat((prompt_of(adapter).unsqueeze(0), own), dim=1),
            position_ids=torch.arange(COUNT + ids.shape[1]).unsqueeze(0),
        ).logits
        want = peft(input_ids=ids).logits
        plain = base_model(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (want[:, COUNT:] - plain).abs().max() > 0.001


TYPES = ["PROMPT_TUNING", "P_TUNING", "CPT"]
CONFIG: dict[str, Any] = {
    "num_virtual_tokens": COUNT,
    "token_dim": HIDDEN,
    "num_transformer_submodules": 1,
    "num_layers": 3,
    "num_attention_heads": 3,
}


def read(
    layout: BaseLayout, config: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> None:
    given = {"prompt_embeddings": torch.ones(COUNT, HIDDEN)} if tensors is None else tensors
    _, parser = format_of(CONFIG | config)
    parser.read(CONFIG | config, given, layout)


@pytest.mark.parametrize("peft_type", TYPES)
def test_its_outline_is_one_prompt_of_the_model(peft_type: str) -> None:
    config = CONFIG | {"peft_type": peft_type}
    _, parser = format_of(config)
    outline = parser.outline(config, {"prompt_embeddings": (COUNT, HIDDEN)})
    assert outline == {MODEL: ModuleOutline("Prompt", 0)}


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "an encoder and a decoder": ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
    "no number of tokens": ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
    "another number of tokens": ({"num_virtual_tokens": 6}, r"asks for \[6, 36\]"),
    "no size": ({"token_dim": None}, "token_dim is None"),
}


@pytest.mark.parametrize("peft_type", TYPES)
@pytest.mark.parametrize(
    ("option", "message"), REFUSED_OPTIONS.values(), ids=REFUSED_OPTIONS.keys()
)
def test_an_option_that_is_not_served_is_refused_by_name(
    option: dict[str, Any], message: str, peft_type: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, option | {"peft_type": peft_type})


def test_a_prompt_of_another_base_is_refused_by_name(layout: BaseLayout) -> None:
    wider = dataclasses.replace(layout, hidden_size=48)
    with pytest.raises(InvalidAdapterError, match="token_dim is 36, but the base model has 48"):
        read(wider, {"peft_type": "PROMPT_TUNING"})


WRONG_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "none": ({}, "has no prompt_embeddings"),
    "another one": (
        {"prompt_embeddings": torch.ones(COUNT, HIDDEN), "delta": torch.ones(1)},
        "'delta' cannot be served",
    ),
    "integers": ({"prompt_embeddings": torch.ones(COUNT, HIDDEN).int()}, "is torch.int32"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_wrong_tensors_are_refused_by_name(
    tensors: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read(layout, {"peft_type": "PROMPT_TUNING"}, tensors)
