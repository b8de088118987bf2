"""Adapters served unmerged from the pool, against PEFT's own forward, float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from transformers import LlamaForCausalLM

from polydelta.adapters_store.errors import InvalidAdapterError

ADAPTERS: dict[str, PeftConfig] = {
    **{
        f"LoRA of rank {rank} on all linear layers": LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear"
        )
        for rank in (1, 2, 3, 8, 12, 16, 33, 64)
    },
    "LoRA with rank and alpha patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        rank_pattern={"q_proj": 7, r"layers\.1\.mlp\.up_proj": 3, "^model.layers.2": 5},
        alpha_pattern={"v_proj": 11, r"model\.layers\.2\.self_attn\.o_proj": 1},
    ),
    "rsLoRA": LoraConfig(r=9, lora_alpha=5, use_rslora=True, target_modules="all-linear"),
    "rsLoRA with a rank pattern": LoraConfig(
        r=9, lora_alpha=5, use_rslora=True, target_modules="all-linear", rank_pattern={"k_proj": 2}
    ),
    "LoRA on a list of modules": LoraConfig(r=6, target_modules=["k_proj", "down_proj"]),
    "LoRA on modules by regex": LoraConfig(r=6, target_modules=r".*\.[02]\..*(gate|o)_proj"),
    "LoRA on one layer only": LoraConfig(
        r=5, target_modules=["q_proj", "v_proj", "up_proj"], layers_to_transform=[1]
    ),
    "LoRA with modules left out": LoraConfig(
        r=5, target_modules="all-linear", exclude_modules=["q_proj", "gate_proj"]
    ),
    "SHiRA on all linear layers": ShiraConfig(
        r=3, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    ),
    "SHiRA on some modules": ShiraConfig(r=1, target_modules=["v_proj", "gate_proj"]),
}

Save = Callable[[str, PeftConfig], Path]


@pytest.fixture
def save(tiny_model: LlamaForCausalLM, tmp_path: Path) -> Save:
    """Makes an adapter with PEFT, its weights all random, and saves it as PEFT does."""

    def save(name: str, config: PeftConfig) -> Path:
        torch.manual_seed(len(name))
        model = get_peft_model(copy.deepcopy(tiny_model), copy.deepcopy(config))
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name or "shira_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


def expected(base: LlamaForCausalLM, folder: Path | None, tokens: list[int]) -> torch.Tensor:
    """What transformers and PEFT say, `[tokens, vocab]`."""
    model: Any = copy.deepcopy(base)
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


def some_tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 40000, (count,), generator=generator).tolist()


@pytest.mark.parametrize("scattered", [False, True], ids=["in-one-run", "scattered-pages"])
@pytest.mark.parametrize("name", ADAPTERS, ids=lambda name: name.replace(" ", "-"))
def test_logits_equal_those_of_peft(
    name: str, scattered: bool, tiny_model: LlamaForCausalLM, paged: Callable, save: Save
) -> None:
    folder = save("adapter", ADAPTERS[name])
    decoder, tokens = paged(tiny_model), some_tokens(27)
    adapter = decoder.load(folder, scattered)
    chunks = [(0, 19), (19, 25), (25, 26), (26, 27)]
    logits = [decoder.feed((0, tokens[a:b], adapter))[0] for a, b in chunks]
    want = expected(tiny_model, folder, tokens)
    assert (want - expected(tiny_model, None, tokens)).abs().max() > 0.1, "the adapter does nothing"
    torch.testing.assert_close(torch.cat(logits), want, atol=1e-3, rtol=0)


def test_kinds_and_ranks_and_base_rows_mix_in_one_step(
    tiny_model: LlamaForCausalLM, paged: Callable, save: Save
) -> None:
    """Base rows lie between adapter rows, in prefill and in decode."""
    decoder = paged(tiny_model)
    kinds = [
        "LoRA of rank 3 on all linear layers",
        "SHiRA on all linear layers",
        "LoRA of rank 12 on all linear layers",
        "LoRA on one layer only",
        "LoRA of rank 64 on all linear layers",
        "SHiRA on some modules",
    ]
    folders = [save(f"adapter-{i}", ADAPTERS[kind]) for i, kind in enumerate(kinds)]
    loaded = [decoder.load(folder, scattered=bool(i % 2)) for i, folder in enumerate(folders)]
    rows = [(None, None)]
    for folder, adapter in zip(folders, loaded, strict=True):
        rows += [(folder, adapter), (None, None)]
    prompts = [some_tokens(7 + 3 * i, seed=i) for i in range(len(rows))]

    steps = [
        decoder.feed(*((i, prompts[i][:-2], rows[i][1]) for i in range(len(rows)))),
        decoder.feed(*((i, prompts[i][-2:-1], rows[i][1]) for i in range(len(rows)))),
        decoder.feed(*((i, prompts[i][-1:], rows[i][1]) for i in reversed(range(len(rows)))))[::-1],
    ]
    for i, (folder, _) in enumerate(rows):
        got = torch.cat([step[i] for step in steps])
        want = expected(tiny_model, folder, prompts[i])
        torch.testing.assert_close(got, want, atol=1e-3, rtol=0)


def test_an_adapter_that_matches_no_module_is_an_error(
    tiny_model: LlamaForCausalLM, paged: Callable, save: Save
) -> None:
    folder = save("adapter", ADAPTERS["LoRA on a list of modules"])
    deeper = copy.deepcopy(tiny_model.config)
    deeper.hidden_size, deeper.intermediate_size = 48, 80
    other = LlamaForCausalLM(deeper)
    with pytest.raises(InvalidAdapterError):
        paged(other).load(folder)
