from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.delta import TopK
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.registry import format_of

PREFIX = "base_model.model."
GATE1 = "model.layers.1.mlp.gate_proj"
OUT, IN, RANK, KEEP = 52, 36, 7, 3
CONFIG = {"peft_type": "FLYLORA", "r": RANK, "k": KEEP, "alpha": 5}


def tensors(**changed: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(4)
    sparse = torch.randn(RANK, IN) * (torch.rand(RANK, IN) < KEEP / RANK)
    parts = {"A": sparse, "B": torch.randn(OUT, RANK), "d": torch.randn(RANK)}
    return {f"{PREFIX}{GATE1}.{name}": tensor for name, tensor in (parts | changed).items()}


def read_one(config: dict[str, Any], given: dict[str, Tensor], layout: BaseLayout) -> TopK:
    _, parser = format_of(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    (outline,) = parser.outline(config, shapes).values()
    ((delta,),) = parser.read(config, given, layout).values()
    assert isinstance(delta, TopK)
    assert (outline.kind, outline.rank) == (TopK.kind, delta.rank)
    return delta


def authors_answer(x: Tensor, given: dict[str, Tensor], keep: int, alpha: float) -> Tensor:
    """One token and one rank at a time."""
    a, b, d = (given[f"{PREFIX}{GATE1}.{name}"] for name in "ABd")
    answers = []
    for token in x:
        h = a @ token
        experts = sorted(range(RANK), key=lambda i: -abs(float(h[i] + d[i])))[:keep]
        answers.append(sum(b[:, i] * h[i] for i in experts) * alpha / RANK)
    return torch.stack(answers)


def answer(x: Tensor, delta: TopK) -> Tensor:
    h = x @ delta.a.T
    chosen = (h + delta.bias).abs().topk(delta.keep).indices
    return torch.zeros_like(h).scatter(1, chosen, h.gather(1, chosen)) @ delta.b.T


@pytest.mark.parametrize("keep", [1, KEEP, RANK])
def test_each_token_keeps_its_own_ranks(keep: int, layout: BaseLayout) -> None:
    given = tensors()
    delta = read_one(CONFIG | {"k": keep}, given, layout)
    x = torch.randn(40, IN)
    torch.testing.assert_close(
        answer(x, delta), authors_answer(x, given, keep, alpha=5), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("config", [{"alpha": None}, {"alpha": 0}])
def test_an_alpha_that_is_left_out_is_twice_the_rank(
    config: dict[str, Any], layout: BaseLayout
) -> None:
    given = tensors()
    delta = read_one(CONFIG | config, given, layout)
    torch.testing.assert_close(delta.b, given[f"{PREFIX}{GATE1}.B"] * 2)


def test_counters_of_the_training_are_passed_over(layout: BaseLayout) -> None:
    config = CONFIG | {"bias_lr": 1e-3, "sparsity_ratio": 0.25}
    counters = {"assignment_count": torch.ones(RANK), "expected_frequency": torch.ones(RANK)}
    assert read_one(config, tensors(**counters), layout).keep == KEEP


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], str]] = {
    "more kept than there are": ({"k": 8}, {}, "k is 8, but of r = 7"),
    "a rank beyond floats": ({"r": 10**400}, {}, "r is 1000.* below 2147483648"),
    "nothing kept": ({"k": 0}, {}, "k is 0"),
    "no number that is kept": ({"k": None}, {}, "k is None"),
    "another rank": ({"r": 8}, {}, r"but rank 8 \(r in adapter_config.json\)"),
    "an alpha that is no number": ({"alpha": "7"}, {}, "alpha is '7'"),
    "an A of another layer": ({}, {"A": torch.ones(RANK, 37)}, "base model's layer asks"),
    "a B of another layer": ({}, {"B": torch.ones(36, RANK)}, "base model's layer asks"),
    "a bias of another rank": ({}, {"d": torch.ones(6)}, r"\[6\], but rank 7"),
    "the fork's bias": (
        {}, {"lora_topk_bias": torch.ones(RANK)}, "lora_topk_bias' cannot be served",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("option", "changed", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_served_is_refused_by_name(
    option: dict[str, Any], changed: dict[str, Tensor], message: str, layout: BaseLayout
) -> None:
    with pytest.raises(InvalidAdapterError, match=message):
        read_one(CONFIG | option, tensors(**changed), layout)
