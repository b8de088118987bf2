from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import HRAConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.hra import FORMAT

CONFIG: dict[str, Any] = {"peft_type": "HRA", "r": 3}
Q = "model.layers.1.self_attn.q_proj"
U = f"base_model.model.{Q}.hra_u"
EVERY_SIDE = ["q_proj", "k_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("r", [1, 2, 5, 12])
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
def test_deltas_equal_those_of_peft(
    base: str, r: int, apply_gs: bool, check_parity: Any, request: pytest.FixtureRequest
) -> None:
    config = HRAConfig(r=r, apply_GS=apply_gs, init_weights=False, target_modules=EVERY_SIDE)
    adapter = check_parity(config, request.getfixturevalue(base))
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("HRA", ("LowRank",), r)
    assert len(adapter.modules) == 3 * len(EVERY_SIDE)


def test_vectors_in_equal_pairs_as_training_starts_with_them_nearly_cancel_out(
    base_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = HRAConfig(r=8, target_modules=["v_proj", "lm_head"], layers_to_transform=[0, 2])
    adapter = check_parity(config, base_model)
    assert "lm_head" in adapter.modules


def test_more_reflections_than_inputs_are_still_one_rotation(
    base_model: LlamaForCausalLM, check_parity: Any
) -> None:
    adapter = check_parity(HRAConfig(r=40, target_modules=["o_proj"]), base_model)
    assert adapter.max_rank == 40


def columns(*last: float) -> Tensor:
    """Three independent ones, then the given numbers as the first entries of the third."""
    u = torch.eye(36)[:, :3].contiguous()
    if last:
        u[:, 2] = 0
        u[: len(last), 2] = torch.tensor(last)
    return u


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "no rank": ({"r": None}, {}, "r is None"),
    "another rank": ({"r": 4}, {}, r"\[36, 3\], but r = 4 .* asks for \[36, 4\]"),
    "a word for a truth value": ({"apply_GS": "yes"}, {}, "apply_GS is 'yes'"),
    "another base": ({}, {U: torch.ones(40, 3)}, r"layer asks for \[36, 3\]"),
    "a number": ({}, {U: torch.ones(())}, "shape"),
    "an embedding": ({}, {U.replace(Q, "model.embed_tokens"): columns()}, "no such module"),
    "a tensor of another format": ({}, {U.replace("hra_u", "c3a_kernel"): columns()}, "c3a_kernel"),
    "a vector of zeros": ({}, {U: columns(0.0)}, "a column of zeros"),
    "vectors of one plane": ({"apply_GS": True}, {U: columns(2.0, -1.0, 1e-5)}, "rounding error"),
    "more orthogonal vectors than inputs": (
        {"apply_GS": True, "r": 37},
        {U: torch.randn(36, 37)},
        "rounding error",
    ),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    message: str,
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
) -> None:
    layout = layout_of(base_model)
    FORMAT.read(CONFIG, {U: columns()}, layout)
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, {U: columns()} | tensors, layout)
