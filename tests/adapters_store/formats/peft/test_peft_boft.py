from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import BOFTConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.boft import layer as peft_layer
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear, LinearPart
from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.boft import FORMAT
from polydelta.adapters_store.merged_weight import merge_into

MODULE = "base_model.model.model.layers.1.self_attn.k_proj."


@pytest.fixture(params=["base_model", "biased_model"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    return request.getfixturevalue(request.param)


class BlockDiagonal:
    """Does what PEFT's CUDA extension does; without it, PEFT makes one butterfly factor only."""

    def forward(self, rotations: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in rotations])]


@pytest.mark.parametrize(
    "options",
    [
        {"boft_block_size": 4},
        {"boft_block_size": 0, "boft_block_num": 2},
        {"boft_block_size": 0, "boft_block_num": 1, "init_weights": False},
        {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "boft_dropout": 0.2},
        {"boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 2},
    ],
    ids=str,
)
def test_deltas_amount_to_what_peft_computes(
    options: dict[str, Any],
    model: LlamaForCausalLM,
    check_parity: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peft_layer, "_FBD_CUDA", BlockDiagonal())
    config = BOFTConfig(target_modules=["q_proj", "k_proj", "down_proj", "lm_head"], **options)
    adapter = check_parity(config, model)
    assert (adapter.kinds, len(adapter.modules)) == ((Dense.kind,), 10)


class OneLayer(torch.nn.Module):
    """Of a size that can be halved more often than those of the other models."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.ModuleDict({"proj": torch.nn.Linear(48, 7)})
        self.model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})

    def read(self, name: str) -> torch.Tensor:
        return self.state_dict()[name]

    def layout(self) -> BaseLayout:
        linear = FusedLinear("proj", 48, (LinearPart("proj", 7),), bias=True)
        return BaseLayout("one", 1, (linear,), weights=self)


@pytest.mark.parametrize(("factors", "size"), [(2, 8), (3, 4), (4, 2), (4, 6)])
def test_deltas_of_many_factors_amount_to_what_peft_computes(
    factors: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(factors)
    monkeypatch.setattr(peft_layer, "_FBD_CUDA", BlockDiagonal())
    base, x, name = OneLayer(), torch.randn(5, 48), "model.layers.0.proj"
    config = BOFTConfig(
        target_modules=["proj"],
        boft_block_size=size,
        boft_n_butterfly_factor=factors,
        init_weights=False,
    )
    peft = get_peft_model(copy.deepcopy(base), config).eval()
    tensors = get_peft_model_state_dict(peft)
    assert tensors[f"base_model.model.{name}.boft_R"].shape == (factors, 48 // size, size, size)
    layout = base.layout()
    deltas = FORMAT.read({"peft_type": "BOFT"}, tensors, layout)
    weight, bias = merge_into(layout.weight(name), layout.bias(name), deltas[name])
    with torch.no_grad():
        want = peft.base_model.model.get_submodule(name)(x)
        assert (want - base.get_submodule(name)(x)).abs().max() > 0.1
    torch.testing.assert_close(x @ weight.T + bias, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        ((1, 8, 4, 4), "8 blocks of 4, but .* has 36 inputs"),
        ((1, 9, 4, 3), "a rotation of square blocks asks for"),
        ((2, 9, 4, 4), "2 butterfly factors of 9 blocks of 4, which do not fit"),
        ((2, 12, 3, 3), "2 butterfly factors of 12 blocks of 3, which do not fit"),
        ((0, 9, 4, 4), "0 butterfly factors"),
        ((1, 9, 0, 0), "1 butterfly factors of 9 blocks of 0"),
    ],
)
def test_rotations_that_do_not_fit_are_refused(
    rotation: tuple[int, ...], message: str, layout: Any
) -> None:
    tensors = {f"{MODULE}boft_R": torch.zeros(rotation), f"{MODULE}boft_s": torch.ones(12, 1)}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read({"peft_type": "BOFT"}, tensors, layout)
