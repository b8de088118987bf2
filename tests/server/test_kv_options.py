"""`--kv-format`, `--kv-select`, `--prefill` and `--kv-labels`, and the same in the environment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polydelta.engine.kv_composition import Option, in_full, names_of
from polydelta.server.settings import SettingsError, load_settings

Polydelta = Callable[..., tuple[int, str, str]]


def test_the_engine_gets_how_kv_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_settings().engine_config
    assert (config.kv_format, config.kv_select, config.prefill) == ("native", "full", "full")
    assert config.kv_labels is None
    labels = tmp_path / "labels"
    labels.touch()
    config = load_settings(
        kv_format="int4", kv_select="quest:512", prefill="xattention:16+0.8", kv_labels=labels
    ).engine_config
    assert (config.kv_format, config.kv_select) == ("int4", "quest:512")
    assert (config.prefill, config.kv_labels) == ("xattention:16+0.8", labels)
    monkeypatch.setenv("POLYDELTA_KV_FORMAT", "int8")
    monkeypatch.setenv("POLYDELTA_KV_SELECT", "window")
    config = load_settings(kv_select="h2o").engine_config
    assert (config.kv_format, config.kv_select) == ("int8", "h2o")


@pytest.mark.parametrize(
    ("setting", "value", "way_out"),
    [
        ("kv_format", "int9", "int8"),
        ("kv_select", "quest:many", "quest[:TOKENS]"),
        ("kv_select", "window:4+0", "RECENT begins at 1"),
        ("kv_select", "xattention", "full, window"),
        ("prefill", "xattention:7+0.9", "divide"),
        ("kv_labels", "no-such-file", "is not a file"),
    ],
)
def test_a_method_that_there_is_not_is_refused_with_a_way_out(
    setting: str, value: str, way_out: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(**{setting: value})
    said = str(caught.value)
    option = f"--{setting.replace('_', '-')} (or POLYDELTA_{setting.upper()})"
    assert said.startswith(option)
    assert repr(value) in said
    assert way_out in said


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_help_names_every_method(polydelta: Polydelta, command: str) -> None:
    code, out, _ = polydelta(command, "--help")
    assert code == 0
    for option in Option:
        assert f"--{option.replace('_', '-')}" in out
        assert all(in_full(name) in out for name in names_of(option))
    assert "--kv-labels" in out


def test_what_does_not_go_together_is_one_line_before_the_weights_are_read(
    polydelta: Polydelta, tiny_folder: Path
) -> None:
    model = ("--model", str(tiny_folder))
    code, _, err = polydelta("generate", "Hi", *model, "--kv-format=gear", "--kv-select=h2o")
    assert code == 1
    assert err.startswith("Error: --kv-format gear does not go with --kv-select h2o")
    assert err.count("\n") == 1
    code, _, err = polydelta("generate", "Hi", *model, "--kv-select=infllm")
    assert code == 1
    assert "--host-kv-gib" in err


def test_generate_answers_from_a_cache_of_another_format(
    polydelta: Polydelta, tiny_folder: Path
) -> None:
    arguments = ("generate", "Once upon a time", "--raw", "--max-tokens", "3")
    code, out, err = polydelta(
        *arguments, "--model", tiny_folder, "--kv-format=int8", "--kv-select=window:1+8"
    )
    assert code == 0, err
    assert out.strip()
