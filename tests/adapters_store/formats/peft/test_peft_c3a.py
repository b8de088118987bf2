from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import C3AConfig
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.c3a import FORMAT

CONFIG: dict[str, Any] = {"peft_type": "C3A", "block_size": 6}
K = "base_model.model.model.layers.1.self_attn.k_proj"
KERNEL = f"{K}.c3a_kernel"


VARIANTS: dict[str, dict[str, Any]] = {
    "blocks of 1": {"block_size": 1},
    "blocks": {"block_size": 4},
    "blocks of an odd size": {"block_size": 3, "target_modules": ["q_proj", "k_proj"]},
    "one row of blocks": {"block_size": 12, "target_modules": ["q_proj", "k_proj"]},
    "sizes that differ": {"block_size": 4, "block_size_pattern": {"k_proj": 6, "up_proj": 2}},
    "a start at zero": {"block_size": 4, "init_weights": True},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
def test_deltas_equal_those_of_peft(
    base: str, options: dict[str, Any], check_parity: Any, request: pytest.FixtureRequest
) -> None:
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    config = C3AConfig(**{"target_modules": targets, "init_weights": "gaussian", **options})
    adapter = check_parity(config, request.getfixturevalue(base))
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("C3A", ("Circulant",), 0)


def test_the_first_row_of_a_block_is_the_kernel_over_the_number_of_inputs(
    layout: BaseLayout,
) -> None:
    kernel = torch.randn(2, 6, 6)
    ((delta,),) = FORMAT.read(CONFIG, {KERNEL: kernel}, layout).values()
    dense = delta.dense()
    torch.testing.assert_close(dense[6, 12:18] * 36, kernel[1, 2])
    torch.testing.assert_close(dense[7, 12:18] * 36, kernel[1, 2].roll(1))


REFUSED: dict[str, tuple[dict[str, Any], Tensor, str]] = {
    "another base": ({}, torch.ones(2, 7, 6), r"shape \[12, 42\], but .* has \[12, 36\]"),
    "blocks that leave inputs over": ({}, torch.ones(2, 7, 5), r"shape \[10, 35\]"),
    "blocks of nothing": ({}, torch.ones(2, 6, 0), r"shape \[0, 0\]"),
    "a matrix": ({}, torch.ones(12, 36), "must have 3 dimensions"),
}


@pytest.mark.parametrize(("config", "kernel", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any], kernel: Tensor, message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, {KERNEL: kernel}, layout)


def test_a_tensor_of_another_format_is_refused_by_name(layout: BaseLayout) -> None:
    tensors = {KERNEL: torch.ones(2, 6, 6), f"{K}.hra_u": torch.ones(36, 2)}
    with pytest.raises(InvalidAdapterError, match="hra_u' cannot be served"):
        FORMAT.read(CONFIG, tensors, layout)
