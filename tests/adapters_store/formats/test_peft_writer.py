from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter, Delta, LowRank, Sparse
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_writer import write_adapter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Q1, K2, DOWN0 = (
    f"model.layers.{part}"
    for part in ("1.self_attn.q_proj", "2.self_attn.k_proj", "0.mlp.down_proj")
)

Read = Callable[[Path], Adapter]


def low_rank(layout: BaseLayout, module: str, rank: int) -> LowRank:
    rows, columns = layout.module_shapes[module]
    return LowRank(torch.randn(rank, columns), torch.randn(rows, rank))


def sparse(layout: BaseLayout, module: str, nnz: int) -> Sparse:
    rows, columns = shape = layout.module_shapes[module]
    places = torch.randperm(rows * columns)[:nnz].sort().values
    pointers = torch.zeros(rows + 1, dtype=torch.int32)
    pointers[1:] = (places // columns).bincount(minlength=rows).cumsum(0)
    return Sparse(shape, pointers, (places % columns).int(), torch.randn(nnz))


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).to(torch.float32)


@pytest.fixture
def read(adapter_files: Any) -> Read:
    return adapter_files.read


@pytest.fixture
def some(layout: BaseLayout) -> dict[str, tuple[Delta, ...]]:
    return {Q1: (low_rank(layout, Q1, 2),)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_deltas_of_any_rank_are_read_back_bit_for_bit(
    dtype: torch.dtype, layout: BaseLayout, read: Read, tmp_path: Path
) -> None:
    modules = {m: (low_rank(layout, m, r),) for m, r in ((Q1, 3), (K2, 40), (DOWN0, 1))}
    write_adapter(tmp_path / "out", modules, "some/base", dtype)
    adapter = read(tmp_path / "out")
    assert adapter.format == "LORA"
    assert adapter.modules.keys() == modules.keys()
    for module, (delta,) in adapter.modules.items():
        assert isinstance(delta, LowRank)
        assert torch.equal(delta.a, rounded(modules[module][0].a, dtype))
        assert torch.equal(delta.b, rounded(modules[module][0].b, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_deltas_are_read_back_bit_for_bit(
    dtype: torch.dtype, layout: BaseLayout, read: Read, tmp_path: Path
) -> None:
    """As many entries as SHiRA's files hold, so that none is added."""
    modules = {m: (sparse(layout, m, 3 * sum(layout.module_shapes[m])),) for m in (Q1, K2, DOWN0)}
    write_adapter(tmp_path / "out", modules, "some/base", dtype)
    adapter = read(tmp_path / "out")
    assert adapter.format == "SHIRA"
    assert adapter.modules.keys() == modules.keys()
    for module, (delta,) in adapter.modules.items():
        assert isinstance(delta, Sparse)
        assert torch.equal(delta.row_pointers, modules[module][0].row_pointers)
        assert torch.equal(delta.columns, modules[module][0].columns)
        assert torch.equal(delta.values, rounded(modules[module][0].values, dtype))


@pytest.mark.parametrize("counts", [(1, 0, 0), (145, 7, 288), (73, 89, 96), (648, 432, 5)])
def test_missing_entries_are_filled_up_with_zeros(
    counts: tuple[int, int, int], layout: BaseLayout, read: Read, tmp_path: Path
) -> None:
    """Up to a k_proj that has an entry everywhere (9 * 48 = 12 * 36)."""
    modules = {m: (sparse(layout, m, n),) for m, n in zip((Q1, K2, DOWN0), counts, strict=True)}
    write_adapter(tmp_path / "out", modules, "some/base", torch.float32)
    r = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"]
    for module, (delta,) in read(tmp_path / "out").modules.items():
        assert isinstance(delta, Sparse)
        assert delta.nnz == r * sum(delta.shape)
        assert torch.equal(delta.dense(), modules[module][0].dense())
    assert r == max(-(-d.nnz // sum(d.shape)) for (d,) in modules.values())


def test_zeros_that_fill_up_are_spread_over_the_rows(
    layout: BaseLayout, read: Read, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "out", {Q1: (sparse(layout, Q1, 1),)}, "some/base", torch.float32)
    ((delta,),) = read(tmp_path / "out").modules.values()
    assert isinstance(delta, Sparse)
    assert int(delta.row_pointers.diff().max()) <= 4, "72 entries over 36 rows"


def test_the_config_tells_the_base_and_a_scale_of_1(layout: BaseLayout, tmp_path: Path) -> None:
    modules = {m: (low_rank(layout, m, r),) for m, r in ((Q1, 3), (K2, 5))}
    write_adapter(tmp_path / "out", modules, "some/base", torch.float32)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", "some/base")
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert list(config["rank_pattern"].values()) == [3]
    assert config["target_modules"] == [Q1, K2]


def test_weights_have_the_asked_dtype_and_indices_stay_whole(
    layout: BaseLayout, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "out", {Q1: (sparse(layout, Q1, 9),)}, "b", torch.bfloat16)
    dtypes = {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()}
    assert dtypes == {torch.bfloat16, torch.int32}


def test_an_empty_folder_is_filled_and_parents_are_made(
    some: Any, read: Read, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    write_adapter(tmp_path / "empty", some, "b", torch.float32)
    write_adapter(tmp_path / "not" / "there" / "yet", some, "b", torch.float32)
    assert read(tmp_path / "empty").modules.keys() == {Q1}
    assert read(tmp_path / "not" / "there" / "yet").modules.keys() == {Q1}


def test_numbers_that_do_not_fit_the_dtype_are_refused(layout: BaseLayout, tmp_path: Path) -> None:
    delta = low_rank(layout, Q1, 2)
    modules = {Q1: (LowRank(delta.a, delta.b * 1e6),)}
    with pytest.raises(InvalidAdapterError, match=r"float16, but tensor '.*lora_B.weight'"):
        write_adapter(tmp_path / "out", modules, "b", torch.float16)
    assert list(tmp_path.iterdir()) == []
    write_adapter(tmp_path / "out", modules, "b", torch.bfloat16)


def test_modules_may_share_a_tensor(layout: BaseLayout, read: Read, tmp_path: Path) -> None:
    one = low_rank(layout, Q1, 2)
    modules = {Q1: (one,), Q1.replace("1", "2"): (one,)}
    write_adapter(tmp_path / "out", modules, "b", torch.float32)
    for deltas in read(tmp_path / "out").modules.values():
        assert torch.equal(deltas[0].a, one.a)


def test_what_one_file_cannot_hold_is_refused(layout: BaseLayout, tmp_path: Path) -> None:
    both = {Q1: (low_rank(layout, Q1, 2),), K2: (sparse(layout, K2, 3),)}
    with pytest.raises(InvalidAdapterError, match="one kind"):
        write_adapter(tmp_path / "out", both, "b", torch.float32)
    twice = {Q1: (low_rank(layout, Q1, 2), sparse(layout, Q1, 3))}
    with pytest.raises(InvalidAdapterError, match="one for each module"):
        write_adapter(tmp_path / "out", twice, "b", torch.float32)
    with pytest.raises(InvalidAdapterError, match="no module"):
        write_adapter(tmp_path / "out", {}, "b", torch.float32)


def test_a_sparse_delta_too_full_for_the_smallest_module_is_refused(
    layout: BaseLayout, tmp_path: Path
) -> None:
    modules = {Q1: (sparse(layout, Q1, 649),), K2: (sparse(layout, K2, 3),)}
    with pytest.raises(InvalidAdapterError, match=rf"'{Q1}' needs 10.*'{K2}'.*480 entries of 432"):
        write_adapter(tmp_path / "out", modules, "b", torch.float32)
