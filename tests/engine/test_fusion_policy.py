"""When an adapter may go into the base weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from polydelta.adapters_store.composition import Share, Shares
from polydelta.adapters_store.reference import AdapterRef
from polydelta.engine.fusion_policy import FusionPolicy


def ref(name: str, version: int = 1) -> AdapterRef:
    return AdapterRef(name, version, Path(name))


def alone(name: str, weight: float = 1.0) -> Shares:
    return (Share(ref(name), weight),)


BARE: Shares = ()


def test_an_adapter_is_wanted_once_it_was_alone_for_some_steps() -> None:
    policy = FusionPolicy(3)
    answers = [policy.wanted([alone("a")] * count) for count in (1, 4, 2, 1, 7)]
    assert answers == [None, None, None, ref("a"), ref("a")]


def test_without_patience_the_first_step_is_fused() -> None:
    assert FusionPolicy(0).wanted([alone("a"), alone("a")]) == ref("a")


@pytest.mark.parametrize(
    "other",
    [
        [alone("a"), alone("b")],
        [alone("a"), BARE],
        [BARE],
        [],
        [alone("a"), (Share(ref("a", 2)),)],
        [alone("a", 0.5)],
        [alone("a"), alone("a", 0.5)],
        [(Share(ref("a")), Share(ref("b")))],
        [alone("a"), (Share(ref("a")), Share(ref("b")))],
    ],
    ids=["two", "bare", "all bare", "none", "version", "weight", "weights", "sum", "sum beside"],
)
def test_anything_else_in_a_step_takes_it_out_and_starts_the_count_again(
    other: list[Shares],
) -> None:
    policy = FusionPolicy(1)
    answers = [policy.wanted([alone("a")]) for _ in range(2)]
    answers.append(policy.wanted(other))
    answers += [policy.wanted([alone("a")]) for _ in range(2)]
    assert answers == [None, ref("a"), None, None, ref("a")]


def test_the_bare_base_is_never_wanted() -> None:
    policy = FusionPolicy(0)
    assert [policy.wanted([BARE, BARE]) for _ in range(3)] == [None] * 3


def test_another_adapter_starts_a_count_of_its_own() -> None:
    policy = FusionPolicy(1)
    steps = ["a", "a", "b", "b", "a", "b", "b"]
    answers = [policy.wanted([alone(name)]) for name in steps]
    assert answers == [None, ref("a"), None, ref("b"), None, None, ref("b")]


def test_a_negative_patience_is_refused() -> None:
    with pytest.raises(ValueError, match="patience -1"):
        FusionPolicy(-1)
