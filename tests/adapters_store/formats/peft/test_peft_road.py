from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import RoadConfig
from torch import Tensor

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft.road import FORMAT

CONFIG: dict[str, Any] = {"peft_type": "ROAD", "group_size": 6}
Q = "base_model.model.model.layers.1.self_attn.q_proj"
THETA, ALPHA = f"{Q}.road_theta", f"{Q}.road_alpha"
TENSORS = {THETA: torch.zeros(18), ALPHA: torch.ones(18)}


@pytest.mark.parametrize("group_size", [2, 4, 12])
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("base", ["base_model", "biased_model"])
def test_layers_equal_those_of_peft(
    base: str,
    variant: str,
    group_size: int,
    check_parity: Any,
    request: pytest.FixtureRequest,
) -> None:
    config = RoadConfig(
        variant=variant,
        group_size=group_size,
        init_weights=False,
        target_modules=["q_proj", "k_proj", "down_proj"] + ["up_proj"] * (52 % group_size == 0),
    )
    adapter = check_parity(config, request.getfixturevalue(base))
    assert (adapter.format, adapter.kinds, adapter.max_rank) == ("ROAD", ("Rotate",), 0)


def test_each_output_is_paired_with_the_one_half_a_group_away(layout: BaseLayout) -> None:
    ((delta,),) = FORMAT.read(CONFIG, TENSORS, layout).values()
    assert delta.partner.dtype == torch.int32
    assert delta.partner[:12].tolist() == [3, 4, 5, 0, 1, 2, 9, 10, 11, 6, 7, 8]


def test_a_quarter_turn_makes_the_second_of_a_pair_the_first_with_a_minus(
    layout: BaseLayout,
) -> None:
    tensors = TENSORS | {THETA: torch.full((18,), torch.pi / 2)}
    ((delta,),) = FORMAT.read(CONFIG, tensors, layout).values()
    torch.testing.assert_close(delta.cos, torch.zeros(36), atol=1e-7, rtol=0)
    torch.testing.assert_close(delta.sin[:6], torch.tensor([-1.0, -1, -1, 1, 1, 1]))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "an unknown variant": ({"variant": "road_3"}, {}, "variant is 'road_3'.*road_1, road_2"),
    "more angles than the variant has": ({"variant": "road_2"}, {}, r"layer asks for \[36\]"),
    "no group": ({"group_size": None}, {}, "group_size is None"),
    "an odd group": ({"group_size": 9}, {}, "group_size is 9, but must be even"),
    "groups that do not fill the layer": ({"group_size": 8}, {}, "does not divide the 36 outputs"),
    "fewer scales than angles": ({}, {ALPHA: torch.ones(17)}, "but its road_theta asks for"),
    "no scales": ({}, {ALPHA: None}, "no road_alpha"),
    "no angles": ({}, {THETA: None}, "no road_theta"),
    "another base": (
        {},
        {THETA: torch.zeros(20), ALPHA: torch.zeros(20)},
        r"layer asks for \[18\]",
    ),
    "numbers": ({}, {THETA: torch.ones(()), ALPHA: torch.ones(())}, "shape"),
}


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_wrong_is_refused_by_name(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, layout: BaseLayout
) -> None:
    changed = {name: value for name, value in (TENSORS | tensors).items() if value is not None}
    with pytest.raises(InvalidAdapterError, match=message):
        FORMAT.read(CONFIG | config, changed, layout)
