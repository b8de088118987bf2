"""What selections and prefills are written like."""

from __future__ import annotations

import pytest

from polydelta.kernels.kv_selection import (
    MOST_TOKENS,
    SELECTIONS,
    Quest,
    Window,
    XAttention,
    parse_prefill,
    parse_selection,
)


@pytest.mark.parametrize("name", SELECTIONS)
def test_what_is_written_is_read_again(name: str) -> None:
    selection = parse_selection(name)
    assert selection.name == name
    assert parse_selection(str(selection)) == selection


def test_numbers_are_taken_in_their_order_and_without_them_the_authors() -> None:
    assert parse_selection("window") == Window()
    assert parse_selection("window:7+9") == Window(7, 9)
    assert parse_selection(f"quest:{MOST_TOKENS}") == Quest(MOST_TOKENS)
    assert parse_prefill("xattention:16+0.8") == XAttention(16, 0.8)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("quests", "use one of full, window"),
        ("window:", r"write window\[:SINKS\+RECENT\], such as window:4\+512"),
        ("window:256", "write window"),
        ("infllm:4+4", "write infllm"),
        ("window:\u0664+\u0665", "write window"),
        ("window:a+b", "write window"),
        ("window:1+2+3", "write window"),
        ("window:1.5+2", "write window"),
        ("window:-1+2", "write window"),
        ("full:1", "write full"),
        ("window:4+0", "RECENT begins at 1"),
        ("quest:0", "TOKENS begins at 1"),
        ("snapkv:32", "more than the 32 newest"),
        ("h2o:0.9+0.2", "at most 1"),
        ("h2o:1+0", "RECENT is over 0"),
        ("h2o:.5+.5", r"such as h2o:0.1\+0.1"),
        (f"window:4+{MOST_TOKENS + 1}", f"no number is above {MOST_TOKENS}"),
        ("window:99999999999999999999999+4", f"no number is above {MOST_TOKENS}"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_can(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        parse_selection(text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)
