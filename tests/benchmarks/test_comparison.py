"""Rows of the comparison with PEFT, their turns, and what is told of them."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from benchmarks.comparison import ENGINE, PEFT, WARMING, WITH_ADAPTERS, Row, measure, show
from benchmarks.floor import Work
from benchmarks.vs_peft import RANKS, make_rows

ADAPTERS = ["a", "b", "c"]


class FakeSide:
    """Takes the seconds that it is told to, and says what it was asked for."""

    def __init__(self, name: str, seconds: Sequence[float], token: int, log: list[Any]) -> None:
        self.name, self.seconds, self.token, self.log = name, list(seconds), token, log

    def run(
        self, prompts: Sequence[Sequence[int]], names: Sequence[str | None], new_tokens: int
    ) -> tuple[float, list[list[int]]]:
        self.log.append((self.name, tuple(names), new_tokens))
        tokens = [[row if row else self.token] for row in range(len(prompts))]
        return (0.0 if new_tokens == WARMING else self.seconds.pop(0)), tokens


def row(rounds: int = 3, ranks: Sequence[int] = (8, 16), **changes: Any) -> Row:
    work = Work(batch=4, prompt_tokens=5, new_tokens=6, ranks=ranks)
    return Row("some", work, WITH_ADAPTERS, PEFT, rounds, **changes)


def measured(one: Row, ours: Sequence[float], theirs: Sequence[float]) -> list[Any]:
    """The calls in their order."""
    log: list[Any] = []
    sides: Any = {
        WITH_ADAPTERS: FakeSide("ours", ours, 1000, log),
        PEFT: FakeSide("theirs", theirs, 2000, log),
    }
    measure(one, sides, ADAPTERS, lambda: log.append("round"))
    return log


def test_prompts_take_the_adapters_of_the_row_in_turn() -> None:
    assert row().names(ADAPTERS) == ["a", "b", "a", "b"]
    assert row(ranks=()).names(ADAPTERS) == [None] * 4


def test_both_sides_warm_up_and_begin_in_turn() -> None:
    log = measured(row(rounds=2), [1.0, 1.0], [1.0, 1.0])
    names = ("a", "b", "a", "b")
    warm = [("theirs", names, WARMING), ("ours", names, WARMING)]
    first, second = ("theirs", names, 6), ("ours", names, 6)
    assert log == [*warm, first, second, "round", second, first, "round"]


def test_the_ratio_is_that_of_the_median_rounds() -> None:
    one = row()
    measured(one, [1.0, 9.0, 2.0], [3.0, 8.0, 8.0])
    assert one.ours_per_second == 4 * 6 / 2.0
    assert one.theirs_per_second == 4 * 6 / 8.0
    assert one.ratio == 4.0


def test_how_often_the_first_token_agrees_is_told() -> None:
    one = row(rounds=1)
    measured(one, [1.0], [1.0])
    assert one.first_token_agreement == 0.75


def test_the_result_file_has_the_floor_and_its_share() -> None:
    one = row(rounds=1, bar=3.0, aim=5.0)
    measured(one, [2.0], [8.0])
    told = one.to_json(floor=48.0)
    figures = ("ours_tokens_per_second", "theirs_tokens_per_second", "ratio", "share_of_floor")
    assert [told[name] for name in figures] == [12.0, 3.0, 4.0, 0.25]
    assert (told["bar"], told["aim"], told["theirs"]) == (3.0, 5.0, "PEFT")


@pytest.mark.parametrize(("bar", "shown"), [(4.0, "green"), (4.1, "red"), (None, "4.00x")])
def test_a_ratio_is_green_from_its_bar_on(bar: float | None, shown: str) -> None:
    one = row(rounds=1, bar=bar)
    measured(one, [2.0], [8.0])
    assert one.shown_ratio.strip("[").startswith(shown)


def test_the_summary_has_peft_only_where_it_was_measured() -> None:
    against_peft, against_ours = row(rounds=1, bar=2.0, aim=5.0), row(rounds=1)
    measured(against_peft, [2.0], [8.0])
    measured(against_ours, [2.0], [2.0])
    against_ours.theirs, against_ours.name = ENGINE, "other"
    text = StringIO()
    table = show([against_peft, against_ours], {"some": 48.0, "other": 24.0}, {"some": 11.0})
    Console(file=text, width=80).print(table)
    some, other = (line.split() for line in text.getvalue().splitlines() if "x" in line)
    assert some == ["some", "3", "12", "4.00x", "2,", "5", "48", "25%", "11"]
    assert other == ["other", "12", "1.00x", "24", "50%"]


def test_the_rows_have_the_bars_that_were_set() -> None:
    bars = {one.name: (one.bar, one.aim) for one in make_rows(3) if one.bar}
    assert bars == {
        "base only": (2.3, 3.0),
        "base only, adapters on": (0.99, 1.0),
        "1 adapter": (3.0, 4.0),
        "8 adapters": (5.0, 7.0),
        "16 distinct adapters": (6.0, 9.0),
        "single stream, base": (2.3, 3.5),
    }


def test_an_engine_that_never_saw_an_adapter_is_asked_for_the_base_only() -> None:
    for one in make_rows(2):
        assert ENGINE not in (one.ours, one.theirs) or not one.work.ranks
        assert len(one.work.ranks) <= len(RANKS)
