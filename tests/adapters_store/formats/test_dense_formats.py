"""What holds for every format whose change of a layer is a full matrix, or computed from one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Bias, Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import FORMATS, read_adapter
from polydelta.adapters_store.formats.files import parse_weights
from polydelta.adapters_store.formats.servable import check_served
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.reference import AdapterRef

OPTIONS: dict[str, dict[str, Any]] = {
    "BOFT": {"boft_block_size": 4},
    "FOURIERFT": {"n_frequency": 9},
    "FROD": {"progressbar": False},
    "GLORA": {"r": 3},
    "HIRA": {"r": 3},
    "OFT": {"oft_block_size": 4},
    "OSF": {"effective_rank": 7},
    "PEANUT": {"r": 3, "depth": 1},
    "RANDLORA": {"r": 5},
}
# Of a module: without it, the module is not adapted.
ONE_TENSOR = {"FOURIERFT", "OFT"}
WITH_BIASES = ["BOFT", "FOURIERFT", "FROD", "OFT", "RANDLORA"]


@pytest.fixture(params=OPTIONS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(name: str, biased_model: LlamaForCausalLM, make_peft: Any, tmp_path: Path) -> Path:
    """An adapter that PEFT made."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[name](target_modules=["k_proj"], **OPTIONS[name])
    make_peft(config, biased_model)
    return tmp_path / "adapter"


@pytest.fixture
def layout(biased_model: LlamaForCausalLM, layout_of: Any) -> BaseLayout:
    return layout_of(biased_model)


def content(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, parse_weights((folder / "adapter_model.safetensors").read_bytes())


def test_every_key_of_peft_has_its_rule(name: str) -> None:
    rules = FORMATS[name].rules
    keys = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[name])}
    assert not keys - rules.honoured - rules.harmless - rules.refused.keys()


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"PEANUT"}), indirect=True)
def test_it_is_read_but_not_served(name: str, folder: Path, layout: BaseLayout) -> None:
    adapter = read_adapter(AdapterRef("adapter", 1, folder), layout)
    assert Dense.kind in adapter.kinds
    for summary in (inspect(folder), inspect(folder, layout)):
        assert (summary.format, summary.kinds) == (name, adapter.kinds)
        assert summary.problem.startswith(f"This {name} adapter has no exact form")
        assert "polydelta adapters convert FOLDER OUT --rank R" in summary.problem


def test_kinds_that_are_served_pass() -> None:
    check_served("GLORA", ("Bias", "LowRank", "Scale"))
    with pytest.raises(InvalidAdapterError, match="This GLORA adapter"):
        check_served("GLORA", ("Bias", "Dense"))


@pytest.mark.parametrize("bias", ["all", "only"])
@pytest.mark.parametrize("name", WITH_BIASES)
def test_biases_of_the_base_that_were_trained_too_are_read(
    name: str, bias: str, biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    only = "fourier_only" if name == "FOURIERFT" else f"{name.lower()}_only"
    config = PEFT_TYPE_TO_CONFIG_MAPPING[name](
        target_modules=["k_proj"], bias=only if bias == "only" else "all", **OPTIONS[name]
    )
    adapter = check_parity(config, biased_model)
    assert len(adapter.modules) == (3 if bias == "only" else 21)
    assert Bias.kind in adapter.kinds


@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - ONE_TENSOR), indirect=True)
def test_a_file_without_one_of_its_tensors_is_refused(folder: Path, layout: BaseLayout) -> None:
    config, tensors = content(folder)
    for missing in tensors:
        # PEFT writes these twice.
        if missing.endswith((".k_proj.randlora_A", ".k_proj.randlora_B")):
            continue
        rest = {name: tensor for name, tensor in tensors.items() if name != missing}
        with pytest.raises(InvalidAdapterError):
            FORMATS[config["peft_type"]].read(config, rest, layout)


def misshapen(tensor: Tensor) -> Iterator[Tensor]:
    yield tensor.flatten()[0]
    yield tensor.unsqueeze(0)
    yield tensor.unsqueeze(-1)
    yield tensor.flatten()[:-1]
    for axis in range(tensor.ndim):
        yield torch.cat((tensor, tensor), axis)
        yield tensor.narrow(axis, 0, 0)
        yield tensor.narrow(axis, 0, tensor.shape[axis] - 1)


def test_tensors_of_another_shape_are_refused(name: str, folder: Path, layout: BaseLayout) -> None:
    config, tensors = content(folder)
    module = "model.layers.1.self_attn.k_proj"
    expected = FORMATS[name].read(config, tensors, layout)[module][0].dense()
    for changed, tensor in tensors.items():
        if "layers" in changed and "layers.1" not in changed:
            continue
        for other in misshapen(tensor):
            try:
                deltas = FORMATS[name].read(config, tensors | {changed: other}, layout)
            except InvalidAdapterError:
                continue
            # Any number of frequencies may have been trained, and shared bases may be larger than
            # a layer needs.
            assert name == "FOURIERFT" or torch.equal(deltas[module][0].dense(), expected)


def test_numbers_that_are_not_finite_are_refused(folder: Path, layout: BaseLayout) -> None:
    config, tensors = content(folder)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            wrong = tensor.clone()
            wrong.view(-1)[0] = torch.nan
            with pytest.raises(InvalidAdapterError, match="NaN"):
                FORMATS[config["peft_type"]].read(config, tensors | {name: wrong}, layout)


def test_modules_of_another_base_are_refused(folder: Path, layout: BaseLayout) -> None:
    config, tensors = content(folder)
    elsewhere = {name.replace("layers.2", "layers.9"): tensor for name, tensor in tensors.items()}
    with pytest.raises(InvalidAdapterError, match="no such module in its 3 decoder layers"):
        FORMATS[config["peft_type"]].read(config, elsewhere, layout)
