"""Files as BitDelta's own code saves them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout, FusedLinear, LinearPart
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.importing.bitdelta_file import import_bitdelta

UP = "model.layers.2.mlp.up_proj"

Layout = Callable[[LlamaForCausalLM], BaseLayout]


def packed(positive: Tensor) -> Tensor:
    """positive: [out, in] bool -> [in / 32, out] int32, bit b being that of column 32 i + b."""
    out_features, in_features = positive.shape
    words = torch.zeros(in_features // 32, out_features, dtype=torch.int64)
    for column in range(in_features):
        words[column // 32] |= positive[:, column].long() << column % 32
    return words.to(torch.int32)


@pytest.fixture
def base(base_model: LlamaForCausalLM, layout_of: Layout) -> BaseLayout:
    """With one linear layer a block, of 64 inputs: the authors' packing takes multiples of 32."""
    linear = FusedLinear("mlp.up_proj", 64, (LinearPart("mlp.up_proj", 5),))
    return replace(layout_of(base_model), linears=(linear,))


@pytest.fixture
def signs() -> Tensor:
    torch.manual_seed(2)
    return torch.rand(5, 64) < 0.5


@pytest.fixture
def content(signs: Tensor, base_model: LlamaForCausalLM) -> dict[str, Tensor]:
    """With the parameters that its optimiser had, which are all but the linear layers."""
    whole = {
        name: parameter
        for name, parameter in copy.deepcopy(base_model).named_parameters()
        if "_proj" not in name
    }
    coefficient = torch.nn.Parameter(torch.tensor(0.125))
    return {f"{UP}.mask": packed(signs), f"{UP}.coeff": coefficient, **whole}


@pytest.fixture
def save(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(content: dict[str, Any]) -> Path:
        torch.save(content, tmp_path / "diff.pt")
        return tmp_path / "diff.pt"

    return write


def test_signs_and_scales_are_the_file_s(
    base: BaseLayout,
    content: dict[str, Tensor],
    signs: Tensor,
    save: Callable[..., Path],
    read_written: Callable[..., Any],
) -> None:
    assert (content[f"{UP}.mask"] < 0).any(), "the highest bit of a word is one too"
    new = import_bitdelta(save(content), base)
    assert not new.replaced
    adapter = read_written(new, base)
    assert adapter.modules.keys() == {UP}
    (delta,) = adapter.modules[UP]
    assert torch.equal(delta.dense(), torch.where(signs, 0.125, -0.125))


def test_what_was_trained_in_full_is_kept_where_it_differs(
    base: BaseLayout, content: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    with torch.no_grad():
        content["model.norm.weight"][3] += 1
        content["lm_head.weight"][3] += 1
    adapter = import_bitdelta(save(content), base)
    assert adapter.replaced.keys() == {"model.norm", "lm_head"}
    assert torch.equal(adapter.replaced["lm_head"], content["lm_head.weight"])


def test_the_base_is_rounded_to_the_file_s_numbers(
    base: BaseLayout, content: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    content = {n: t.bfloat16() if t.is_floating_point() else t for n, t in content.items()}
    adapter = import_bitdelta(save(content), base)
    assert not adapter.replaced
    assert adapter.modules[UP]["bitdelta_scale"].dtype == torch.float32


def test_new_tokens_are_left_out_when_asked(
    base: BaseLayout, content: dict[str, Tensor], save: Callable[..., Path]
) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        content[name] = torch.cat((content[name].detach(), torch.ones(2, 36)))
    path = save(content)
    with pytest.raises(InvalidAdapterError, match=r"42 tokens, the base has 40.*--cut-vocabulary"):
        import_bitdelta(path, base)
    assert not import_bitdelta(path, base, cut_vocabulary=True).replaced


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{UP}.mask": torch.zeros(2, 6, dtype=torch.int32)}, r"of shape \[2, 6\].*\[2, 5\]"),
        ({f"{UP}.mask": torch.zeros(2, 5, dtype=torch.int64)}, r"torch.int64 of shape \[2, 5\]"),
        ({f"{UP}.mask": None}, "has no mask with one coeff"),
        ({f"{UP}.coeff": None}, "has no mask with one coeff"),
        ({f"{UP}.coeff": torch.ones(2)}, "has no mask with one coeff"),
        ({f"{UP}.weight": torch.zeros(5, 64)}, r"up_proj.weight', .*distill-delta"),
        ({f"{UP}.A": torch.zeros(5, 4)}, r"up_proj.A', which"),
        ({"model.layers.3.mlp.up_proj.coeff": torch.tensor(1.0)}, r"layers.3.*give the base"),
        ({"model.norm.weight": torch.ones(35)}, r"has shape \[35\], but the base model's"),
        ({"lm_head.weight": torch.ones(40, 35)}, r"has shape \[40, 35\], but the base model's"),
        ({"epoch": 3}, "holds something else than tensors by name"),
    ],
)
def test_a_file_of_another_base_or_kind_is_refused(
    change: dict[str, Any],
    message: str,
    base: BaseLayout,
    content: dict[str, Tensor],
    save: Callable[..., Path],
) -> None:
    changed = {name: item for name, item in (content | change).items() if item is not None}
    with pytest.raises(InvalidAdapterError, match=message):
        import_bitdelta(save(changed), base)


def test_inputs_that_are_no_multiple_of_32_never_came_from_there(
    base_model: LlamaForCausalLM, layout_of: Layout, save: Callable[..., Path]
) -> None:
    path = save({f"{UP}.mask": torch.zeros(1, 52, dtype=torch.int32)})
    with pytest.raises(InvalidAdapterError, match=r"torch.int32 of shape \[1, 52\]"):
        import_bitdelta(path, layout_of(base_model))
