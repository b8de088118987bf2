from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import NormWeight
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.peft.ln_tuning import FORMAT
from polydelta.adapters_store.reference import AdapterRef

CONFIG: dict[str, Any] = {"peft_type": "LN_TUNING"}
NORM = "base_model.model.model.layers.1.input_layernorm.ln_tuning_layers"
WEIGHT = f"{NORM}.weight"


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["input_layernorm", "post_attention_layernorm", "norm"], 7),
        (["post_attention_layernorm"], 3),
        (r".*layers\.[02]\..*layernorm|model\.norm", 5),
    ],
)
def test_norms_give_what_those_of_peft_give(
    targets: list[str] | str,
    count: int,
    base_model: LlamaForCausalLM,
    make_peft: Any,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
    tmp_path: Path,
) -> None:
    peft = make_peft(LNTuningConfig(target_modules=targets), base_model)
    layout = layout_of(base_model)
    adapter = read_adapter(AdapterRef("adapter", 1, tmp_path / "adapter"), layout)
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("LN_TUNING", ("NormWeight",), 0)
    assert len(adapter.modules) == count
    for module, (delta,) in adapter.modules.items():
        assert isinstance(delta, NormWeight)
        x = torch.randn(5, 36)
        with torch.no_grad():
            want = peft.base_model.model.get_submodule(module)(x)
            unchanged = base_model.get_submodule(module)(x)
        got = F.rms_norm(x, (36,), delta.weight, base_model.config.rms_norm_eps)
        torch.testing.assert_close(got, want)
        assert (want - unchanged).abs().max() > 0.1


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "a norm that was saved whole": (
        {"modules_to_save": ["norm"]},
        {"base_model.model.model.norm.weight": torch.ones(36)},
        "norm.weight' cannot be served",
    ),
    "a norm's bias": ({}, {f"{NORM}.bias": torch.ones(36)}, "norms with a bias are not served"),
    "a bias alone": (
        {},
        {f"{NORM}.bias".replace("input", "post_attention"): torch.ones(36)},
        "but no ln_tuning_layers.weight",
    ),
    "another base": ({}, {WEIGHT: torch.ones(40)}, r"the base model's norm asks for \[36\]"),
    "a linear layer": (
        {},
        {WEIGHT.replace("input_layernorm", "self_attn.q_proj"): torch.ones(36, 36)},
        "no such module",
    ),
    "a layer too many": ({}, {WEIGHT.replace("1", "3"): torch.ones(36)}, "no such module"),
    "infinity": ({}, {WEIGHT: torch.full((36,), torch.inf)}, "has NaN or infinite"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any], tensors: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, {WEIGHT: torch.ones(36)} | tensors, layout)
