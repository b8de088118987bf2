from __future__ import annotations

import json

import peft
import pytest

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.files import MAX_CONFIG_BYTES
from polydelta.adapters_store.formats.foreign import paca
from polydelta.adapters_store.formats.foreign.lora_options import lora_rules
from polydelta.adapters_store.formats.peft import adalora, lora_config
from polydelta.adapters_store.formats.peft_config import (
    KeyRules,
    flag,
    key_rules,
    mapping,
    number,
    parse_config,
    positive_int,
    strings,
    token_ids,
)

RULES = KeyRules(frozenset({"r"}), frozenset({"dropout"}), {"use_dora": "DoRA is not served yet"})


@pytest.mark.parametrize(
    "rules",
    [lora_config.KEY_RULES, adalora.FORMAT.rules, paca.FORMAT.rules, lora_rules()],
    ids=["LoRA", "AdaLoRA", "PaCA", "relatives of LoRA"],
)
def test_no_key_is_in_two_classes(rules: KeyRules) -> None:
    assert rules.refused
    classes = [rules.honoured, rules.harmless, rules.refused.keys()]
    assert sum(map(len, classes)) == len(set().union(*classes))


def test_common_keys_are_harmless_unless_a_format_reads_them() -> None:
    config = {"peft_type": "LORA", "bias": "all", "layers_to_transform": [0]}
    key_rules().check(config)
    rules = key_rules({"bias", "r"}, {"dropout"})
    assert rules.honoured == {"bias", "r"}
    assert "dropout" in rules.harmless
    assert "bias" not in rules.harmless


def test_honoured_and_harmless_keys_pass_with_any_value() -> None:
    RULES.check({"r": 3, "dropout": 0.5})


def test_a_refused_key_is_named_with_value_and_reason_when_it_is_on() -> None:
    with pytest.raises(InvalidAdapterError, match=r"use_dora is True; DoRA is not served yet"):
        RULES.check({"use_dora": True})


@pytest.mark.parametrize("off", [None, False, {}, []])
def test_refused_and_unknown_keys_that_are_switched_off_are_harmless(off: object) -> None:
    RULES.check({"use_dora": off, "option_of_a_newer_peft": off})


@pytest.mark.parametrize("on", [True, 0, 1.5, "", "x", {"a": 1}, [0]])
def test_an_unknown_key_with_a_value_is_refused_by_name(on: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"option_of_a_newer_peft is .*not known"):
        RULES.check({"option_of_a_newer_peft": on})


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidAdapterError) as error:
        RULES.check({"unknown": "x" * 10_000})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{'r': 1}", b'{"r": NaN}', b"\xff\xfe\x00", b"[" * 100_000, b"\x80\x04}q\x00."],
)
def test_a_config_that_is_no_json_is_an_error(content: bytes) -> None:
    with pytest.raises(InvalidAdapterError, match=r"adapter_config.json is not valid JSON"):
        parse_config(content)


@pytest.mark.parametrize("value", [[], None, 3, "text"])
def test_a_config_that_is_no_object_is_an_error(value: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"instead of an object"):
        parse_config(json.dumps(value).encode())


def test_peft_configs_stay_far_below_the_size_limit() -> None:
    config = peft.LoraConfig(
        target_modules=[f"model.layers.{n}.self_attn.q_proj" for n in range(200)]
    )
    content = json.dumps(config.to_dict(), default=list).encode()
    assert len(content) < MAX_CONFIG_BYTES / 50


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "8", None, [8]])
def test_what_is_no_positive_integer_is_refused_by_field_and_value(value: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"r is .*, but must be a whole number above 0"):
        positive_int("r", value)


@pytest.mark.parametrize("value", [None, True, "16", 10**400, float("inf"), float("nan"), []])
def test_what_is_no_finite_number_is_refused_by_field_and_value(value: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"lora_alpha is .*, but must be a finite number"):
        number("lora_alpha", value)


@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_what_is_no_truth_value_is_refused(value: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"use_rslora is .*, but must be true or false"):
        flag("use_rslora", value)


@pytest.mark.parametrize("value", [0, "q_proj", ["q_proj"]])
def test_what_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"rank_pattern is .*, but must be an object"):
        mapping("rank_pattern", value)


@pytest.mark.parametrize("value", [3, "norm", ["norm", 3], {"norm": 1}])
def test_what_is_no_list_of_strings_is_refused(value: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"modules_to_save is .* a list of strings"):
        strings("modules_to_save", value)


@pytest.mark.parametrize("value", [3, "3", ["3"], [3, -1], [True], [2.0]])
def test_what_is_no_list_of_token_ids_is_refused(value: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"token_indices is .* a list of token ids"):
        token_ids("token_indices", value)


def test_null_stands_for_false_and_for_what_is_empty() -> None:
    assert flag("use_rslora", None) is False
    assert mapping("rank_pattern", None) == {}
    assert strings("modules_to_save", None) == []
    assert token_ids("token_indices", None) == []
