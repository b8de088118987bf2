from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import VBLoRAConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.vblora import FORMAT

MODULE = "base_model.model.model.layers.1.self_attn.q_proj"
BANK = "base_model.vblora_vector_bank"
LOGITS_A, LOGITS_B = (f"{MODULE}.vblora_logits_{letter}" for letter in "AB")
INDICES_A, WEIGHTS_B = f"{LOGITS_A}_topk_indices", f"{LOGITS_B}_topk_weights"
CONFIG = {"peft_type": "VBLORA", "r": 2, "num_vectors": 7, "vector_length": 12, "topk": 3}
CHOSEN = CONFIG | {"save_only_topk_weights": True}


def good() -> dict[str, Tensor]:
    return {
        BANK: torch.randn(7, 12),
        LOGITS_A: torch.randn(2, 3, 7),
        LOGITS_B: torch.randn(3, 2, 7),
    }


def good_choice() -> dict[str, Tensor]:
    return {
        BANK: torch.randn(7, 12),
        f"{LOGITS_A}_topk_indices": torch.randint(7, (2, 3, 3), dtype=torch.uint8),
        f"{LOGITS_A}_topk_weights": torch.rand(2, 3, 2) / 2,
        f"{LOGITS_B}_topk_indices": torch.randint(7, (3, 2, 3), dtype=torch.uint8),
        f"{LOGITS_B}_topk_weights": torch.rand(3, 2, 2) / 2,
    }


CONFIGS: dict[str, dict[str, Any]] = {
    "an odd rank": {"r": 3},
    "vectors of 2": {"vector_length": 2, "num_vectors": 5},
    "one vector each": {"topk": 1},
    "mixtures of all": {"topk": 9},
    "trained biases": {"bias": "vblora_only"},
    "mixtures of three, sharply": {"topk": 3, "init_logits_std": 5.0},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("chosen", [False, True], ids=["logits", "choices"])
def test_deltas_equal_those_of_peft(
    chosen: bool, options: dict[str, Any], biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    options = {"r": 2, "num_vectors": 9, "vector_length": 4, **options}
    config = VBLoRAConfig(
        save_only_topk_weights=chosen,
        init_vector_bank_bound=0.5,
        target_modules=["q_proj", "v_proj", "down_proj"],
        **options,
    )
    adapter = check_parity(config, biased_model)
    kinds = ("Bias", "LowRank") if "bias" in options else ("LowRank",)
    assert (adapter.kinds, adapter.max_rank) == (kinds, options["r"])


def test_the_numbers_of_more_than_255_vectors_are_understood(
    base_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = VBLoRAConfig(
        num_vectors=300,
        vector_length=4,
        init_vector_bank_bound=1.0,
        save_only_topk_weights=True,
        target_modules=["lm_head"],
    )
    assert list(check_parity(config, base_model).modules) == ["lm_head"]


REFUSED = {
    "another rank": (CONFIG | {"r": 3}, r"logits_A' has shape \[2, 3, 7\]"),
    "other vectors": (CONFIG | {"vector_length": 4}, r"vector_bank' has shape \[7, 12\]"),
    "another number of them": (CONFIG | {"num_vectors": 8}, r"vector_bank' has shape \[7, 12\]"),
    "more than all of them": (CONFIG | {"topk": 8}, "topk is 8, but there are only 7"),
    "choices that are not there": (CHOSEN, "no vblora_logits_A_topk_indices"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    config: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(config, good(), layout)


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "A of another base": ({LOGITS_A: torch.ones(2, 4, 7)}, r"has shape \[36, 48\]"),
    "B of another base": ({LOGITS_B: torch.ones(1, 2, 7)}, r"has shape \[12, 36\]"),
    "B the other way round": ({LOGITS_B: torch.ones(2, 3, 7)}, r"logits_B' has shape \[2, 3, 7\]"),
    "a choice beside the logits": (
        {INDICES_A: torch.zeros(2, 3, 3, dtype=torch.uint8)},
        "has vblora_logits_A_topk_indices, but save_only_topk_weights is false",
    ),
    "a tensor of another format": ({f"{MODULE}.lora_A": torch.ones(2, 36)}, "cannot be served"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_tensors_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG, good() | changed, layout)


WRONG_CHOICES: dict[str, tuple[dict[str, Tensor], str]] = {
    "a vector that the bank lacks": (
        {INDICES_A: torch.full((2, 3, 3), 7, dtype=torch.uint8)},
        "indices that are not in 0 to 6",
    ),
    "a negative one": ({INDICES_A: torch.full((2, 3, 3), -1)}, "indices that are not in 0 to 6"),
    "a fraction for a number": ({INDICES_A: torch.ones(2, 3, 3)}, "is torch.float32: indices"),
    "a choice of two": ({INDICES_A: torch.zeros(2, 3, 2, dtype=torch.uint8)}, "topk_indices' has"),
    "all weights": ({WEIGHTS_B: torch.ones(3, 2, 3)}, r"topk_weights' has shape \[3, 2, 3\]"),
    "logits beside the choice": ({LOGITS_B: torch.ones(3, 2, 7)}, "has vblora_logits_B, but"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG_CHOICES.values(), ids=WRONG_CHOICES.keys())
def test_wrong_choices_are_refused_by_name(
    changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    FORMAT.read(CHOSEN, good_choice(), layout)
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CHOSEN, good_choice() | changed, layout)
