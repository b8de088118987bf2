"""Traces that are read from files."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings, strategies as st

from load_tests.replay import Recorded, Replay, read_trace

LINES = [
    {"timestamp": 130.0, "model": "b", "prompt_tokens": 30, "output_tokens": 3, "user": "x"},
    {"timestamp": 100.0, "model": "a", "prompt_tokens": 10, "output_tokens": 1},
    {"timestamp": 110.0, "model": "b", "prompt_tokens": 20, "output_tokens": 2},
    {"timestamp": 200.0, "model": "c", "prompt_tokens": 40, "output_tokens": 4},
]


def write(folder: Path, lines: list[dict[str, object]] = LINES) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_time_is_rescaled_and_the_most_frequent_model_is_the_first_adapter(tmp_path: Path):
    requests = Replay(write(tmp_path), duration=10.0, adapters=2).requests()
    assert [one.at for one in requests] == pytest.approx([0.0, 1.0, 3.0, 10.0])
    # b is named twice, then a and c by name; the third begins at 0 again.
    assert [one.adapter for one in requests] == [1, 0, 0, 0]
    assert [one.prompt_tokens for one in requests] == [10, 20, 30, 40]
    assert [one.max_tokens for one in requests] == [1, 2, 3, 4]


def test_without_adapters_all_goes_to_the_base(tmp_path: Path):
    requests = Replay(write(tmp_path), 10.0, adapters=0).requests()
    assert {one.adapter for one in requests} == {None}


def test_csv_is_read_as_well(tmp_path: Path):
    path = tmp_path / "trace.csv"
    path.write_text("model,user,timestamp,output_tokens,prompt_tokens\nb,x,1.5,7,9\n")
    assert read_trace(path) == [Recorded(1.5, "b", 9, 7)]


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.sampled_from("abcde"), st.integers(1, 99)), min_size=2
    ),
    st.floats(0.5, 600),
)
@settings(max_examples=40, deadline=None)
def test_order_and_spacing_are_kept(drawn: list[tuple[float, str, int]], duration: float):
    lines: list[dict[str, object]] = [
        {"timestamp": at, "model": model, "prompt_tokens": length, "output_tokens": 1}
        for at, model, length in drawn
    ]
    with TemporaryDirectory() as folder:
        requests = Replay(write(Path(folder), lines), duration, adapters=5).requests()
    recorded = sorted(drawn, key=lambda one: one[0])
    assert [one.prompt_tokens for one in requests] == [length for _, _, length in recorded]
    span = recorded[-1][0] - recorded[0][0]
    scale = duration / span if span else 0.0
    expected = [(at - recorded[0][0]) * scale for at, _, _ in recorded]
    assert [one.at for one in requests] == pytest.approx(expected)
    assert len({one.adapter for one in requests}) == len({model for _, model, _ in drawn})


def test_a_number_of_requests_is_drawn_and_none_twice(tmp_path: Path):
    lines: list[dict[str, object]] = [
        LINES[0] | {"timestamp": float(place), "prompt_tokens": place + 1} for place in range(50)
    ]
    replay = Replay(write(tmp_path, lines), 10.0, 1, count=20)
    requests = replay.requests()
    lengths = [one.prompt_tokens for one in requests]
    assert len(set(lengths)) == 20
    assert lengths == sorted(lengths)
    assert requests == replay.requests()
    assert (requests[0].at, requests[-1].at) == (0.0, pytest.approx(10.0))


def test_requests_that_are_too_long_are_left_out(tmp_path: Path):
    trace = write(tmp_path)
    kept = Replay(trace, 10.0, 1, prompt_limit=40, output_limit=3).requests()
    assert [one.prompt_tokens for one in kept] == [10, 20]


def test_a_trace_with_too_few_requests_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="4 requests that are short enough, and 5 "):
        Replay(write(tmp_path), 10.0, 1, count=5).requests()
    with pytest.raises(ValueError, match="0 requests that are short enough, and some "):
        Replay(write(tmp_path, []), 10.0, 1).requests()


@pytest.mark.parametrize(
    "broken", [{"model": "a"}, LINES[0] | {"timestamp": "noon"}, LINES[0] | {"output_tokens": 0}]
)
def test_a_line_that_cannot_be_read_is_told_by_its_number(
    tmp_path: Path, broken: dict[str, object]
):
    with pytest.raises(ValueError, match="request 2: "):
        read_trace(write(tmp_path, [LINES[0], broken]))
