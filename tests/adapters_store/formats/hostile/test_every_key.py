"""The keys of every config that PEFT writes, and what those do that all formats take alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import FORMATS
from polydelta.adapters_store.formats.modules import read_modules

OF_PEFT = sorted(FORMATS.keys() & PEFT_TYPE_TO_CONFIG_MAPPING.keys())


@pytest.mark.parametrize("name", OF_PEFT)
def test_every_key_of_peft_has_its_rule(name: str) -> None:
    for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[name]):
        # On, and for most keys no sound value: it is refused, but not for being unknown.
        with pytest.raises(InvalidAdapterError) as error:
            FORMATS[name].outline({"peft_type": name, field.name: "on"}, {"magic": ()})
        assert "this option is not known here" not in str(error.value)


def test_whether_the_base_is_transposed_changes_nothing_over_linear_layers(
    sound_adapters: Mapping[str, Any],
    hostile_model: LlamaForCausalLM,
    hostile_layout: BaseLayout,
    write: Callable[..., Path],
) -> None:
    tokens, tried = torch.tensor([[5, 30, 7, 7, 21]]), 0
    for name, sound in sound_adapters.items():
        transposed = {**sound.config, "fan_in_fan_out": True}
        assert read_modules(FORMATS[name.split()[0]], transposed, sound.tensors, hostile_layout)
        if "fan_in_fan_out" not in sound.config:
            continue
        tried += 1
        logits = []
        for config in (sound.config, transposed):
            folder = write(config, sound.tensors)
            model = PeftModel.from_pretrained(copy.deepcopy(hostile_model), folder).eval()
            with torch.no_grad():
                logits.append(model(tokens).logits)
        torch.testing.assert_close(*logits, atol=0, rtol=0, msg=name)
    assert tried > 20
