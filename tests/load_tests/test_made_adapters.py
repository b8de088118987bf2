"""Adapters that load tests make: PEFT folders that the store takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from load_tests.made_adapters import AdapterSet, adapter_name, make
from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.engine.models.checkpoint import open_checkpoint
from polydelta.engine.models.decoder import base_layout


def tensors(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(folder / adapter_name(number) / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def layout() -> BaseLayout:
    """Of the default model."""
    checkpoint = open_checkpoint(None)
    return base_layout(checkpoint.config, checkpoint.id)


@pytest.mark.parametrize("modules", ["all", "attention", "qv"])
def test_adapters_fit_the_default_model(tmp_path: Path, layout: BaseLayout, modules: str):
    wanted = AdapterSet(2, (3, 1), modules)
    made = make(wanted, folder=tmp_path)
    for number, rank in enumerate(wanted.ranks):
        config = json.loads((made / adapter_name(number) / "adapter_config.json").read_text())
        assert config["r"] == rank
        expected = {}
        for name, (out_features, in_features) in layout.module_shapes.items():
            if name.rpartition(".")[2] in config["target_modules"]:
                expected[f"base_model.model.{name}.lora_A.weight"] = (rank, in_features)
                expected[f"base_model.model.{name}.lora_B.weight"] = (out_features, rank)
        found = tensors(made, number)
        assert {name: tuple(one.shape) for name, one in found.items()} == expected
        assert len(expected) == 2 * 30 * len(config["target_modules"])
        for name, one in found.items():
            assert one.dtype == torch.bfloat16
            limit = 0.02 if "lora_A" in name else 0.01 / rank**0.5
            assert 0.3 * limit < one.float().abs().mean() < 0.7 * limit
            assert one.float().abs().max() <= limit


def test_ranks_are_taken_in_turn_and_no_two_adapters_are_alike(tmp_path: Path):
    written: list[int] = []
    made = make(AdapterSet(5, (1, 2), "qv"), lambda: written.append(1), tmp_path)
    assert len(written) == 5
    name = "base_model.model.model.layers.7.self_attn.v_proj.lora_A.weight"
    found = [tensors(made, number)[name] for number in range(5)]
    assert [one.shape[0] for one in found] == [1, 2, 1, 2, 1]
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[3])


def test_a_set_is_written_once_and_only_whole(tmp_path: Path):
    wanted = AdapterSet(3, (1,), "qv")

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(wanted, fail, tmp_path)
    assert list(tmp_path.iterdir()) == []
    made = make(wanted, folder=tmp_path)
    before = (made / adapter_name(2) / "adapter_model.safetensors").stat().st_mtime_ns
    assert make(wanted, fail, tmp_path) == made
    assert (made / adapter_name(2) / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert sorted(path.name for path in made.iterdir()) == [adapter_name(n) for n in range(3)]


def test_a_set_of_none_is_an_empty_folder(tmp_path: Path):
    assert list(make(AdapterSet(0), folder=tmp_path).iterdir()) == []
