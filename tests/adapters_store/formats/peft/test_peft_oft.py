from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import OFTConfig
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.peft.oft import FORMAT
from polydelta.adapters_store.reference import AdapterRef

ROTATION = "base_model.model.model.layers.1.self_attn.k_proj.oft_R.weight"
CONFIG = {
    "peft_type": "OFT",
    "peft_version": "0.21.2",
    "num_cayley_neumann_terms": 5,
    "use_cayley_neumann": True,
}


@pytest.fixture(params=["base_model", "biased_model"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "options",
    [
        {"oft_block_size": 4},
        # Neither divides all layers, so PEFT takes the nearest that does.
        {"oft_block_size": 5},
        {"oft_block_size": 0, "r": 5},
        {"oft_block_size": 4, "use_cayley_neumann": False},
        *({"oft_block_size": 6, "num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 6, 9)),
        {"oft_block_size": 6, "block_share": True},
        {"oft_block_size": 0, "r": 3, "block_share": True, "use_cayley_neumann": False},
        {"oft_block_size": 4, "coft": True, "eps": 0.4},
        {"oft_block_size": 4, "coft": True, "eps": 0.4, "block_share": True},
        {"oft_block_size": 4, "coft": True, "eps": 100.0, "use_cayley_neumann": False},
    ],
    ids=str,
)
def test_deltas_amount_to_what_peft_computes(
    options: dict[str, Any], model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = OFTConfig(target_modules=["q_proj", "k_proj", "down_proj", "lm_head"], **options)
    adapter = check_parity(config, model)
    assert (adapter.kinds, len(adapter.modules)) == ((Dense.kind,), 10)


@pytest.mark.parametrize(
    "options",
    [{"oft_block_size": 1}, {"oft_block_size": 6, "num_cayley_neumann_terms": 1}],
    ids=str,
)
def test_what_peft_does_not_rotate_is_not_changed(
    options: dict[str, Any],
    base_model: LlamaForCausalLM,
    make_peft: Any,
    layout_of: Any,
    tmp_path: Path,
) -> None:
    make_peft(OFTConfig(target_modules=["q_proj"], **options), base_model)
    adapter = read_adapter(AdapterRef("adapter", 1, tmp_path / "adapter"), layout_of(base_model))
    assert len(adapter.modules) == 3
    assert not any(delta.dense().any() for (delta,) in adapter.modules.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_version": "0.17.1"}, "peft_version is '0.17.1'; before PEFT 0.18.0"),
        ({"peft_version": None}, "peft_version is None; before PEFT 0.18.0"),
        ({"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms is 1000000000, more than"),
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is 0"),
        ({"coft": True, "eps": None}, "eps is None"),
    ],
)
def test_an_option_that_is_not_read_is_refused_by_name(
    options: dict[str, Any], message: str, layout: Any
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | options, {ROTATION: torch.zeros(9, 6)}, layout)


def test_an_exact_transform_of_an_older_peft_is_read(
    base_model: LlamaForCausalLM, layout_of: Any
) -> None:
    config = CONFIG | {"peft_version": "0.17.0", "use_cayley_neumann": False}
    deltas = FORMAT.read(config, {ROTATION: torch.randn(9, 6)}, layout_of(base_model))
    assert len(deltas) == 1


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (8, 6), "8 blocks of 4, but .* has 36 inputs"),
        ({}, (9, 5), "a triangle of each block asks for"),
        ({"block_share": True}, (9, 6), "block_share asks for"),
        ({"block_share": True}, (1, 10), "1 blocks of 5, but"),
    ],
)
def test_rotations_that_do_not_fit_the_layer_are_refused(
    options: dict[str, Any], shape: tuple[int, int], message: str, layout: Any
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | options, {ROTATION: torch.zeros(shape)}, layout)
