from __future__ import annotations

from collections import ChainMap

import pytest

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats.peft_format import ModuleShapes
from polydelta.adapters_store.formats.peft_options import (
    linear_layers,
    one_of,
    refuse_surplus,
    seed,
)


def test_one_of_the_choices_is_given_back() -> None:
    assert one_of("way", "b", ("a", "b")) == "b"


@pytest.mark.parametrize("value", ["c", "", None, 1, ["a"]])
def test_anything_else_is_refused_with_the_choices(value: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"way is .*, but must be one of a, b"):
        one_of("way", value, ("a", "b"))


@pytest.mark.parametrize("value", [0, -(1 << 63), (1 << 64) - 1])
def test_a_seed_is_any_integer_that_a_generator_takes(value: int) -> None:
    assert seed("s", value) == value


@pytest.mark.parametrize("value", [-(1 << 63) - 1, 1 << 64, 1.0, True, None, "7"])
def test_what_no_generator_takes_is_no_seed(value: object) -> None:
    with pytest.raises(InvalidAdapterError, match=r"s is .*whole number of 64 bits"):
        seed("s", value)


def test_a_parameter_that_the_config_denies_is_refused() -> None:
    shapes = ModuleShapes("m", ChainMap({"r": "m.r"}, {}), {"m.r": (1,)})
    refuse_surplus(shapes, "p", "p is off")
    with pytest.raises(InvalidAdapterError, match=r"'m' has r, but r is off in adapter_config"):
        refuse_surplus(shapes, "r", "r is off")


def test_the_head_is_a_linear_layer_and_the_embedding_is_none(layout: BaseLayout) -> None:
    assert linear_layers(layout).keys() == layout.module_shapes.keys() | {"lm_head"}
