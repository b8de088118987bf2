from __future__ import annotations

import math
from typing import Any

import pytest
from peft import LoraConfig

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.lora_config import (
    KEY_RULES,
    LoraSettings,
    Variant,
    invocation_tokens,
)

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bare parameters": ({"target_parameters": ["experts.up"]}, "target_parameters is"),
    "replicated layers": ({"layer_replication": [[0, 4]]}, "layer_replication is"),
    "Arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config is .* load each of the adapters"),
    "Megatron": ({"megatron_config": {"tp": 2}}, "megatron_config is"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        KEY_RULES.check(CONFIG | config)


def test_every_refused_key_has_its_own_refusal_test() -> None:
    assert KEY_RULES.refused.keys() <= {key for config, _ in REFUSED.values() for key in config}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "is 'pissa_niter_16'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
    "OLoRA in other letters": ({"init_lora_weights": "OLoRA"}, "changes the base weights"),
    "CorDA": ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'"),
    "LoRA-GA": ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "'loftq', .* serve the base as LoftQ left it"),
    "a start that nobody knows": (
        {"init_lora_weights": ["new"]},
        r"init_lora_weights is \['new'\], which is not known here",
    ),
    "biases that nobody knows": ({"bias": "some"}, "bias is 'some', but must be 'none', 'all' or"),
    "a rank that is no integer": ({"r": "2"}, "r is '2'"),
    "no rank": ({"r": None}, "r is None"),
    "an alpha that is no number": ({"lora_alpha": "4"}, "lora_alpha is '4'"),
    "a scale that is no truth value": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    "a DoRA that is no truth value": ({"use_dora": 1}, "use_dora is 1"),
    "a rank pattern that is no object": ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
    "a pattern that is no regex": ({"alpha_pattern": {"(": 2}}, "alpha_pattern has the pattern"),
    "invocation by text": ({"alora_invocation_tokens": "go"}, "'go', but must be a list of token"),
    "negative tokens": ({"alora_invocation_tokens": [-1]}, "must be a list of token ids"),
    "a KaSA that is no object": ({"kasa_config": True}, "kasa_config is True"),
    "two variants": (
        {"use_dora": True, "use_bdlora": {"nblocks": 2}},
        "use_dora and use_bdlora are both on, which PEFT itself cannot compute",
    ),
    "MiCA and KaSA": (
        {"init_lora_weights": "mica", "kasa_config": {}},
        "init_lora_weights and kasa_config are both on",
    ),
    "DoRA with a bias on B": ({"use_dora": True, "lora_bias": True}, "lora_bias and use_dora"),
    "QALoRA with a bias on B": (
        {"use_qalora": True, "qalora_group_size": 2, "lora_bias": True},
        "lora_bias and use_qalora are both on",
    ),
    "QALoRA with DoRA": (
        {"use_qalora": True, "qalora_group_size": 2, "use_dora": True},
        "use_qalora and use_dora are both on",
    ),
    "QALoRA without a group size": ({"use_qalora": True}, "qalora_group_size is None"),
    "groups of one input": (
        {"use_qalora": True, "qalora_group_size": 1},
        "qalora_group_size is 1, so A looks like that of a plain LoRA",
    ),
    "an option of BD-LoRA that nobody knows": (
        {"use_bdlora": {"nblocks": 2, "order": "columns"}},
        "use_bdlora has the key 'order'",
    ),
    "no blocks": ({"use_bdlora": {"nblocks": 0}}, "nblocks is 0"),
    "one pattern for a list of them": (
        {"use_bdlora": {"target_modules_bd_a": "q_proj"}},
        "target_modules_bd_a is 'q_proj', but must be a list of strings",
    ),
}


@pytest.mark.parametrize(("config", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_value_is_refused_by_field_and_value(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        LoraSettings.of(CONFIG | config)


@pytest.mark.parametrize(
    "init", [None, True, False, "gaussian", "Gaussian", "eva", "orthogonal", "mica"]
)
def test_a_start_that_leaves_the_base_alone_is_accepted(init: object) -> None:
    settings = LoraSettings.of(CONFIG | {"init_lora_weights": init})
    assert settings.variant is (Variant.MICA if init == "mica" else None)


def test_what_peft_writes_by_default_is_a_plain_lora() -> None:
    config = LoraConfig(r=4, lora_alpha=6).to_dict()
    KEY_RULES.check(config)
    settings = LoraSettings.of(config)
    assert (settings.variant, settings.bias, settings.group, settings.blocks) == (
        None,
        False,
        None,
        None,
    )


@pytest.mark.parametrize(("stabilised", "root"), [(False, 4), (True, 2)])
def test_the_scale_is_alpha_by_the_rank_or_its_root(stabilised: bool, root: int) -> None:
    patterns = {"rank_pattern": {"up_proj": 9}, "alpha_pattern": {"up_proj": 18}}
    settings = LoraSettings.of(CONFIG | patterns | {"use_rslora": stabilised})
    assert settings.scale("model.layers.0.self_attn.q_proj") == 6 / root
    assert settings.scale("model.layers.0.mlp.up_proj") == 18 / (math.sqrt(9) if stabilised else 9)


def test_no_invocation_tokens_make_a_plain_lora_as_in_peft() -> None:
    config = CONFIG | {"alora_invocation_tokens": []}
    assert LoraSettings.of(config).variant is None
    assert invocation_tokens(config) == ()


def test_a_variant_may_have_its_defaults() -> None:
    assert LoraSettings.of(CONFIG | {"kasa_config": {}}).variant is Variant.KASA


@pytest.mark.parametrize(
    ("module", "counts"), [("a.o_proj", (3, 1)), ("a.q_proj", (1, 3)), ("a.up_proj", (1, 1))]
)
def test_patterns_say_which_matrix_lies_in_blocks(module: str, counts: tuple[int, int]) -> None:
    options = {
        "target_modules_bd_a": ["o_"],
        "target_modules_bd_b": ["q_"],
        "nblocks": 3,
        "match_strict": False,
    }
    blocks = LoraSettings.of(CONFIG | {"use_bdlora": options}).blocks
    assert blocks is not None
    assert blocks.counts(module) == counts


@pytest.mark.parametrize(("module", "which"), [("a.up_proj", "neither"), ("a.o_q_proj", "both")])
def test_patterns_that_do_not_decide_are_refused(module: str, which: str) -> None:
    options = {"target_modules_bd_a": ["o_"], "target_modules_bd_b": ["q_"], "nblocks": 3}
    blocks = LoraSettings.of(CONFIG | {"use_bdlora": options}).blocks
    assert blocks is not None
    with pytest.raises(InvalidAdapterError, match=f"use_bdlora names '{module}' in {which} of"):
        blocks.counts(module)
