from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoKrConfig
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.lokr import FORMAT

CONFIG: dict[str, Any] = {"peft_type": "LOKR", "r": 2, "alpha": 6}
K = "base_model.model.model.layers.1.self_attn.k_proj"
W1, W2, A, B = (f"{K}.lokr_{name}" for name in ("w1", "w2", "w2_a", "w2_b"))
TENSORS = {W1: torch.ones(3, 4), A: torch.ones(4, 2), B: torch.ones(2, 9)}
EVERY_SIDE = ["q_proj", "k_proj", "up_proj", "down_proj"]


VARIANTS: dict[str, dict[str, Any]] = {
    "a product of rank 1": {"r": 1},
    "a product": {"r": 2, "alpha": 5},
    "two whole factors": {"r": 16},
    "two products": {"r": 2, "decompose_both": True},
    "two products or one, as sizes are": {"r": 3, "decompose_both": True, "decompose_factor": 2},
    "factors of other sizes": {"r": 2, "decompose_factor": 4},
    "ranks that differ": {"rank_pattern": {"k_proj": 1, r"layers\.[12]\.mlp\.up_proj": 20}},
    "scales that differ": {"alpha_pattern": {"k_proj": 1, "layers.0.self_attn.q_proj": 3.5}},
    "another start": {"init_weights": "lycoris", "r": 4},
    "options of convolutions": {"use_effective_conv2d": True, "r": 2},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
def test_deltas_equal_those_of_peft(
    base: str, options: dict[str, Any], check_parity: Any, request: pytest.FixtureRequest
) -> None:
    config = LoKrConfig(**{"alpha": 8, **options}, target_modules=EVERY_SIDE)
    adapter = check_parity(config, request.getfixturevalue(base))
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("LOKR", ("Kronecker",), 0)


def test_a_whole_factor_has_the_scale_of_a_rank_that_no_tensor_shows(layout: BaseLayout) -> None:
    tensors = {W1: torch.ones(3, 4), W2: torch.ones(4, 9)}
    config = CONFIG | {"rank_pattern": {"k_proj": 48}, "alpha_pattern": {r".*\.k_proj": 12}}
    ((delta,),) = FORMAT.read(config, tensors, layout).values()
    torch.testing.assert_close(delta.dense(), torch.full((12, 36), 0.25))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "no rank": ({"r": None}, {}, "r is None"),
    "no alpha": ({"alpha": None}, {}, "alpha is None"),
    "a broken pattern": ({"rank_pattern": {"(": 2}}, {}, "no regular expression"),
    "a rank of 0": ({"rank_pattern": {"k_proj": 0}}, {}, r"rank_pattern\['k_proj'\] is 0"),
    "another rank": ({"r": 3}, {}, r"\[2, 9\], but rank 3 .* asks for \[3, 9\]"),
    "ranks that differ": ({}, {B: torch.ones(3, 9)}, r"w2_b' .* asks for \[2, 9\]"),
    "no first factor": ({}, {W1: None}, "no lokr_w1"),
    "no second factor": ({}, {A: None, B: None}, "no lokr_w2"),
    "half a factor": ({}, {B: None}, "no lokr_w2_b"),
    "a factor that is given twice": ({}, {W2: torch.ones(4, 9)}, "lokr_w2 both whole and as a"),
    "the core of a convolution": (
        {},
        {f"{K}.lokr_t2": torch.ones(2, 2, 3, 3)},
        "lokr_t2, which belongs to a convolution",
    ),
    "a convolution's factor": ({}, {W1: torch.ones(3, 4, 1, 1)}, "must have 2 dimensions"),
    "another base": ({}, {W1: torch.ones(3, 3)}, r"shape \[12, 27\], but .* has \[12, 36\]"),
    "factors that would fill the memory": (
        {},
        {A: torch.ones(1 << 20, 2), B: torch.ones(2, 1 << 20)},
        r"shape \[3145728, 4194304\]",
    ),
    "an infinite scale": ({"alpha": 1e39}, {}, "beyond what float32 holds"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, layout: BaseLayout
) -> None:
    FORMAT.read(CONFIG, TENSORS, layout)
    changed = {name: value for name, value in (TENSORS | tensors).items() if value is not None}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, changed, layout)
