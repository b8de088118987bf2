from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import DeftConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.deft import FORMAT

CONFIG: dict[str, Any] = {"peft_type": "DEFT", "r": 3}
K = "base_model.model.model.layers.1.self_attn.k_proj"
P, R = f"{K}.deft_P", f"{K}.deft_R"
TENSORS = {P: torch.ones(12, 3), R: torch.ones(3, 36)}
EVERY_SIDE = ["q_proj", "k_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("alpha", [None, 0, 7])
@pytest.mark.parametrize("para", [False, True])
@pytest.mark.parametrize("method", ["relu", "qr"])
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
def test_deltas_equal_those_of_peft(
    base: str,
    method: str,
    para: bool,
    alpha: int | None,
    check_parity: Any,
    request: pytest.FixtureRequest,
) -> None:
    config = DeftConfig(
        r=5,
        decomposition_method=method,
        para=para,
        alpha=alpha,
        init_weights=False,
        target_modules=EVERY_SIDE,
    )
    adapter = check_parity(config, request.getfixturevalue(base))
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("DEFT", ("LowRank",), 5)


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_the_rank_is_at_most_the_number_of_outputs_and_scales_what_is_put_in(
    method: str, base_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = DeftConfig(r=16, alpha=8, decomposition_method=method, target_modules=["k_proj"])
    assert check_parity(config, base_model).max_rank == 12


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "an unknown projector": ({"decomposition_method": "svd"}, {}, "method is 'svd'.*relu, qr"),
    "a word for alpha": ({"alpha": "7"}, {}, "alpha is '7'"),
    "another rank": ({"r": 4}, {}, r"\[12, 3\], but r in .* asks for \[12, 4\]"),
    "ranks that differ": ({}, {R: torch.ones(2, 36)}, r"deft_R' .* asks for \[3, 36\]"),
    "nothing to put in": ({}, {R: None}, "no deft_R"),
    "nothing to take out": ({}, {P: None}, "no deft_P"),
    "something to put in with para": ({"para": True}, {}, "has deft_R, but para is true"),
    "another base": ({}, {R: torch.ones(3, 40)}, r"layer asks for \[3, 36\]"),
    "fewer outputs": ({}, {P: torch.ones(11, 3)}, r"layer asks for \[12, 3\]"),
    "numbers": ({}, {P: torch.ones(()), R: torch.ones(())}, "shape"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any],
    tensors: dict[str, Tensor | None],
    message: str,
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
) -> None:
    layout = layout_of(base_model)
    FORMAT.read(CONFIG, TENSORS, layout)
    changed = {name: value for name, value in (TENSORS | tensors).items() if value is not None}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, changed, layout)
