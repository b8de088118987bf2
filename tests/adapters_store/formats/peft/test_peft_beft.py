from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import BeftConfig
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.beft import FORMAT

CONFIG: dict[str, Any] = {"peft_type": "BEFT"}
K = "base_model.model.model.layers.1.self_attn.k_proj"
BIAS = f"{K}.beft_bias"


@pytest.mark.parametrize("init_weights", [True, False])
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
def test_layers_equal_those_of_peft(
    base: str, init_weights: bool, check_parity: Any, request: pytest.FixtureRequest
) -> None:
    config = BeftConfig(
        init_weights=init_weights, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]
    )
    adapter = check_parity(config, request.getfixturevalue(base))
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("BEFT", ("Bias",), 0)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "another base": ({}, {BIAS: torch.ones(1, 13)}, r"layer asks for \[1, 12\]"),
    "a column": ({}, {BIAS: torch.ones(12, 1)}, r"one vector a module asks for \[1, 1\]"),
    "a plain list of numbers": ({}, {BIAS: torch.ones(12)}, "shape"),
    "a number": ({}, {BIAS: torch.ones(())}, "shape"),
    "a bias of the base": ({}, {f"{K}.bias": torch.ones(12)}, "k_proj.bias' cannot be served"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any], tensors: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, tensors, layout)
