"""`--adapter-bits` on the command line and in the environment."""

from __future__ import annotations

import pytest

from polydelta.server.settings import SettingsError, load_settings


def test_the_engine_gets_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().engine_config.adapter_bits is None
    assert load_settings(adapter_bits=4).engine_config.adapter_bits == 4
    monkeypatch.setenv("POLYDELTA_ADAPTER_BITS", "8")
    assert load_settings().engine_config.adapter_bits == 8


@pytest.mark.parametrize("wrong", [16, 1, "four"])
def test_bits_that_there_are_not_are_refused_by_name(wrong: object) -> None:
    message = r"--adapter-bits \(or POLYDELTA_ADAPTER_BITS\).*8 or 4"
    with pytest.raises(SettingsError, match=message):
        load_settings(adapter_bits=wrong)


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_help_names_the_option(polydelta, command: str) -> None:
    code, out, _ = polydelta(command, "--help")
    assert code == 0
    assert "--adapter-bits" in out
