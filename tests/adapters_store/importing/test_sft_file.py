"""Files as composable-sft's `SFT.save` writes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.importing.sft_file import import_sft

UP, Q = "model.layers.0.mlp.up_proj", "model.layers.2.self_attn.q_proj"
NORM = "model.layers.1.input_layernorm"

Layout = Callable[[LlamaForCausalLM], BaseLayout]


def sparse(*shape: int, nnz: int = 17) -> Tensor:
    dense = torch.zeros(shape)
    dense.view(-1)[torch.randperm(dense.numel())[:nnz]] = torch.randn(nnz)
    return dense


def encoded(dense: Tensor) -> dict[str, Any]:
    """Places with the first dimension running fastest, as steps from one to the next."""
    fastest_first = dense.permute(*range(dense.dim())[::-1]).flatten()
    places = fastest_first.nonzero().squeeze(1)
    steps = places.diff().tolist()
    if len(places):
        steps.insert(0, np.int64(places[0].item()))
    return {"size": dense.size(), "index_steps": steps, "values": fastest_first[places]}


def save(folder: Path, diffs: dict[str, Tensor], whole: dict[str, Tensor] | None = None) -> Path:
    content = {"diffs": {name: encoded(diff) for name, diff in diffs.items()}, "abs": whole or {}}
    torch.save(content, folder / "pytorch_diff.bin")
    return folder


def test_sparse_changes_are_the_file_s_exactly(
    base_model: LlamaForCausalLM,
    layout_of: Layout,
    read_written: Callable[..., Any],
    merged: Callable[..., LlamaForCausalLM],
    tmp_path: Path,
) -> None:
    layout, diffs = layout_of(base_model), {}
    for module in (UP, Q):
        diffs[f"{module}.weight"] = sparse(*layout.module_shapes[module])
    tuned = copy.deepcopy(base_model)
    with torch.no_grad():
        for name, diff in diffs.items():
            tuned.get_parameter(name).add_(diff)
    adapter = read_written(import_sft(save(tmp_path, diffs), layout), layout)
    assert adapter.format == "SFT"
    assert adapter.modules.keys() == {UP, Q}
    result = merged(base_model, layout, adapter)
    for module in (UP, Q):
        (delta,) = adapter.modules[module]
        assert delta.nnz == 17
        assert torch.equal(delta.dense(), diffs[f"{module}.weight"])
    for name, parameter in tuned.named_parameters():
        torch.testing.assert_close(result.get_parameter(name), parameter, atol=1e-6, rtol=1e-6)


def test_the_file_itself_may_be_named(
    base_model: LlamaForCausalLM, layout_of: Layout, tmp_path: Path
) -> None:
    file = save(tmp_path, {f"{UP}.weight": sparse(52, 36)}) / "pytorch_diff.bin"
    assert import_sft(file, layout_of(base_model)).modules.keys() == {UP}


def test_biases_are_changed_by_what_the_file_says(
    biased_model: LlamaForCausalLM, layout_of: Layout, tmp_path: Path
) -> None:
    base, diff, whole = layout_of(biased_model), sparse(52, nnz=5), torch.randn(36)
    folder = save(tmp_path, {f"{UP}.bias": diff}, {f"{Q}.bias": whole})
    adapter = import_sft(folder, base)
    assert torch.equal(adapter.modules[UP]["sft_bias"], diff)
    torch.testing.assert_close(adapter.modules[Q]["sft_bias"] + base.bias(Q), whole)


def test_norms_embedding_and_head_become_whole_weights(
    base_model: LlamaForCausalLM, layout_of: Layout, tmp_path: Path
) -> None:
    base, head = layout_of(base_model), torch.randn(40, 36)
    norm, embedding = sparse(36, nnz=4), sparse(40, 36)
    folder = save(
        tmp_path,
        {f"{NORM}.weight": norm, "model.embed_tokens.weight": embedding},
        {"lm_head.weight": head},
    )
    replaced = import_sft(folder, base).replaced
    assert replaced.keys() == {NORM, "model.embed_tokens", "lm_head"}
    assert torch.equal(replaced[NORM], base.weight(NORM) + norm)
    assert torch.equal(
        replaced["model.embed_tokens"], base.weight("model.embed_tokens") + embedding
    )
    assert torch.equal(replaced["lm_head"], head)


def test_a_tied_head_follows_the_embedding(
    base_model: LlamaForCausalLM,
    layout_of: Layout,
    read_written: Callable[..., Any],
    tmp_path: Path,
) -> None:
    base_model.config.tie_word_embeddings = True
    layout, change = layout_of(base_model), torch.zeros(40, 36)
    change[[3, 17], 5] = 0.5
    folder = save(tmp_path, {"model.embed_tokens.weight": change})
    adapter = read_written(import_sft(folder, layout), layout)
    assert adapter.modules.keys() == {"model.embed_tokens", "lm_head"}
    for (rows,) in adapter.modules.values():
        assert rows.ids.tolist() == [3, 17]
        assert torch.equal(rows.rows, (layout.weight("model.embed_tokens") + change)[[3, 17]])
    folder = save(tmp_path, {"lm_head.weight": change})
    with pytest.raises(
        InvalidAdapterError, match=r"'lm_head.weight', which the base model has not"
    ):
        import_sft(folder, layout)


def test_an_empty_change_is_no_harm(
    base_model: LlamaForCausalLM,
    layout_of: Layout,
    read_written: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = save(tmp_path, {f"{UP}.weight": sparse(52, 36), f"{Q}.weight": torch.zeros(36, 36)})
    layout = layout_of(base_model)
    assert read_written(import_sft(folder, layout), layout).modules.keys() == {UP}


@pytest.mark.parametrize(
    ("diffs", "whole", "message"),
    [
        ({"bert.encoder.weight": sparse(9, 4)}, {}, "'bert.encoder.weight', which the base model"),
        ({f"{UP}.bias": sparse(52)}, {}, "up_proj.bias', which the base model has not"),
        ({f"{UP}.weight": sparse(36, 52)}, {}, r"has shape \[36, 52\], .* \[52, 36\]"),
        ({}, {"lm_head.weight": torch.zeros(41, 36)}, r"has shape \[41, 36\], .* \[40, 36\]"),
        ({}, {f"{UP}.weight": torch.zeros(52, 36)}, "as a whole.*distill-delta"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(
    diffs: dict[str, Tensor],
    whole: dict[str, Tensor],
    message: str,
    base_model: LlamaForCausalLM,
    layout_of: Layout,
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        import_sft(save(tmp_path, diffs, whole), layout_of(base_model))


@pytest.mark.parametrize(
    "change",
    [
        {"size": None},
        {"index_steps": [1, 0, 2]},
        {"index_steps": [-1, 1, 1]},
        {"index_steps": [0, 1]},
        {"index_steps": [1, 1, 52 * 36]},
        {"index_steps": [1, "x", 1]},
        {"values": [1.0, 2.0, 3.0]},
        {"values": torch.zeros(3, 1)},
    ],
)
def test_a_change_that_is_not_encoded_right_is_refused(
    change: dict[str, Any], base_model: LlamaForCausalLM, layout_of: Layout, tmp_path: Path
) -> None:
    sound = encoded(sparse(52, 36, nnz=3))
    torch.save({"diffs": {f"{UP}.weight": sound | change}}, tmp_path / "pytorch_diff.bin")
    with pytest.raises(InvalidAdapterError, match=r"up_proj.weight' is not kept as size"):
        import_sft(tmp_path, layout_of(base_model))


@pytest.mark.parametrize("content", [{}, {"body": {}}, [1], {"diffs": [1]}, {"abs": {"a": 1}}])
def test_another_file_is_refused(
    content: object, base_model: LlamaForCausalLM, layout_of: Layout, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "pytorch_diff.bin")
    with pytest.raises(InvalidAdapterError, match="holds something else than abs and diffs"):
        import_sft(tmp_path, layout_of(base_model))
