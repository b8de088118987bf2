"""Errors that no route makes: bodies that cannot be read, unknown routes, bugs."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

JSON = {"Content-Type": "application/json"}


def error_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == answer.status_code
    return error


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '"text"', "null", b"\xff\xfe", "[" * 100_000, '{"a": 1' + "9" * 5000],
)
def test_a_body_that_is_not_a_json_object_is_400(client, content):
    answer = client.post("/v1/completions", content=content, headers=JSON)
    assert answer.status_code == 400
    assert error_of(answer)["type"] == "BadRequestError"
    assert len(error_of(answer)["message"]) < 300


def test_a_body_without_the_json_content_type_is_told_what_to_send(client):
    body = '{"model": "fake-base", "prompt": "Hi"}'
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    for headers in (form, {}):
        answer = client.post("/v1/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert "Content-Type: application/json" in error_of(answer)["message"]


def test_half_a_surrogate_pair_is_400(client):
    for body in (
        '{"model": "fake-base", "prompt": "a\\ud800"}',
        '{"model": "\\ud800", "prompt": "a"}',
        '{"model": "fake-base", "prompt": "a", "stop": "\\ud800"}',
        '{"model": "fake-base", "prompt": "a", "cache_salt": "\\ud800"}',
        '{"model": "fake-base", "prompt": "a", "\\ud800": 1}',
    ):
        answer = client.post("/v1/completions", content=body, headers=JSON)
        assert answer.status_code == 400
        error_of(answer)


def test_half_a_surrogate_pair_in_a_message_is_400(client):
    for message in (
        '{"role": "user", "content": "\\ud800"}',
        '{"role": "user", "content": [{"type": "text", "text": "a\\udc00"}]}',
        '{"role": "user", "content": "a", "name": "\\ud800"}',
    ):
        body = '{"model": "fake-base", "messages": [' + message + "]}"
        answer = client.post("/v1/chat/completions", content=body, headers=JSON)
        assert answer.status_code == 400
        assert "messages" in error_of(answer)["param"]


def test_nan_is_400(client):
    body = '{"model": "fake-base", "prompt": "a", "temperature": NaN}'
    answer = client.post("/v1/completions", content=body, headers=JSON)
    assert error_of(answer)["param"] == "temperature"


def test_an_unknown_route_is_404_in_the_same_body(client):
    answer = client.get("/v1/nothing")
    assert answer.status_code == 404
    assert error_of(answer)["type"] == "NotFoundError"


def test_a_wrong_method_is_405_in_the_same_body(client):
    answer = client.get("/v1/completions")
    assert answer.status_code == 405
    assert error_of(answer)["type"] == "MethodNotAllowedError"
    assert answer.headers["allow"] == "POST"


def test_a_bug_is_500_without_inner_detail(app, engine):
    engine.tokenizer.encode = lambda _: 1 / 0
    client = TestClient(app, raise_server_exceptions=False)
    answer = client.post("/v1/completions", json={"model": "fake-base", "prompt": "Hi"})
    assert answer.status_code == 500
    error = error_of(answer)
    assert error["type"] == "InternalServerError"
    assert "division" not in error["message"]
