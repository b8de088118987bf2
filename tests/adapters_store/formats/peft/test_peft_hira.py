from __future__ import annotations

from typing import Any

import pytest
from peft import HiraConfig
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Dense


@pytest.fixture(params=["base_model", "biased_model"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3},
        {"r": 40},
        {"r": 5, "rank_pattern": {"k_proj": 2}, "hira_dropout": 0.3},
        {"r": 3, "init_weights": "gaussian"},
    ],
    ids=str,
)
def test_deltas_amount_to_what_peft_computes(
    options: dict[str, Any], model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = HiraConfig(target_modules=["q_proj", "k_proj", "down_proj", "lm_head"], **options)
    adapter = check_parity(config, model)
    assert (adapter.kinds, len(adapter.modules)) == ((Dense.kind,), 10)
