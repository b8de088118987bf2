"""What holds for every format whose change of a layer is a full matrix, or computed from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Dense
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
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
