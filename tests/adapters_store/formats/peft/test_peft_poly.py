from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PolyConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.peft.poly import FORMAT
from polydelta.adapters_store.reference import AdapterRef

Q1 = "model.layers.1.self_attn.q_proj"
A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
CONFIG = {
    "peft_type": "POLY",
    "poly_type": "poly",
    "r": 3,
    "n_tasks": 5,
    "n_skills": 4,
    "n_splits": 2,
    "polydelta_task_id": 1,
}


def good() -> dict[str, Tensor]:
    shapes = {A: (2, 4, 18, 3), B: (2, 4, 3, 18), LOGITS: (5, 8)}
    return {f"base_model.model.{Q1}.{name}": torch.randn(shape) for name, shape in shapes.items()}


CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "one task": ({"n_tasks": 1, "n_skills": 3}, 0),
    "the first of three tasks": ({"n_tasks": 3}, 0),
    "the last of three tasks": ({"n_tasks": 3}, 2),
    "multi-head routing": ({"n_tasks": 4, "n_skills": 5, "n_splits": 4}, 1),
    "random, an odd rank": ({"n_tasks": 2, "r": 7, "init_weights": False}, 1),
}


@pytest.mark.parametrize(("options", "task"), CONFIGS.values(), ids=CONFIGS.keys())
def test_deltas_equal_those_of_peft(
    options: dict[str, Any],
    task: int,
    base_model: LlamaForCausalLM,
    make_peft: Any,
    tmp_path: Path,
    layout_of: Any,
) -> None:
    config = PolyConfig(target_modules=["q_proj", "k_proj", "down_proj"], **options)
    peft = make_peft(config, base_model, std=1.0)
    path = tmp_path / "adapter" / "adapter_config.json"
    if options["n_tasks"] > 1:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"polydelta_task_id": task}))
    adapter = read_adapter(AdapterRef("adapter", 1, tmp_path / "adapter"), layout_of(base_model))
    assert len(adapter.modules) == 9
    for module, (delta,) in adapter.modules.items():
        assert isinstance(delta, LowRank)
        layer = peft.base_model.model.get_submodule(module)
        x = torch.randn(1, 5, delta.a.shape[1])
        with torch.no_grad():
            change = layer(x, task_ids=torch.tensor([task])) - layer.base_layer(x)
        assert change.abs().max() > 0.1
        torch.testing.assert_close(x @ delta.dense().T, change, rtol=1e-4, atol=1e-4)


REFUSED = {
    "no task": ({"polydelta_task_id": None}, "add polydelta_task_id, a number from 0 to 4"),
    "a task too many": ({"polydelta_task_id": 5}, "polydelta_task_id is 5, but must be"),
    "a negative task": ({"polydelta_task_id": -1}, "polydelta_task_id is -1, but must be"),
    "a truth value for a task": ({"polydelta_task_id": True}, "polydelta_task_id is True"),
    "another router": ({"poly_type": "mono"}, "poly_type is 'mono', but must be"),
    "another rank": ({"r": 2}, r"lora_A' has shape \[2, 4, 18, 3\], but r, n_skills"),
    "other skills": ({"n_skills": 8, "n_splits": 1}, r"asks for \[1, 8, 18, 3\]"),
    "other tasks": ({"n_tasks": 6}, r"module_logits' has shape \[5, 8\]"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    FORMAT.read(CONFIG, good(), layout)
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, good(), layout)


WRONG = {
    "A of another base": ({A: torch.ones(2, 4, 17, 3)}, r"lora_A' has shape \[2, 4, 17, 3\]"),
    "B of another base": ({B: torch.ones(2, 4, 3, 6)}, r"lora_B' has shape \[2, 4, 3, 6\]"),
    "a matrix": ({B: torch.ones(3, 36)}, r"lora_B' has shape \[3, 36\]"),
    "a tensor of another format": ({"lora_A": torch.ones(2, 36)}, "lora_A' cannot be served"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    changed = {f"base_model.model.{Q1}.{name}": tensor for name, tensor in changed.items()}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG, good() | changed, layout)


def test_a_layer_that_cannot_be_cut_evenly_is_refused(layout: BaseLayout) -> None:
    shapes = {A: (5, 1, 7, 3), B: (5, 1, 3, 7), LOGITS: (5, 5)}
    tensors = {f"base_model.model.{Q1}.{n}": torch.ones(shape) for n, shape in shapes.items()}
    with pytest.raises(InvalidAdapterError, match=r"n_splits is 5, which does not .* \[36, 36\]"):
        FORMAT.read(CONFIG | {"n_splits": 5, "n_skills": 1}, tensors, layout)
