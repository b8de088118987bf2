from __future__ import annotations

import pytest

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.formats import FORMATS
from polydelta.adapters_store.formats.refusals import REFUSALS
from polydelta.adapters_store.formats.registry import format_of


def test_what_is_refused_is_no_format() -> None:
    assert REFUSALS
    assert not REFUSALS.keys() & FORMATS.keys()


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refused_type_is_named_with_its_reason_and_a_remedy(name: str) -> None:
    with pytest.raises(InvalidAdapterError) as error:
        format_of({"peft_type": name})
    message = str(error.value)
    assert message == (
        f"adapter_config.json: peft_type is {name!r}, which is not served: {REFUSALS[name]}."
    )
    assert message.count(": ") == 3, "a reason and a remedy"


@pytest.mark.parametrize("name", ["QUANTUM", None, 5, ["LILY"]])
def test_an_unknown_type_is_told_which_ones_there_are(name: object) -> None:
    with pytest.raises(InvalidAdapterError, match="not served yet: use one of ADALORA, BEFT, "):
        format_of({"peft_type": name})
