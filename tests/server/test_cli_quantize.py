"""`polydelta adapters quantize`, over a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from polydelta.adapters_store.base_layout import BaseLayout
from polydelta.adapters_store.inspection import inspect
from polydelta.adapters_store.reference import CONFIG_FILE
from polydelta.server import cli_quantize

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(polydelta: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `polydelta adapters quantize ...`; (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli_quantize, "TEXT", "One kettle, please")
    return partial(polydelta, "adapters", "quantize")


@pytest.fixture
def lora(tiny_layout: BaseLayout, adapter_writer: Callable) -> Path:
    torch.manual_seed(0)
    return adapter_writer(tiny_layout).lora("lora", rank=24)


def drifts(text: str) -> list[float]:
    """Of the table's first row: log probabilities largest and mean, KL largest and mean."""
    (row,) = (line for line in text.splitlines() if "quantised" in line)
    return [float(cell) for cell in row.strip("│ ").split("│")[1:]]


def test_fewer_bits_take_less_room_and_cost_more(
    run: Run, lora: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    size, most, cost = inspect(lora).bytes, inspect(lora).bytes, 0.0
    for bits in (8, 4, 1):
        code, out, err = run(lora, tmp_path / f"q{bits}", "--bits", bits, "--model", tiny_folder)
        assert (code, err) == (0, "")
        assert f"{bits} bits, a scale for each 64" in out
        smaller, divergence = inspect(tmp_path / f"q{bits}").bytes, drifts(out)[3]
        assert f"{size / smaller:.2f} times smaller" in out
        assert smaller < 0.7 * most
        assert divergence > 2 * cost
        most, cost = smaller, divergence


def test_without_drift_no_model_is_loaded(run: Run, lora: Path, tmp_path: Path) -> None:
    arguments = (lora, tmp_path / "q", "--bits", 4, "--no-drift", "--group-size", 32)
    code, out, err = run(*arguments, "--model", tmp_path / "missing")
    assert (code, err) == (0, "")
    assert "a scale for each 32" in out
    assert "KL" not in out
    assert inspect(tmp_path / "q").problem is None


def test_wrong_arguments_are_one_line_each(run: Run, lora: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((lora, tmp_path / "q", "--bits", 3), "bits is 3: take 8, 4 or 1"),
        ((lora, lora, "--bits", 4), "is not empty"),
        ((tmp_path / "nothing", tmp_path / "q", "--bits", 4), "There is no folder"),
    ):
        code, out, err = run(*arguments, "--no-drift")
        assert (code, out) == (1, "")
        assert message in err
    (lora / CONFIG_FILE).write_text('{"peft_type": "LORA", "r": 24, "use_dora": "?"}')
    code, _, err = run(lora, tmp_path / "q", "--bits", 4, "--no-drift")
    assert code == 1
    assert "use_dora" in err
    assert not (tmp_path / "q").exists()
