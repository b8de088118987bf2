from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from polydelta.adapters_store.composition import (
    MAX_SHARES,
    Share,
    check_addable,
    combine,
    sum_digest,
)
from polydelta.adapters_store.errors import CompositionError
from polydelta.adapters_store.reference import AdapterRef


def share(name: str, weight: float = 1.0, version: int = 1) -> Share:
    return Share(AdapterRef(name, version, Path(name)), weight)


def test_no_shares_are_the_bare_base() -> None:
    assert combine([]) == ()


def test_shares_come_in_the_order_of_their_names() -> None:
    given = [share("b"), share("a", 0.5, version=10), share("a", 2.0, version=2)]
    assert [s.name for s in combine(given)] == ["a@10*0.5", "a@2*2.0", "b@1"]


def test_a_version_that_is_named_twice_gets_the_sum_of_its_weights() -> None:
    assert combine([share("a", 0.5), share("b"), share("a", 0.25)]) == (
        share("a", 0.75),
        share("b"),
    )


def test_versions_of_one_id_are_not_the_same() -> None:
    assert combine([share("a", 1.0, 1), share("a", 2.0, 2)]) == (
        share("a", 1.0, 1),
        share("a", 2.0, 2),
    )


@pytest.mark.parametrize("weights", [[0.0], [-0.0], [0.3, -0.3], [0.1, 0.2, -0.2, -0.1]])
def test_what_weighs_nothing_falls_out(weights: list[float]) -> None:
    assert combine([share("b"), *(share("a", weight) for weight in weights)]) == (share("b"),)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(-10, 10)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_equal_sums_come_out_equal_in_whatever_order_they_are_written(
    wanted: list[tuple[str, float]], order: random.Random
) -> None:
    shares = [share(name, weight) for name, weight in wanted]
    shuffled = order.sample(shares, len(shares))
    assert combine(shuffled) == combine(shares)
    assert combine(combine(shares)) == combine(shares)


@pytest.mark.parametrize(
    "weights",
    [[math.nan], [math.inf], [-math.inf, 1.0], [math.inf, -math.inf], [1e308, 1e308, 1e308]],
)
def test_a_weight_that_is_not_finite_is_refused_without_a_name(weights: list[float]) -> None:
    with pytest.raises(CompositionError, match=r"not finite") as caught:
        combine([share("good"), *(share("bad", weight) for weight in weights)])
    # It may be a part of somebody else's composition.
    assert "bad" not in str(caught.value)


def test_too_many_adapters_are_refused_with_the_number() -> None:
    most = [share(f"a{number}") for number in range(MAX_SHARES)]
    assert len(combine(most)) == len(combine(most + most)) == 8
    with pytest.raises(CompositionError, match=r"at most 8 adapters, here are 9.*merge"):
        combine([*most, share("one-more")])


@pytest.mark.parametrize("kinds", [(), ("LowRank",), ("Sparse", "LowRank")])
def test_kinds_that_add_up_are_let_through(kinds: tuple[str, ...]) -> None:
    check_addable("a@1", kinds)


def test_a_kind_that_cannot_be_added_is_refused_by_its_name_and_the_adapters() -> None:
    with pytest.raises(CompositionError, match=r"'a@1' has deltas of kind Rotate, Scale, which"):
        check_addable("a@1", ["Scale", "LowRank", "Rotate"])


def test_the_digest_of_one_adapter_at_weight_1_is_its_own() -> None:
    assert sum_digest([("d" * 64, 1.0)]) == "d" * 64
    assert sum_digest([("d" * 64, 0.5)]) != "d" * 64


def test_the_digest_of_a_sum_does_not_depend_on_the_order() -> None:
    parts = [("a" * 64, 0.1), ("b" * 64, 2.0), ("a" * 64, -3.0)]
    assert sum_digest(parts) == sum_digest(parts[::-1])


def test_the_digest_of_a_sum_changes_with_each_digest_and_weight() -> None:
    sums = [
        [("a" * 64, 0.5), ("b" * 64, 1.0)],
        [("a" * 64, 1.0), ("b" * 64, 0.5)],
        [("a" * 64, math.nextafter(0.5, 1)), ("b" * 64, 1.0)],
        [("a" * 64, 0.5), ("c" * 64, 1.0)],
        [("a" * 64, 0.5)],
        [],
    ]
    assert len({sum_digest(parts) for parts in sums}) == len(sums)
