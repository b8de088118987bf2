"""Merged adapters against PEFT: its own merging, and its loading of what is written; float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.tuners.lora.model
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import Adapter
from polydelta.adapters_store.formats import read_adapter
from polydelta.adapters_store.formats.peft_writer import write_adapter
from polydelta.adapters_store.merge_recipe import Election, MergeRecipe, Method
from polydelta.adapters_store.merging import MergedAdapter, merge
from polydelta.adapters_store.reference import AdapterRef

# Ranks and scales differ, and one of them lacks a module. Sorted by name, these modules come in the
# order in which PEFT meets them, so that equal seeds draw equal masks.
CONFIGS = (
    LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    LoraConfig(r=7, lora_alpha=3, use_rslora=True, target_modules=["v_proj"]),
    LoraConfig(r=5, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}),
)
WEIGHTS = (0.7, 1.3, -0.4)
SEED = 17

Sources = list[tuple[Adapter, float]]


def randomised(base: LlamaForCausalLM, config: PeftConfig, seed: int, folder: Path) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "shira_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folders(tiny_model: LlamaForCausalLM, tmp_path: Path) -> list[Path]:
    return [
        randomised(tiny_model, config, seed, tmp_path / f"lora-{seed}")
        for seed, config in enumerate(CONFIGS)
    ]


def read(folder: Path, layout: BaseLayout) -> Adapter:
    return read_adapter(AdapterRef(folder.name, 1, folder), layout)


def merged_by_peft(base: LlamaForCausalLM, folders: list[Path], **options: Any) -> Any:
    names = [folder.name for folder in folders]
    model = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], names[0])
    for folder in folders[1:]:
        model.load_adapter(folder, folder.name)
    model.add_weighted_adapter(names, list(WEIGHTS), "merged", **options)
    return model


def changes_in_peft(model: Any, name: str) -> dict[str, Tensor]:
    prefix = "base_model.model."
    return {
        path.removeprefix(prefix): module.get_delta_weight(name).detach().to_dense()
        for path, module in model.named_modules()
        if name in getattr(module, "lora_A", ()) or name in getattr(module, "shira_weight", ())
    }


def assert_same(merged: MergedAdapter, expected: dict[str, Tensor]) -> None:
    assert merged.modules.keys() == expected.keys()
    for module, (delta,) in merged.modules.items():
        torch.testing.assert_close(delta.dense(), expected[module], atol=1e-5, rtol=0)


PARITY: dict[str, tuple[MergeRecipe, dict[str, Any]]] = {
    "cat": (MergeRecipe(), {"combination_type": "cat"}),
    "svd": (MergeRecipe(rank=3), {"combination_type": "svd", "svd_rank": 3}),
    "magnitude": (
        MergeRecipe(Method.MAGNITUDE, 0.37),
        {"combination_type": "magnitude_prune_svd", "density": 0.37},
    ),
    "ties": (MergeRecipe(Method.TIES, 0.2), {"combination_type": "ties_svd", "density": 0.2}),
    "ties of full density": (
        MergeRecipe(Method.TIES, 1.0, rank=11),
        {"combination_type": "ties_svd", "density": 1.0, "svd_rank": 11},
    ),
    "ties by count": (
        MergeRecipe(Method.TIES, 0.6, election=Election.COUNT),
        {"combination_type": "ties_svd", "density": 0.6, "majority_sign_method": "frequency"},
    ),
    "dare": (
        MergeRecipe(Method.DARE, 0.5, seed=SEED),
        {"combination_type": "dare_linear_svd", "density": 0.5},
    ),
    "dare-ties": (
        MergeRecipe(Method.DARE_TIES, 0.3, seed=SEED, rank=12),
        {"combination_type": "dare_ties_svd", "density": 0.3, "svd_rank": 12},
    ),
}


@pytest.mark.parametrize("name", PARITY)
def test_merged_changes_equal_those_of_peft(
    name: str,
    tiny_model: LlamaForCausalLM,
    tiny_layout: BaseLayout,
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, options = PARITY[name]
    # PEFT draws from torch's own generator, once the new adapter has its first weights.
    monkeypatch.setattr(
        peft.tuners.lora.model, "_freeze_adapter", lambda model, adapter: torch.manual_seed(SEED)
    )
    expected = changes_in_peft(merged_by_peft(tiny_model, folders, **options), "merged")
    sources = [(read(f, tiny_layout), w) for f, w in zip(folders, WEIGHTS, strict=True)]
    merged = merge(sources, recipe)
    assert max(float(change.abs().max()) for change in expected.values()) > 0.01
    assert_same(merged, expected)


def logits(model: Any, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize(
    "recipe",
    [MergeRecipe(), MergeRecipe(rank=6), MergeRecipe(Method.TIES, 0.4)],
    ids=["ranks-that-differ", "one-rank", "ties"],
)
def test_peft_computes_with_a_written_lora_what_we_compute(
    recipe: MergeRecipe,
    tiny_model: LlamaForCausalLM,
    tiny_layout: BaseLayout,
    folders: list[Path],
    tmp_path: Path,
    paged: Callable,
) -> None:
    sources = [(read(f, tiny_layout), w) for f, w in zip(folders, WEIGHTS, strict=True)]
    check_written(merge(sources, recipe), tiny_model, tmp_path / "merged", paged)


def test_peft_computes_with_a_written_shira_what_we_compute(
    tiny_model: LlamaForCausalLM, tiny_layout: BaseLayout, tmp_path: Path, paged: Callable
) -> None:
    """Entries overlap, and one adapter has modules of its own, so some are filled up."""
    configs = (
        ShiraConfig(r=2, target_modules=["q_proj", "v_proj"], random_seed=1),
        ShiraConfig(r=3, target_modules=["v_proj", "down_proj"], random_seed=2),
    )
    sources = [
        (read(randomised(tiny_model, c, i, tmp_path / f"shira-{i}"), tiny_layout), 1.0 - 1.5 * i)
        for i, c in enumerate(configs)
    ]
    check_written(merge(sources, MergeRecipe()), tiny_model, tmp_path / "merged", paged)


def check_written(
    merged: MergedAdapter, base: LlamaForCausalLM, folder: Path, paged: Callable
) -> None:
    write_adapter(folder, merged.modules, "tiny", torch.float32)
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    assert_same(merged, changes_in_peft(model, "default"))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40000, (23,), generator=generator).tolist()
    want = logits(model, tokens)
    assert (want - logits(base, tokens)).abs().max() > 0.1, "the adapter does nothing"
    decoder = paged(base)
    (got,) = decoder.feed((0, tokens, decoder.load(folder)))
    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
