from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ShiraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.delta import Sparse
from polydelta.adapters_store.errors import InvalidAdapterError

PREFIX = "base_model.model."
Q1 = "model.layers.1.self_attn.q_proj"
VALUES, INDICES = f"{PREFIX}{Q1}.shira_weight", f"{PREFIX}{Q1}.shira_indices"


@pytest.mark.parametrize("r", [1, 2, 5])
def test_deltas_equal_those_of_peft(
    r: int, base_model: LlamaForCausalLM, tmp_path: Path, adapter_files: Any
) -> None:
    config = ShiraConfig(r=r, random_seed=3, target_modules=["q_proj", "k_proj", "down_proj"])
    model = get_peft_model(base_model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shira_" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "made-by-peft")
    expected = {
        name.removeprefix(PREFIX): module.get_delta_weight("default").to_dense()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    adapter = adapter_files.read(tmp_path / "made-by-peft")
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("SHIRA", ("Sparse",), 0)
    assert adapter.modules.keys() == expected.keys()
    for module, (delta,) in adapter.modules.items():
        assert isinstance(delta, Sparse)
        torch.testing.assert_close(delta.dense(), expected[module], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16, torch.float32])
def test_indices_of_any_order_and_number_type_give_the_same_rows(
    dtype: torch.dtype, adapter_files: Any
) -> None:
    indices = torch.tensor([[35, 0, 7, 0], [35, 35, 0, 3]])
    tensors = {INDICES: indices.to(dtype), VALUES: torch.tensor([4.0, 2.0, 3.0, 1.0])}
    adapter = adapter_files.read(adapter_files.write("unsorted", tensors, "SHIRA"))
    (delta,) = adapter.modules[Q1]
    assert delta.values.tolist() == [1, 2, 3, 4]
    assert delta.columns.tolist() == [3, 35, 0, 35]
    assert delta.row_pointers.tolist() == [0] + [2] * 7 + [3] * 28 + [4]
    assert (delta.columns.dtype, delta.row_pointers.dtype) == (torch.int32, torch.int32)


def test_bfloat16_values_are_read_as_float32(
    make_shira_tensors: Callable[..., dict[str, Tensor]], adapter_files: Any
) -> None:
    tensors = make_shira_tensors()
    tensors[VALUES] = tensors[VALUES].bfloat16()
    adapter = adapter_files.read(adapter_files.write("typed", tensors, "SHIRA"))
    (delta,) = adapter.modules[Q1]
    torch.testing.assert_close(delta.values, tensors[VALUES].float(), rtol=0, atol=0)


def test_saved_modules_must_be_in_the_file(adapter_files: Any) -> None:
    with pytest.raises(InvalidAdapterError, match=r"modules_to_save is \['norm'\]"):
        adapter_files.read(adapter_files.shira(modules_to_save=["norm"]))


def places(*pairs: tuple[float, float], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(pairs, dtype=dtype).T.contiguous()


WRONG_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "a row too many": ({INDICES: places((0, 0), (36, 0))}, r"outside of .* \[36, 36\]"),
    "a column too many": ({INDICES: places((0, 0), (0, 36))}, "outside of"),
    "a negative row": ({INDICES: places((0, 0), (-1, 3))}, "outside of"),
    "an entry twice": ({INDICES: places((5, 6), (5, 6))}, "names an entry twice"),
    "fewer values than places": ({VALUES: torch.ones(1)}, r"\[1\], but the number of its"),
    "places as flat positions": ({INDICES: torch.zeros(2, dtype=torch.int32)}, "shape"),
    "places the other way round": ({INDICES: torch.zeros(2, 3, dtype=torch.int32)}, "shape"),
    "scalars": ({VALUES: torch.ones(()), INDICES: torch.zeros((), dtype=torch.int32)}, "shape"),
    "integers for values": ({VALUES: torch.ones(2, dtype=torch.int32)}, "is torch.int32"),
    "truth values for places": ({INDICES: torch.ones(2, 2, dtype=torch.bool)}, "is torch.bool"),
    "an infinite place": (
        {INDICES: places((0, 0), (torch.inf, 1), dtype=torch.float32)},
        "shira_indices' has NaN or infinite",
    ),
    "a place between two": (
        {INDICES: places((0, 0), (1.5, 1), dtype=torch.float32)},
        "that are no whole numbers",
    ),
    "rounded places": (
        {INDICES: places((0, 0), (1, 1), dtype=torch.bfloat16)},
        r"is torch\.bfloat16: indices must be integers",
    ),
    "a tensor of another format": (
        {f"{PREFIX}{Q1}.lora_A.weight": torch.ones(1, 36)},
        "lora_A.weight' cannot be served",
    ),
}


@pytest.mark.parametrize(("changed", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, adapter_files: Any
) -> None:
    good = {VALUES: torch.ones(2), INDICES: places((0, 0), (1, 1))}
    with pytest.raises(InvalidAdapterError, match=message):
        adapter_files.read(adapter_files.write("wrong", good | changed, "SHIRA"))


@pytest.mark.parametrize("missing", [VALUES, INDICES])
def test_values_and_places_must_come_together(
    missing: str, make_shira_tensors: Callable[..., dict[str, Tensor]], adapter_files: Any
) -> None:
    tensors = make_shira_tensors()
    del tensors[missing]
    with pytest.raises(InvalidAdapterError, match=f"no {missing.rpartition('.')[2]}"):
        adapter_files.read(adapter_files.write("wrong", tensors, "SHIRA"))
