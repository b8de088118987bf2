from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Bias, OneBit
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.adapter_folder import write_folder
from polydelta.adapters_store.formats.foreign.bitdelta import FORMAT, pack_signs
from polydelta.adapters_store.reference import AdapterRef

DOWN, Q = "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.q_proj"
CONFIG = {"peft_type": "BITDELTA", "target_modules": [DOWN]}


def one_bit(module: str = DOWN, rows: int = 36, columns: int = 52) -> dict[str, Tensor]:
    return {
        f"base_model.model.{module}.bitdelta_bits": pack_signs(torch.randn(rows, columns)),
        f"base_model.model.{module}.bitdelta_scale": torch.tensor([0.25]),
    }


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 36, 52])
def test_signs_are_packed_with_the_first_column_in_the_lowest_bit(columns: int) -> None:
    dense = torch.randn(5, columns)
    dense[2, 0] = 0.0
    bits = pack_signs(dense)
    assert bits.dtype == torch.uint8
    assert bits.shape == (5, -(-columns // 8))
    for row in range(5):
        for column in range(columns):
            bit = int(bits[row, column // 8]) >> column % 8 & 1
            assert bit == (dense[row, column] >= 0)
    signs = torch.where(dense < 0, -1.0, 1.0)
    torch.testing.assert_close(OneBit(columns, bits, 0.5).dense(), 0.5 * signs)


def test_a_folder_is_read_as_signs_times_a_scale(layout: BaseLayout, tmp_path: Path) -> None:
    tensors = one_bit() | one_bit(Q, 36, 36)
    write_folder(tmp_path / "a", CONFIG, tensors)
    adapter = read_adapter(AdapterRef("a", 1, tmp_path / "a"), layout)
    assert adapter.format == "BITDELTA"
    assert adapter.kinds == ("OneBit",)
    (delta,) = adapter.modules[DOWN]
    assert isinstance(delta, OneBit)
    assert (delta.shape, delta.scale) == ((36, 52), 0.25)
    assert torch.equal(delta.bits, tensors[f"base_model.model.{DOWN}.bitdelta_bits"])
    assert adapter.modules.keys() == {DOWN, Q}


def test_a_bias_may_come_along_or_come_alone(
    biased_model: LlamaForCausalLM, layout_of: Callable[..., BaseLayout]
) -> None:
    tensors = one_bit() | {
        f"base_model.model.{DOWN}.bitdelta_bias": torch.randn(36),
        f"base_model.model.{Q}.bitdelta_bias": torch.randn(36),
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kinds = {module: outline.kind for module, outline in FORMAT.outline(CONFIG, shapes).items()}
    assert kinds == {DOWN: "OneBit", Q: "Bias"}
    modules = FORMAT.read(CONFIG, tensors, layout_of(biased_model))
    assert [delta.kind for delta in modules[DOWN]] == ["OneBit", "Bias"]
    (bias,) = modules[Q]
    assert isinstance(bias, Bias)
    assert torch.equal(bias.vector, tensors[f"base_model.model.{Q}.bitdelta_bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bitdelta_bits": torch.zeros(36, 6, dtype=torch.uint8)}, r"asks for \[36, 7\]"),
        ({"bitdelta_bits": torch.zeros(36, 7)}, r"bitdelta_bits of type torch.float32"),
        ({"bitdelta_scale": torch.tensor(0.5)}, r"one scale for each layer asks for \[1\]"),
        ({"bitdelta_scale": torch.tensor([float("nan")])}, "NaN or infinite"),
        ({"bitdelta_scale": torch.tensor([1])}, "must be floating-point"),
        ({"bitdelta_scale": None}, "has bitdelta_bits but no bitdelta_scale"),
        ({"bitdelta_bits": None}, "has bitdelta_scale but no bitdelta_bits"),
        ({"bitdelta_bias": torch.zeros(35)}, r"asks for \[36\]"),
        ({"lora_A.weight": torch.zeros(2, 52)}, "cannot be served"),
    ],
)
def test_what_is_no_bitdelta_is_refused(
    change: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    tensors: dict[str, Any] = one_bit()
    tensors |= {f"base_model.model.{DOWN}.{name}": tensor for name, tensor in change.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG, tensors, layout)


def test_an_unknown_key_of_the_config_is_refused(layout: BaseLayout) -> None:
    with pytest.raises(InvalidAdapterError, match="group_size is 128"):
        FORMAT.read(CONFIG | {"group_size": 128}, one_bit(), layout)


def test_embedding_and_head_have_no_signs(layout: BaseLayout) -> None:
    with pytest.raises(InvalidAdapterError, match="'lm_head'"):
        FORMAT.read(CONFIG, one_bit() | one_bit("lm_head", 40, 36), layout)
