"""Settings: options before environment before defaults."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from polydelta.server.settings import SettingsError, load_settings


def test_the_defaults_are_a_local_server_with_the_samples():
    settings = load_settings()
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.model is None
    assert all(path.name == "samples" for path in settings.adapters)


def test_an_option_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("POLYDELTA_PORT", "9001")
    assert load_settings().port == 9001
    assert load_settings(port=None).port == 9001
    assert load_settings(port=9002).port == 9002


def test_folders_and_keys_can_be_lists_in_the_environment(monkeypatch, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    monkeypatch.setenv("POLYDELTA_ADAPTERS", f"{first}{os.pathsep}{second}")
    monkeypatch.setenv("POLYDELTA_API_KEY", "one,two")
    settings = load_settings()
    assert settings.adapters == (first, second)
    assert [key.get_secret_value() for key in settings.api_key] == ["one", "two"]


def test_keys_do_not_show_in_a_print_of_the_settings():
    assert "hush" not in repr(load_settings(api_key=["hush"]))


def test_sizes_have_units():
    config = load_settings(pool="512MiB", host_adapter_ram="1GiB").engine_config
    assert config.pool_bytes == 512 * 2**20
    assert config.host_adapter_bytes == 2**30


def test_the_engine_gets_what_was_set():
    config = load_settings(
        dtype="float32",
        max_model_len=100,
        max_batch_tokens=200,
        max_batch_size=3,
        block_size=32,
        prefix_caching=False,
    ).engine_config
    assert (config.dtype, config.max_model_len, config.max_batch_tokens) == ("float32", 100, 200)
    assert (config.max_batch_size, config.block_size, config.prefix_caching) == (3, 32, False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000),
        ("dtype", "float8"),
        ("pool", "2 apples"),
        ("pool", "0"),
        ("block_size", 0),
        ("adapters", [Path("no-such-folder")]),
        ("api_key", [" "]),
        ("log_level", "loud"),
    ],
)
def test_a_wrong_setting_is_named_as_option_and_as_variable(name, value):
    with pytest.raises(SettingsError) as caught:
        load_settings(**{name: value})
    assert f"--{name.replace('_', '-')}" in str(caught.value)
    assert f"POLYDELTA_{name.upper()}" in str(caught.value)
    assert "\n" not in str(caught.value)
