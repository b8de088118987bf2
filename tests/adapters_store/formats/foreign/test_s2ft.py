from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Columns, Rows
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.adapter_folder import write_folder
from polydelta.adapters_store.formats.foreign.s2ft import FORMAT
from polydelta.adapters_store.reference import AdapterRef

UP, DOWN, K = (
    f"model.layers.{part}" for part in ("0.mlp.up_proj", "1.mlp.down_proj", "2.self_attn.k_proj")
)
CONFIG = {"peft_type": "S2FT"}


def rows() -> dict[str, Tensor]:
    return {
        f"base_model.model.{UP}.s2ft_indices": torch.tensor([50, 3, 17], dtype=torch.int32),
        f"base_model.model.{UP}.s2ft_rows": torch.randn(3, 36),
    }


def columns() -> dict[str, Tensor]:
    return {
        f"base_model.model.{DOWN}.s2ft_indices": torch.tensor([9, 51], dtype=torch.int32),
        f"base_model.model.{DOWN}.s2ft_columns": torch.randn(36, 2),
    }


def test_rows_and_columns_are_read_where_they_belong(layout: BaseLayout, tmp_path: Path) -> None:
    tensors = rows() | columns()
    write_folder(tmp_path / "a", CONFIG, tensors)
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "a"), layout)
    assert adapter.kinds == ("Columns", "Rows")
    (up,), (down,) = adapter.modules[UP], adapter.modules[DOWN]
    assert isinstance(up, Rows)
    assert isinstance(down, Columns)
    assert up.indices.tolist() == [3, 17, 50]
    dense_up, dense_down = torch.zeros(52, 36), torch.zeros(36, 52)
    dense_up[[50, 3, 17]] = tensors[f"base_model.model.{UP}.s2ft_rows"]
    dense_down[:, [9, 51]] = tensors[f"base_model.model.{DOWN}.s2ft_columns"]
    assert torch.equal(up.dense(), dense_up)
    assert torch.equal(down.dense(), dense_down)


def test_a_bias_may_come_alone(
    biased_model: LlamaForCausalLM, layout_of: Callable[..., BaseLayout]
) -> None:
    bias = torch.randn(12)
    tensors = rows() | {f"base_model.model.{K}.s2ft_bias": bias}
    modules = FORMAT.read(CONFIG, tensors, layout_of(biased_model))
    assert [delta.kind for delta in modules[K]] == ["Bias"]
    assert FORMAT.outline(CONFIG, {n: tuple(t.shape) for n, t in tensors.items()})[K].kind == "Bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"s2ft_rows": None}, "must have s2ft_rows or s2ft_columns, and not both"),
        ({"s2ft_columns": torch.zeros(52, 3)}, "must have s2ft_rows or s2ft_columns, and not both"),
        ({"s2ft_indices": None}, "has s2ft_rows but no s2ft_indices"),
        ({"s2ft_indices": torch.tensor(3)}, "a list of rows or columns asks for"),
        ({"s2ft_indices": torch.tensor([[3, 4, 5]])}, "a list of rows or columns asks for"),
        ({"s2ft_indices": torch.tensor([3, 4])}, "the number of its s2ft_indices asks for"),
        ({"s2ft_indices": torch.tensor([3, 4, 52])}, "points outside of the 52"),
        ({"s2ft_indices": torch.tensor([3, 4, 3])}, "has an index twice"),
        ({"s2ft_indices": torch.tensor([3.0, 4.0, 5.0])}, "indices must be integers"),
        ({"s2ft_rows": torch.zeros(3, 35)}, r"asks for \[3, 36\]"),
        ({"s2ft_rows": torch.zeros(3)}, r"asks for \[3, 36\]"),
        ({"s2ft_bias": torch.zeros(1)}, r"asks for \[52\]"),
    ],
)
def test_what_is_no_s2ft_is_refused(
    change: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    tensors: dict[str, Any] = rows()
    tensors |= {f"base_model.model.{UP}.{name}": tensor for name, tensor in change.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG, tensors, layout)
