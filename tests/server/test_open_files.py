"""The limit on open files."""

from __future__ import annotations

import logging
import resource

import pytest

from polydelta.server.open_files import raise_open_files_limit


@pytest.fixture
def limits(monkeypatch):
    """What the process is allowed; setting it changes nothing but this."""
    now = {"limits": (1024, 20_000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: now["limits"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: now.update(limits=wanted))
    return now


def test_the_soft_limit_becomes_the_hard_one(limits, caplog):
    raise_open_files_limit()
    assert limits["limits"] == (20_000, 20_000)
    assert not caplog.records


def test_no_limit_at_all_is_taken_too(limits, caplog):
    limits["limits"] = (1024, resource.RLIM_INFINITY)
    raise_open_files_limit()
    assert limits["limits"] == (resource.RLIM_INFINITY,) * 2
    assert not caplog.records


def test_a_low_hard_limit_is_told(limits, caplog):
    limits["limits"] = (256, 1000)
    with caplog.at_level(logging.WARNING):
        raise_open_files_limit()
    assert limits["limits"] == (1000, 1000)
    assert "At most 1000 files" in caplog.text


def test_a_system_that_refuses_is_left_as_it_is(limits, caplog, monkeypatch):
    def refuse(_, wanted):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with caplog.at_level(logging.WARNING):
        raise_open_files_limit()
    assert "At most 1024 files" in caplog.text
