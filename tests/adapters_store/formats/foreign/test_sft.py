from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Sparse
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.adapter_folder import write_folder
from polydelta.adapters_store.formats.foreign.sft import FORMAT
from polydelta.adapters_store.reference import AdapterRef

UP, K = "model.layers.0.mlp.up_proj", "model.layers.2.self_attn.k_proj"
CONFIG = {"peft_type": "SFT"}


def entries() -> dict[str, Tensor]:
    indices = torch.tensor([[51, 0, 7, 7], [35, 3, 20, 0]], dtype=torch.int32)
    return {
        f"base_model.model.{UP}.sft_indices": indices,
        f"base_model.model.{UP}.sft_values": torch.tensor([0.5, -2.0, 3.0, 1.5]),
    }


def test_entries_are_read_where_they_belong(layout: BaseLayout, tmp_path: Path) -> None:
    write_folder(tmp_path / "a", CONFIG, entries())
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "a"), layout)
    (delta,) = adapter.modules[UP]
    assert isinstance(delta, Sparse)
    dense = torch.zeros(52, 36)
    dense[51, 35], dense[0, 3], dense[7, 20], dense[7, 0] = 0.5, -2.0, 3.0, 1.5
    assert torch.equal(delta.dense(), dense)


def test_a_bias_may_come_along_or_come_alone(
    biased_model: LlamaForCausalLM, layout_of: Callable[..., BaseLayout]
) -> None:
    tensors = entries() | {
        f"base_model.model.{UP}.sft_bias": torch.randn(52),
        f"base_model.model.{K}.sft_bias": torch.randn(12),
    }
    modules = FORMAT.read(CONFIG, tensors, layout_of(biased_model))
    assert [delta.kind for delta in modules[UP]] == ["Sparse", "Bias"]
    assert [delta.kind for delta in modules[K]] == ["Bias"]
    outline = FORMAT.outline(CONFIG, {n: tuple(t.shape) for n, t in tensors.items()})
    assert (outline[UP].kind, outline[K].kind) == ("Sparse", "Bias")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft_values": None}, "has sft_indices but no sft_values"),
        ({"sft_indices": None}, "has sft_values but no sft_indices"),
        ({"sft_values": torch.zeros(3)}, "the number of its sft_indices asks for"),
        ({"sft_indices": torch.zeros(4, dtype=torch.int32)}, "a row and a column for each value"),
        ({"sft_indices": torch.zeros(2, 4)}, "indices must be integers"),
        ({"sft_indices": torch.tensor([[0, 1, 2, 52], [0] * 4])}, "points outside"),
        ({"sft_indices": torch.tensor([[0, 1, 2, 3], [0, 0, 0, -1]])}, "points outside"),
        ({"sft_indices": torch.tensor([[0, 1, 1, 3], [0, 2, 2, 0]])}, "names an entry twice"),
        ({"sft_bias": torch.zeros(36)}, r"asks for \[52\]"),
    ],
)
def test_what_is_no_sft_is_refused(
    change: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    tensors: dict[str, Any] = entries()
    tensors |= {f"base_model.model.{UP}.{name}": tensor for name, tensor in change.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG, tensors, layout)
