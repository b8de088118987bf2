"""Bearer keys."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient


@pytest.fixture
def guarded(make_app):
    return TestClient(make_app(api_key=("first", "zweiter-schlüssel")))


def get(client, authorization=None):
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    return client.get("/v1/models", headers=headers)


def test_each_of_several_keys_opens(guarded):
    assert get(guarded, "Bearer first").status_code == 200
    assert get(guarded, "bearer zweiter-schlüssel").status_code == 200


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic first", "first", "ß ß"]
)
def test_anything_else_is_401_in_openai_s_body(guarded, authorization):
    answer = get(guarded, authorization)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == 401


def test_unknown_routes_under_v1_are_guarded_too(guarded):
    assert guarded.get("/v1/nothing").status_code == 401


def test_probes_and_metrics_need_no_key(guarded):
    for path in ("/health", "/ready", "/version", "/ping", "/metrics"):
        assert guarded.get(path).status_code == 200


def test_a_preflight_passes(guarded):
    assert guarded.options("/v1/models").status_code == 405  # refused by the route, not by the key


def test_without_keys_everything_is_open(client):
    assert get(client).status_code == 200
