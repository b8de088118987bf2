"""What the engine gets of tenants' requests, and what they may take over HTTP."""

from __future__ import annotations

import json

import pytest
from fastapi.testclient import TestClient

from polydelta.engine.request import ErrorKind

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
BOTH = (COMPLETIONS, CHAT)
TENANTS = {
    "acme": {"weight": 2.5, "priority": 3, "private_cache": True},
    # So slow that the test's own time does not count.
    "other": {"tokens_per_minute": 1},
    "busy": {"max_concurrent": 2, "adapters": ["*"]},
    "third": {},
}


def body_for(path, **fields):
    """Of a prompt with two tokens, or a few more."""
    prompt = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "Hi"}
    return {"model": "fake-base"} | prompt | fields


@pytest.fixture
def tenants_client(make_app):
    tables = {name: {"keys": [f"sk-{name}"], **table} for name, table in TENANTS.items()}
    app = make_app(api_key=("sk-operator",), tenants=json.dumps(tables))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def post(tenants_client):
    def post(name, path=COMPLETIONS, **fields):
        headers = {"Authorization": f"Bearer sk-{name}"}
        return tenants_client.post(path, json=body_for(path, **fields), headers=headers)

    return post


@pytest.fixture
def said(engine):
    """Of the latest request, what the engine knows of whose it is."""

    def last():
        request = engine.requests[-1]
        return request.tenant, request.weight, request.priority, request.cache_salt

    return last


@pytest.mark.parametrize("path", BOTH)
def test_the_engine_gets_the_tenant_its_weight_and_its_priority(post, said, path):
    assert post("acme", path).status_code == 200
    assert said() == ("acme", 2.5, 3, "acme:")
    assert post("third", path, n=2).status_code == 200
    assert said() == ("third", 1.0, 0, "")
    assert post("operator", path, cache_salt="x").status_code == 200
    assert said() == ("", 1.0, 0, "x")


@pytest.mark.parametrize("path", BOTH)
def test_a_tenant_may_ask_for_its_own_priority_or_a_higher_number(post, said, engine, path):
    for priority in (3, 4, 2**31 - 1):
        assert post("acme", path, priority=priority).status_code == 200
        assert said()[2] == priority
    count = len(engine.requests)
    for priority in (2, 0, -1):
        answer = post("acme", path, priority=priority)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "priority")
        assert error["message"].startswith(f"priority: {priority} goes before 3")
        assert "leave it out" in error["message"]
    assert len(engine.requests) == count
    assert post("operator", path, priority=-7).status_code == 200
    assert said()[2] == -7


def test_no_tenant_can_write_the_salt_of_another_one_s_private_cache(post, said):
    salts = set()
    asked = ("", "x", "acme:", "acme:x", ":x", "x:", "third:", ":acme:x")
    for name in ("acme", "third"):
        for salt in asked:
            fields = {"cache_salt": salt} if salt else {}
            assert post(name, **fields).status_code == 200
            salts.add(said()[3])
    assert len(salts) == 2 * len(asked)


def test_tenants_without_a_private_cache_share_what_has_the_same_salt(post, said):
    for fields in ({}, {"cache_salt": "x"}):
        shared = set()
        for name in ("third", "busy"):
            post(name, **fields)
            shared.add(said()[3])
        assert len(shared) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BOTH)
def test_too_many_tokens_a_minute_are_429_until_it_has_filled_up(post, engine, path, stream):
    engine.answer = lambda _: "x" * 40
    assert post("other", path, n=2, max_tokens=40).status_code == 200
    answer = post("other", path, stream=stream)
    assert answer.status_code == 429
    assert answer.json()["error"]["type"] == "RateLimitError"
    # Of two prompts and two answers; the first token was there, and one must be there again.
    tokens = 2 * (len(engine.requests[0].prompt_token_ids) + 40)
    assert int(answer.headers["retry-after"]) == pytest.approx(60 * tokens, abs=30)
    assert len(engine.requests) == 2
    assert post("third", path).status_code == 200


@pytest.mark.parametrize("kind", [ErrorKind.LATE, ErrorKind.QUEUE_FULL])
def test_whoever_the_engine_turns_away_pays_nothing(post, engine, kind):
    engine.error, engine.error_kind = "too much to do", kind
    for _ in range(3):
        answer = post("other", prompt=list(range(60)))
        assert answer.json()["error"]["message"] == "too much to do"
    engine.error = None
    assert post("other").status_code == 200
    assert post("other").status_code == 429


def test_what_cannot_be_served_is_paid_for_as_far_as_it_was_computed(post, engine):
    engine.error, engine.error_after = "out of order", 4
    assert post("other", prompt=list(range(30))).status_code == 400
    engine.error = None
    answer = post("other")
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) == pytest.approx(60 * (30 + 4), abs=30)


def test_a_refusal_is_counted_by_its_reason(post, tenants_client):
    post("other", prompt=list(range(60)), max_tokens=1)
    assert post("other").status_code == 429
    headers = {"Authorization": "Bearer sk-operator"}
    metrics = tenants_client.get("/metrics", headers=headers).text
    (line,) = (
        line
        for line in metrics.splitlines()
        if line.startswith("polydelta_refusals_total") and "tenant_rate" in line
    )
    assert line.endswith(" 1.0")
    assert 'status="429"' in line


def test_an_operator_has_no_limits(post):
    for _ in range(3):
        assert post("operator", prompt=list(range(60)), n=100, max_tokens=1).status_code == 200


def test_more_choices_than_a_key_may_ever_have_are_400(post, engine):
    answer = post("busy", prompt=["a", "b"], n=2)
    assert answer.status_code == 400
    assert "4 choices" in answer.json()["error"]["message"]
    assert "retry-after" not in answer.headers
    assert engine.requests == []
