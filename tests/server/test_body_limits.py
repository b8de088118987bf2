"""How long bodies may be, and how long they may take."""

from __future__ import annotations

import asyncio
import json

import pytest
from fastapi.testclient import TestClient
from starlette.responses import Response

from polydelta.server.body_limits import MAX_BODY_BYTES, BodyLimits
from polydelta.server.openai.schemas import MAX_PROMPTS

PATH = "/v1/completions"


async def echo(scope, receive, send):
    """Answers with what it got."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message.get("more_body", False)
    await Response(body)(scope, receive, send)


@pytest.fixture
def client():
    return TestClient(BodyLimits(echo, max_bytes=1000))


def in_pieces(*sizes):
    """Of unknown length altogether."""
    return (b"x" * size for size in sizes)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_a_body_that_is_not_too_long_arrives_as_it_is(client, method):
    assert client.request(method, PATH, content=b"x" * 1000).content == b"x" * 1000
    assert client.request(method, PATH, content=in_pieces(1, 998, 1)).content == b"x" * 1000
    assert client.request(method, PATH).content == b""


def test_a_longer_one_is_413_and_names_the_limit(client):
    for content in (b"x" * 1001, in_pieces(1000, 1)):
        answer = client.post(PATH, content=content)
        assert answer.status_code == 413
        assert "1000 bytes" in answer.json()["error"]["message"]


def test_the_type_of_the_content_is_no_way_around_it(client):
    for path in (PATH, "/v1/load_lora_adapter", "/v1/adapters/a/rollback", "/v1/adapters/a/load"):
        answer = client.post(
            path,
            content=b"x" * 1001,
            headers={"Content-Type": "multipart/form-data; boundary=b"},
        )
        assert answer.status_code == 413, path


@pytest.mark.parametrize("path", ["/v1/adapters", "/v1/adapters/my-adapter"])
def test_routes_that_take_uploads_read_for_themselves(client, path):
    assert len(client.put(path, content=b"x" * 2000).content) == 2000


def ask(receive):
    """What is sent to a client whose messages come from `receive`."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    asyncio.run(BodyLimits(echo, max_bytes=1000, idle_seconds=0.01)(scope, receive, send))
    return sent


def messages(*given):
    left = list(given)

    async def receive():
        return left.pop(0) if left else await asyncio.sleep(60)

    return receive


def test_a_client_that_falls_asleep_in_a_body_is_408():
    head, body = ask(messages({"type": "http.request", "body": b"{", "more_body": True}))
    assert head["status"] == 408
    assert (b"connection", b"close") in head["headers"]
    assert "0.01 seconds" in json.loads(body["body"])["error"]["message"]


def test_a_client_that_leaves_in_a_body_is_not_served():
    head, _ = ask(
        messages(
            {"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}
        )
    )
    assert head["status"] == 499


def test_the_longest_request_that_makes_sense_passes():
    prompt = json.dumps([151_642] * 8190)
    assert MAX_PROMPTS * len(f"{prompt}, ") + 1000 <= MAX_BODY_BYTES


def test_the_application_has_these_limits(make_app, monkeypatch):
    monkeypatch.setattr(BodyLimits.__init__, "__defaults__", (1000, 60.0))
    client = TestClient(make_app())
    answer = client.post(PATH, json={"model": "fake-base", "prompt": "x" * 1000})
    assert answer.status_code == 413
    assert client.post(PATH, json={"model": "fake-base", "prompt": "x"}).status_code == 200
