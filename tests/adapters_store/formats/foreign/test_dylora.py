from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import LowRank
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.registry import format_of

PREFIX = "base_model.model."
DOWN0 = "model.layers.0.mlp.down_proj"
OUT, IN, RANK, ALPHA = 36, 52, 5, 9
A, B = f"{PREFIX}{DOWN0}.lora_A.weight", f"{PREFIX}{DOWN0}.lora_B.weight"

CONFIG = {"peft_type": "DYLORA", "r": RANK, "lora_alpha": ALPHA}


def tensors() -> dict[str, Tensor]:
    torch.manual_seed(2)
    return {A: torch.randn(RANK, IN), B: torch.randn(OUT, RANK)}


def read_one(config: dict[str, Any], tensors: dict[str, Tensor], layout: BaseLayout) -> LowRank:
    _, parser = format_of(config)
    (outline,) = parser.outline(
        config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ).values()
    ((delta,),) = parser.read(config, tensors, layout).values()
    assert isinstance(delta, LowRank)
    assert (outline.kind, outline.rank) == (LowRank.kind, delta.rank)
    return delta


def cut(matrix: Tensor, rank: int) -> Tensor:
    """The authors' nested layer: columns [:, :rank], made up for those that are missing."""
    return matrix[:, :rank] * (matrix.shape[1] / rank) ** 0.5


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_a_lower_rank_is_cut_and_scaled_as_the_authors_do(rank: int, layout: BaseLayout) -> None:
    given = tensors()
    delta = read_one(CONFIG | {"polydelta_rank": rank}, given, layout)
    assert delta.rank == rank
    x = torch.randn(4, IN)
    want = (x @ cut(given[A].T, rank) @ cut(given[B], rank).T) * (ALPHA / RANK)
    torch.testing.assert_close(x @ delta.dense().T, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [{}, {"polydelta_rank": None}])
def test_without_a_rank_of_ours_it_is_the_whole_lora(
    config: dict[str, Any], layout: BaseLayout
) -> None:
    given = tensors()
    delta = read_one(CONFIG | config, given, layout)
    torch.testing.assert_close(delta.dense(), given[B] @ given[A] * (ALPHA / RANK))


def test_a_cut_keeps_no_memory_of_the_rest(layout: BaseLayout) -> None:
    delta = read_one(CONFIG | {"polydelta_rank": 2}, tensors(), layout)
    for part in (delta.a, delta.b):
        assert part.is_contiguous()
        assert part.untyped_storage().nbytes() == part.nbytes


def test_the_keys_of_peft_s_lora_pass(layout: BaseLayout) -> None:
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["down_proj"]).to_dict() | CONFIG
    read_one(config, tensors(), layout)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "more than was trained": ({"polydelta_rank": 6}, "polydelta_rank is 6.* 1 to 5"),
    "a rank beyond floats": ({"r": 10**400}, "r is 1000.* below 2147483648"),
    "rank zero": ({"polydelta_rank": 0}, "polydelta_rank is 0"),
    "a rank that is no number": ({"polydelta_rank": True}, "polydelta_rank is True"),
    "rank-stabilised scales": ({"use_rslora": True}, "use_rslora is True; it is an option of"),
    "ranks of some modules": ({"rank_pattern": {"down_proj": 2}}, "rank_pattern is"),
    "another rank than the file's": ({"r": 4}, r"but rank 4 \(r in"),
}


@pytest.mark.parametrize(("option", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_option_that_is_not_served_is_refused_by_name(
    option: dict[str, Any], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read_one(CONFIG | option, tensors(), layout)


@pytest.mark.parametrize(
    ("name", "shape"), [(A, (RANK, IN - 1)), (B, (OUT + 1, RANK))], ids=["A", "B"]
)
def test_tensors_of_another_layer_are_refused(
    name: str, shape: tuple[int, int], layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match="the base model's layer asks for"):
        read_one(CONFIG, tensors() | {name: torch.ones(shape)}, layout)
