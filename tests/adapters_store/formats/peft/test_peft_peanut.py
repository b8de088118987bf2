from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeanutConfig
from transformers import LlamaForCausalLM
from transformers.activations import ACT2FN

from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.peanut import FORMAT

MODULE = "base_model.model.model.layers.1.self_attn.k_proj."
CONFIG = {"peft_type": "PEANUT", "act_fn": "relu", "depth": 0, "scaling": 1.0}
# Their parameters, learned in training, are not in the adapter's file.
LEARNED = {"prelu", "xielu"}


@pytest.fixture(params=["base_model", "biased_model"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "options",
    [{"depth": 0, "scaling": 2.5}, {"depth": 1}, {"depth": 2, "act_fn": "silu"}, {"depth": 3}],
    ids=str,
)
def test_deltas_amount_to_what_peft_computes(
    options: dict[str, Any], model: LlamaForCausalLM, check_parity: Any
) -> None:
    targets = ["q_proj", "k_proj", "down_proj", "lm_head"]
    adapter = check_parity(PeanutConfig(r=7, target_modules=targets, **options), model)
    assert (adapter.kinds, adapter.max_rank, len(adapter.modules)) == ((LowRank.kind,), 7, 10)


@pytest.mark.parametrize("function", sorted(ACT2FN.keys() - LEARNED))
def test_every_function_that_has_no_parameters_is_that_of_transformers(
    function: str, base_model: LlamaForCausalLM, check_parity: Any
) -> None:
    check_parity(
        PeanutConfig(r=7, act_fn=function, scaling=20.0, target_modules=["q_proj"]), base_model
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"act_fn": function}, f"act_fn is '{function}'") for function in sorted(LEARNED)),
        ({"depth": -1}, "depth is -1, but must be a whole number from 0"),
        ({"depth": 17}, "depth is 17, but must be"),
        ({"depth": 1}, "no peanut_encoders.0.weight"),
        ({"scaling": None}, "scaling is None"),
    ],
)
def test_an_option_that_is_not_read_is_refused_by_name(
    options: dict[str, Any], message: str, layout: Any
) -> None:
    tensors = {
        f"{MODULE}peanut_A.weight": torch.ones(2, 12),
        f"{MODULE}peanut_B.weight": torch.ones(12, 2),
    }
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | options, tensors, layout)


def test_a_hidden_layer_beyond_the_depth_is_refused(layout: Any) -> None:
    tensors = {
        f"{MODULE}peanut_A.weight": torch.ones(2, 12),
        f"{MODULE}peanut_B.weight": torch.ones(12, 2),
        f"{MODULE}peanut_decoders.0.weight": torch.ones(2, 2),
    }
    with pytest.raises(InvalidAdapterError, match=r"peanut_decoders\.0\.weight, but depth is 0"):
        FORMAT.read(CONFIG, tensors, layout)
