"""`kv_select` in a body: what a request may ask to be read of the KV cache."""

from __future__ import annotations

import pytest

from polydelta.engine.kv_setup import KVSetup
from polydelta.kernels.kv_selection import Quest, parse_selection

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BOTH = (COMPLETIONS, CHAT)


def test_the_engine_is_told_what_a_request_asks_for(complete, chat, engine):
    complete(prompt=["a", "b"], kv_select="window:2+30")
    chat(n=2, kv_select="snapkv")
    asked = [request.kv_select for request in engine.requests]
    assert asked == [parse_selection("window:2+30")] * 2 + [parse_selection("snapkv")] * 2


def test_without_the_field_the_server_s_own_is_read(complete, chat, engine):
    complete()
    chat(kv_select=None)
    assert [request.kv_select for request in engine.requests] == [None, None]


def test_a_stream_is_read_as_it_asks(stream, engine):
    for path in BOTH:
        stream(path, kv_select="full")
    assert [str(request.kv_select) for request in engine.requests] == ["full", "full"]


@pytest.mark.parametrize(
    ("value", "way_out"),
    [
        ("half", "window[:SINKS+RECENT]"),
        ("window:4+0", "RECENT begins at 1"),
        ("quest:-1", "quest[:TOKENS]"),
        ("xattention", "full"),
        ("", "full"),
        ("w" * 65, "64"),
        # Would be read, were it not so long.
        (f"window:{'4'.zfill(60)}+2", "64"),
        (16, "string"),
    ],
)
def test_a_selection_that_there_is_not_is_refused_with_a_way_out(refusal, engine, value, way_out):
    for path in BOTH:
        status, error = refusal(path, kv_select=value)
        assert (status, error["param"]) == (400, "kv_select")
        assert error["message"].startswith("kv_select")
        assert way_out in error["message"]
    assert engine.requests == []


def test_a_selection_that_this_server_cannot_read_is_refused_with_those_that_it_can(
    refusal, engine
):
    engine.kv_setup = KVSetup("gear")
    for path in BOTH:
        for value in ("quest:512", "h2o"):
            status, error = refusal(path, kv_select=value)
            assert (status, error["param"]) == (400, "kv_select")
            assert value in error["message"]
            assert "kv_format gear" in error["message"]
            assert error["message"].endswith(
                "ask for one of full, window[:SINKS+RECENT], snapkv[:TOKENS]."
            )
    assert engine.requests == []


def test_where_pages_have_the_notes_any_budget_may_be_asked_for(complete, engine):
    engine.kv_setup = KVSetup(selection=Quest(1024))
    complete(kv_select="quest:64")
    assert engine.requests[0].kv_select == Quest(64)
