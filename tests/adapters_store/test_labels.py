from __future__ import annotations

from typing import Any

import pytest

from polydelta.adapters_store.errors import InvalidAdapterError
from polydelta.adapters_store.labels import MAX_LABELS, MAX_VALUE_LENGTH, check_labels


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"a": ""},
        {"0": "0"},
        {"team.example/name-of_it": "Größe 漢 ~ \"'\\%"},
        {"k" * 63: "v" * MAX_VALUE_LENGTH},
        {f"k{number}": "v" for number in range(MAX_LABELS)},
    ],
)
def test_labels_within_the_limits_come_back_as_they_are(labels: dict[str, str]) -> None:
    checked = check_labels(labels)
    assert checked == labels
    assert checked is not labels


@pytest.mark.parametrize(
    "key", ["", "k" * 64, ".a", "-a", "/a", "a b", "a\n", "ä", 'a"', "a:b", "a=b"]
)
def test_a_key_outside_the_grammar_is_refused_by_name(key: str) -> None:
    with pytest.raises(InvalidAdapterError, match="labels: the key") as refused:
        check_labels({"fine": "x", key: "x"})
    assert repr(key) in str(refused.value)


@pytest.mark.parametrize(
    "value", ["v" * (MAX_VALUE_LENGTH + 1), "a\nb", "a\x00", "\x1b[2J", "\ud800", "\u202e", 3, None]
)
def test_a_value_that_is_no_short_printable_text_is_refused_by_its_key(value: Any) -> None:
    with pytest.raises(InvalidAdapterError, match="labels: the value of 'team'"):
        check_labels({"team": value})


def test_too_many_labels_are_refused_with_their_number() -> None:
    with pytest.raises(InvalidAdapterError, match=r"here are 33, but .* at most 32"):
        check_labels({f"k{number}": "v" for number in range(MAX_LABELS + 1)})
