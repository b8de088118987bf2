"""Probes."""

from __future__ import annotations

from importlib.metadata import version


def test_health_is_200_with_an_empty_body(client):
    for path in ("/health", "/ping"):
        answer = client.get(path)
        assert (answer.status_code, answer.content) == (200, b"")


def test_a_dead_engine_is_503(client, engine):
    engine.alive = False
    for path in ("/health", "/ping", "/ready"):
        assert client.get(path).status_code == 503


def test_ready_says_so(client):
    assert client.get("/ready").json() == {"status": "ready"}


def test_the_version_is_that_of_the_package(client):
    assert client.get("/version").json() == {"version": version("polydelta")}
