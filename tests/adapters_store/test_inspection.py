from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.inspection import inspect

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_a_lora_is_summed_up(
    adapter_files: Any, make_lora_tensors: Callable[..., dict[str, Tensor]], layout: BaseLayout
) -> None:
    tensors = {
        **make_lora_tensors("model.layers.0.self_attn.q_proj"),
        **make_lora_tensors("model.layers.2.self_attn.q_proj"),
        **make_lora_tensors("model.layers.2.self_attn.o_proj", rank=7),
    }
    folder = adapter_files.write("mine", tensors, rank_pattern={"o_proj": 7})
    for summary in (inspect(folder), inspect(folder, layout)):
        assert (summary.id, summary.format, summary.kinds) == ("mine", "LORA", ("LowRank",))
        assert summary.ranks == (2, 7)
        assert summary.modules == 3
        assert summary.modules_by_name == {"q_proj": 2, "o_proj": 1}
        assert summary.bytes == sum(path.stat().st_size for path in folder.iterdir())
        assert summary.digest == adapter_files.read(folder).digest
        assert summary.problem is None


def test_a_shira_has_no_ranks(adapter_files: Any) -> None:
    summary = inspect(adapter_files.shira())
    assert (summary.format, summary.kinds, summary.ranks) == ("SHIRA", ("Sparse",), ())
    assert summary.modules_by_name == {"q_proj": 1}


def test_all_kinds_of_deltas_are_told(
    adapter_files: Any, make_lora_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    q_proj, prefix = "model.layers.0.self_attn.q_proj", "base_model.model."
    tensors = {
        **make_lora_tensors(q_proj),
        f"{prefix}{q_proj}.lora_magnitude_vector": torch.ones(36),
        f"{prefix}model.norm.weight": torch.ones(36),
        f"{prefix}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 36),
    }
    options = {"use_dora": True, "trainable_token_indices": [3], "modules_to_save": ["model.norm"]}
    summary = inspect(adapter_files.write("mine", tensors, **options))
    assert summary.kinds == ("LowRank", "NormWeight", "Scale", "TokenRows")
    assert (summary.ranks, summary.problem) == ((2,), None)
    assert summary.modules_by_name == {"embed_tokens": 1, "norm": 1, "q_proj": 1}


def test_what_would_refuse_an_adapter_is_its_problem(adapter_files: Any) -> None:
    summary = inspect(adapter_files.lora(layer_replication=[[0, 4]]))
    assert summary.problem is not None
    assert "layer_replication" in summary.problem
    assert (summary.format, summary.modules, summary.kinds) == ("LORA", 0, ())


def test_an_incomplete_pair_is_seen_without_a_base(
    adapter_files: Any, make_lora_tensors: Callable[..., dict[str, Tensor]]
) -> None:
    tensors = make_lora_tensors()
    tensors.popitem()
    problem = inspect(adapter_files.write("half", tensors)).problem
    assert problem is not None
    assert "no lora_B.weight" in problem


def test_another_base_is_a_problem_only_with_a_layout(
    adapter_files: Any, make_lora_tensors: Callable[..., dict[str, Tensor]], layout: BaseLayout
) -> None:
    folder = adapter_files.write("other", make_lora_tensors("model.layers.77.self_attn.q_proj"))
    assert inspect(folder).problem is None
    summary = inspect(folder, layout)
    assert summary.problem is not None
    assert "base model" in summary.problem
    assert summary.modules == 1


def test_numbers_are_read_only_with_a_layout(
    adapter_files: Any, make_lora_tensors: Callable[..., dict[str, Tensor]], layout: BaseLayout
) -> None:
    tensors = {
        name: torch.full_like(tensor, torch.nan) for name, tensor in make_lora_tensors().items()
    }
    folder = adapter_files.write("diverged", tensors)
    assert inspect(folder).problem is None
    summary = inspect(folder, layout)
    assert summary.problem is not None
    assert "NaN" in summary.problem


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\x80\x04}q\x00.", b"junk" * 9])
def test_bad_weights_are_a_problem_and_no_exception(
    content: bytes | None, adapter_files: Any
) -> None:
    folder = adapter_files.lora()
    (folder / WEIGHTS).unlink()
    if content is not None:
        (folder / WEIGHTS).write_bytes(content)
    summary = inspect(folder)
    assert summary.problem is not None
    assert WEIGHTS in summary.problem
    assert (summary.digest == "") == (content is None)


def test_a_folder_without_anything_is_a_problem_and_no_exception(adapter_files: Any) -> None:
    summary = inspect(adapter_files.root / "missing")
    assert (summary.id, summary.format, summary.bytes, summary.digest) == ("missing", "", 0, "")
    assert summary.problem is not None
    assert CONFIG in summary.problem
