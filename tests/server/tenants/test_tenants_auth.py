"""Keys of operators and of tenants."""

from __future__ import annotations

import hashlib
import hmac
import json
from types import SimpleNamespace

import pytest
from fastapi import Request
from fastapi.testclient import TestClient

from polydelta.server import auth
from polydelta.server.tenants.tenant import OPERATOR, tenant_of

DIGEST = hashlib.sha256(b"sk-hashed").hexdigest()
TENANTS = {
    "acme": {"keys": ["sk-acme", "schlüssel"], "adapters": ["dates"]},
    "other": {"keys": [f"sha256:{DIGEST}"]},
}


@pytest.fixture
def asked(make_app):
    """Who asks by a header; the status and the name of the tenant that the routes see."""

    def open_with(api_key=("sk-operator",), tenants=TENANTS):
        app = make_app(api_key=api_key, tenants=json.dumps(tenants) if tenants else ())

        @app.get("/v1/who")
        def who(request: Request) -> list:
            tenant = tenant_of(request)
            return [tenant.name, tenant is OPERATOR]

        client = TestClient(app)

        def ask(authorization=None, path="/v1/who"):
            headers = {} if authorization is None else {"Authorization": authorization.encode()}
            answer = client.get(path, headers=headers)
            return answer.status_code, answer.json() if path == "/v1/who" else answer.text

        return ask

    return open_with


def test_a_key_says_who_asks(asked):
    ask = asked()
    assert ask("Bearer sk-acme") == (200, ["acme", False])
    assert ask("bearer schlüssel") == (200, ["acme", False])
    assert ask("Bearer sk-hashed") == (200, ["other", False])
    assert ask("Bearer sk-operator") == (200, ["", True])


REFUSED = [
    *(None, "", "Bearer", "Bearer ", "Bearer sk", "Bearer acme", "Bearer sk-acme sk-operator"),
    *(f"Bearer {DIGEST}", f"Bearer sha256:{DIGEST}", "Basic sk-acme", "sk-acme"),
]


@pytest.mark.parametrize("authorization", REFUSED)
def test_all_else_is_401(asked, authorization):
    status, body = asked()(authorization)
    assert status == 401
    assert body["error"]["type"] == "AuthenticationError"


def test_with_tenants_and_no_api_key_nobody_is_an_operator(asked):
    ask = asked(api_key=())
    assert ask("Bearer sk-acme") == (200, ["acme", False])
    assert ask()[0] == 401
    assert ask("Bearer sk-operator")[0] == 401


def test_without_tenants_whoever_may_ask_is_an_operator(asked):
    assert asked(tenants=None)("Bearer sk-operator") == (200, ["", True])
    assert asked(api_key=(), tenants=None)() == (200, ["", True])


def test_every_key_is_compared_whoever_asks(asked, monkeypatch):
    compared = []

    def count(first, second):
        compared.append((first, second))
        return hmac.compare_digest(first, second)

    ask = asked()
    monkeypatch.setattr(auth, "hmac", SimpleNamespace(compare_digest=count))
    for key in ("sk-operator", "sk-acme", "sk-hashed", "sk-nobody", "x" * 4000):
        compared.clear()
        ask(f"Bearer {key}")
        # Of equal length, so that not even that can be told.
        assert [len(first) + len(second) for first, second in compared] == [64] * 4


def test_metrics_with_tenants_are_an_operator_s(asked):
    ask = asked()
    assert ask("Bearer sk-operator", "/metrics")[0] == 200
    status, text = ask("Bearer sk-acme", "/metrics")
    assert (status, json.loads(text)["error"]["type"]) == (403, "PermissionDeniedError")
    assert ask(path="/metrics")[0] == 401


def test_metrics_with_tenants_and_no_operator_are_nobody_s(asked):
    ask = asked(api_key=())
    assert ask("Bearer sk-acme", "/metrics")[0] == 403
    assert ask(path="/metrics")[0] == 401


def test_metrics_without_tenants_need_no_key(asked):
    assert asked(tenants=None)(path="/metrics")[0] == 200


def test_probes_need_no_key(asked):
    ask = asked()
    for path in ("/health", "/ready", "/version", "/ping"):
        assert ask(path=path)[0] == 200
