from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import SupertuningConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.supertuning import FORMAT

CONFIG: dict[str, Any] = {"peft_type": "SUPERTUNING", "sparsity": 0.99}
K = "model.layers.1.self_attn.k_proj"
PREFIX = f"base_model.model.{K}.supertuning_"
VALUES, PLACES = f"{PREFIX}values", f"{PREFIX}indices"
A, B = f"{PREFIX}lora_A.weight", f"{PREFIX}lora_B.weight"
# Of 12 * 36 entries, 1 % is 4.
TENSORS = {
    VALUES: torch.tensor([1.0, 2, 3, 4]),
    PLACES: torch.tensor([431, 36, 0, 70], dtype=torch.int32),
}
LORA = {A: torch.ones(2, 36), B: torch.ones(12, 2)}
AGAIN: dict[str, Any] = {"save_precomputed_indices": False}


VARIANTS: dict[str, dict[str, Any]] = {
    "the largest": {},
    "the smallest": {"select_top": False},
    "a LoRA beside them": {"r": 3},
    "one with a scale": {"r": 4, "lora_alpha": 3, "select_top": False},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False")
def test_deltas_equal_those_of_peft(
    base: str,
    saved: bool,
    options: dict[str, Any],
    check_parity: Any,
    request: pytest.FixtureRequest,
) -> None:
    config = SupertuningConfig(
        **{"sparsity": 0.9, **options},
        save_precomputed_indices=saved,
        init_weights=False,
        target_modules=["q_proj", "k_proj", "up_proj", "down_proj"],
    )
    adapter = check_parity(config, request.getfixturevalue(base))
    kinds = ("LowRank", "Sparse") if config.r else ("Sparse",)
    assert (adapter.format, adapter.kinds, adapter.max_rank) == (
        "SUPERTUNING",
        kinds,
        config.r or 0,
    )


def test_all_entries_may_change(base_model: LlamaForCausalLM, check_parity: Any) -> None:
    config = SupertuningConfig(sparsity=0, init_weights=False, target_modules=["k_proj"])
    adapter = check_parity(config, base_model)
    assert adapter.modules[K][0].nnz == 12 * 36


def test_places_are_positions_in_the_weight_row_after_row(layout: BaseLayout) -> None:
    ((delta,),) = FORMAT.read(CONFIG, TENSORS, layout).values()
    expected = torch.zeros(12, 36)
    expected[11, 35], expected[1, 0], expected[0, 0], expected[1, 34] = 1, 2, 3, 4
    torch.testing.assert_close(delta.dense(), expected, rtol=0, atol=0)


def test_equal_magnitudes_leave_it_open_which_value_is_whose(
    base_model: LlamaForCausalLM, layout_of: Callable[[LlamaForCausalLM], BaseLayout]
) -> None:
    layout, tensors = layout_of(base_model), {VALUES: TENSORS[VALUES]}
    weight = base_model.get_submodule(K).weight
    (fifth,) = FORMAT.read(CONFIG | AGAIN, tensors, layout)[K]
    assert fifth.nnz == 4
    with torch.no_grad():
        order = weight.abs().flatten().argsort(descending=True)
        # The last one that is taken, and the first one that is not.
        weight.view(-1)[order[4]] = -weight.view(-1)[order[3]]
    with pytest.raises(InvalidAdapterError, match="entries of the same magnitude"):
        FORMAT.read(CONFIG | AGAIN, tensors, layout)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "nothing but zeros": ({"sparsity": 1}, {}, "sparsity is 1.0, but must be from 0"),
    "a word for sparsity": ({"sparsity": "high"}, {}, "sparsity is 'high'"),
    "no places": ({}, {PLACES: None}, "no supertuning_indices"),
    "no values": ({}, {VALUES: None}, "no supertuning_values"),
    "places that are to be found": (AGAIN, {}, "indices, but save_precomputed_indices is false"),
    "fewer values than entries to be found": (
        AGAIN,
        {PLACES: None, VALUES: torch.ones(3)},
        r"\[3\], but sparsity .* asks for \[4\]",
    ),
    "fewer values than places": ({}, {VALUES: torch.ones(3)}, "number of its supertuning_values"),
    "a place outside": (
        {},
        {PLACES: torch.tensor([0, 1, 2, 432], dtype=torch.int32)},
        "not in 0 to 431",
    ),
    "a negative place": ({}, {PLACES: torch.tensor([0, 1, 2, -1])}, "not in 0 to 431"),
    "a place twice": ({}, {PLACES: torch.tensor([0, 1, 2, 1])}, "names an entry twice"),
    "places that are floats": ({}, {PLACES: torch.arange(4.0)}, "indices must be integers"),
    "a matrix of values": (
        {},
        {VALUES: torch.ones(2, 2), PLACES: torch.zeros(2, 2, dtype=torch.int32)},
        "must have 1 dimensions",
    ),
    "a LoRA without a rank": ({}, LORA, "lora_A.weight, but r is null"),
    "an alpha without a rank": ({"lora_alpha": 4}, {}, "lora_alpha is 4 without an r"),
    "a rank without a LoRA": ({"r": 2}, {}, "no supertuning_lora_A.weight"),
    "half a LoRA": ({"r": 2}, LORA | {B: None}, "no supertuning_lora_B.weight"),
    "a LoRA of another rank": ({"r": 3}, LORA, r"\[2, 36\], but r in .* asks for \[3, 36\]"),
    "a rank of 0": ({"r": 0}, LORA, "r is 0, but must be a whole number above 0"),
    "another base": ({"r": 2}, LORA | {B: torch.ones(13, 2)}, r"layer asks for \[12, 2\]"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any],
    tensors: dict[str, Tensor | None],
    message: str,
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
) -> None:
    changed = {name: value for name, value in (TENSORS | tensors).items() if value is not None}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, changed, layout_of(base_model))
