from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PsoftConfig
from torch import Tensor
from transformers import LlamaForCausalLM

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.psoft import FORMAT

CONFIG: dict[str, Any] = {"peft_type": "PSOFT", "r": 3, "psoft_alpha": 6}
K = "model.layers.1.self_attn.k_proj"
PREFIX = f"base_model.model.{K}.psoft_R."
R, ROWS, COLUMNS = f"{PREFIX}weight", f"{PREFIX}vector_b", f"{PREFIX}vector_a"
TENSORS = {R: torch.ones(3), ROWS: torch.ones(3), COLUMNS: torch.ones(3)}
# Wide, tall and square ones.
EVERY_SIDE = ["q_proj", "k_proj", "up_proj", "down_proj"]


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "another scale": {"psoft_alpha": 32},
    "pissa": {"ab_svd_init": "pissa_init", "psoft_alpha": 7},
    "a free matrix": {"psoft_orth": False},
    "no vectors": {"psoft_mag_a": False, "psoft_mag_b": False},
    "a vector on one side": {"psoft_mag_a": False},
    "a vector on the other side": {"psoft_mag_b": False, "ab_svd_init": "pissa_init"},
    "a randomized decomposition": {"psoft_svd": "lowrank", "random_seed": 5},
    "one that is hardly iterated": {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1},
    "rank 1": {"r": 1},
    "all that k_proj has": {"r": 12},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
def test_deltas_equal_those_of_peft(
    base: str, options: dict[str, Any], check_parity: Any, request: pytest.FixtureRequest
) -> None:
    options = {"r": 5, "psoft_alpha": 10} | options
    config = PsoftConfig(**options, init_weights=False, target_modules=EVERY_SIDE)
    model = request.getfixturevalue(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    adapter = check_parity(config, model)
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("PSOFT", ("LowRank",), config.r)


@pytest.mark.parametrize("eps", [None, 0.2])
@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 9])
def test_each_number_of_terms_sums_the_series_of_peft(
    terms: int, eps: float | None, biased_model: LlamaForCausalLM, check_parity: Any
) -> None:
    config = PsoftConfig(
        r=6,
        use_cayley_neumann=True,
        num_cayley_neumann_terms=terms,
        cayley_neumann_eps=eps,
        init_weights=False,
        target_modules=EVERY_SIDE,
    )
    with torch.no_grad():
        for parameter in biased_model.parameters():
            parameter.mul_(5)
    check_parity(config, biased_model)


def test_the_process_wide_generator_is_left_alone(
    base_model: LlamaForCausalLM, layout_of: Callable[[LlamaForCausalLM], BaseLayout]
) -> None:
    before = torch.random.get_rng_state()
    FORMAT.read(CONFIG | {"psoft_svd": "lowrank"}, TENSORS, layout_of(base_model))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("svd", ["full", "lowrank"])
def test_singular_vectors_that_the_base_leaves_open_are_refused(
    svd: str, base_model: LlamaForCausalLM, layout_of: Callable[[LlamaForCausalLM], BaseLayout]
) -> None:
    with torch.no_grad():
        base_model.get_submodule(K).weight.copy_(torch.eye(12, 36))
    with pytest.raises(InvalidAdapterError, match="singular values so close"):
        FORMAT.read(CONFIG | {"psoft_svd": svd}, TENSORS, layout_of(base_model))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "no rank": ({"r": None}, {}, "r is None"),
    "another rank": ({"r": 4}, {}, r"\[3\], but r = 4 .* asks for \[6\]"),
    "no alpha": ({"psoft_alpha": None}, {}, "psoft_alpha is None"),
    "an alpha of 0": ({"psoft_alpha": 0}, {}, "psoft_alpha is 0, but must be above 0"),
    "an unknown start": ({"ab_svd_init": "lora"}, {}, "ab_svd_init is 'lora'"),
    "an unknown decomposition": ({"psoft_svd": "qr"}, {}, "psoft_svd is 'qr'"),
    "a seed out of range": (
        {"psoft_svd": "lowrank", "random_seed": 1 << 64},
        {},
        "random_seed is 18446744073709551616",
    ),
    "very many iterations": (
        {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 10**9},
        {},
        "niter is 1000000000, more than 20",
    ),
    "no terms": (
        {"use_cayley_neumann": True, "num_cayley_neumann_terms": 0},
        {},
        "num_cayley_neumann_terms is 0",
    ),
    "a bound of 1": (
        {"use_cayley_neumann": True, "cayley_neumann_eps": 1},
        {},
        "cayley_neumann_eps is 1, but must lie between",
    ),
    "a free matrix that is an orthogonal one": (
        {"psoft_orth": False},
        {},
        r"\[3\], but r = 3 .* asks for \[3, 3\]",
    ),
    "an orthogonal matrix that is a free one": ({}, {R: torch.ones(3, 3)}, r"asks for \[3\]"),
    "no vector": ({}, {ROWS: None}, "no psoft_R.vector_b"),
    "a vector too many": (
        {"psoft_mag_a": False},
        {},
        "has psoft_R.vector_a, but psoft_mag_a is false",
    ),
    "a vector of another rank": ({}, {COLUMNS: torch.ones(4)}, r"vector_a' .* asks for \[3\]"),
    "numbers beyond reason": ({}, {R: torch.full((3,), 1e30)}, "so large that no rotation"),
    "no matrix": ({}, {R: None}, "no psoft_R.weight"),
    "more than the layer's sides": (
        {"r": 13},
        {R: torch.ones(78), ROWS: torch.ones(13), COLUMNS: torch.ones(13)},
        "r is 13, more than the smaller side",
    ),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any],
    tensors: dict[str, Tensor | None],
    message: str,
    base_model: LlamaForCausalLM,
    layout_of: Callable[[LlamaForCausalLM], BaseLayout],
) -> None:
    layout = layout_of(base_model)
    FORMAT.read(CONFIG, TENSORS, layout)
    changed = {name: value for name, value in (TENSORS | tensors).items() if value is not None}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, changed, layout)
