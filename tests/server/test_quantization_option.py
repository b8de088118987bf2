"""`--quantization` on the command line and in the environment."""

from __future__ import annotations

import pytest

from polydelta.server.settings import SettingsError, load_settings


def test_the_engine_gets_the_quantisation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().engine_config.quantization is None
    assert load_settings(quantization="int4").engine_config.quantization == "int4"
    monkeypatch.setenv("POLYDELTA_QUANTIZATION", "int8")
    assert load_settings().engine_config.quantization == "int8"


def test_a_quantisation_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"--quantization \(or POLYDELTA_QUANTIZATION\).*int8"):
        load_settings(quantization="int3")


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_help_names_the_option(polydelta, command: str) -> None:
    code, out, _ = polydelta(command, "--help")
    assert code == 0
    assert "--quantization" in out
