"""Sums of adapters against the base whose weights were merged with the same sum."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from transformers import LlamaForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS: Mapping[str, PeftConfig] = {
    "lora": LoraConfig(r=5, lora_alpha=9, target_modules=ALL),
    "part": LoraConfig(r=12, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    "shira": ShiraConfig(r=2, target_modules=["k_proj", "v_proj", "down_proj"]),
}


@pytest.fixture
def folders(tiny_model: LlamaForCausalLM, tmp_path: Path) -> dict[str, Path]:
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(tiny_model), copy.deepcopy(config))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name or "shira_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in CONFIGS}


def merged(
    base: LlamaForCausalLM, folders: Mapping[str, Path], weights: Mapping[str, float]
) -> LlamaForCausalLM:
    """The base plus the weighted sum of what PEFT's own merging adds to it."""
    total = copy.deepcopy(base)
    parameters = dict(total.named_parameters())
    for name, weight in weights.items():
        one = PeftModel.from_pretrained(copy.deepcopy(base), folders[name]).merge_and_unload()
        with torch.no_grad():
            for key, value in one.named_parameters():
                parameters[key] += weight * (value - base.get_parameter(key))
    return total.eval()


@pytest.mark.parametrize(
    "weights",
    [
        {"lora": 0.7, "part": 0.5},
        {"lora": -0.4, "shira": 1.5},
        {"lora": 0.3, "part": 2.0, "shira": -0.8},
        {"shira": 0.25},
    ],
    ids=str,
)
def test_a_weighted_sum_equals_merging_the_weighted_sum(
    weights: dict[str, float],
    tiny_model: LlamaForCausalLM,
    folders: dict[str, Path],
    paged: Callable,
) -> None:
    """In one batch with base rows and with one of its parts alone."""
    decoder = paged(tiny_model)
    loaded = {name: decoder.load(folder) for name, folder in folders.items()}
    shares = [(loaded[name], weight) for name, weight in weights.items()]
    tokens = torch.randint(3, 40000, (23,), generator=torch.Generator().manual_seed(4)).tolist()
    rows = [(0, None), (1, shares), (2, loaded["lora"]), (3, shares[::-1])]
    got: dict[int, list[torch.Tensor]] = {row: [] for row, _ in rows}
    for start, stop in ((0, 17), (17, 22), (22, 23)):
        step = decoder.feed(*((row, tokens[start:stop], adapter) for row, adapter in rows))
        for (row, _), logits in zip(rows, step, strict=True):
            got[row].append(logits)
    wanted = {0: {}, 1: weights, 2: {"lora": 1.0}, 3: weights}
    for row, sum_of in wanted.items():
        with torch.inference_mode():
            want = merged(tiny_model, folders, sum_of)(torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(torch.cat(got[row]), want, atol=1e-3, rtol=0)
    assert (torch.cat(got[1]) - torch.cat(got[0])).abs().max() > 0.1, "the sum does nothing"
