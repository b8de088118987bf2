"""The GPU benchmark without a GPU: every section's way through Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_figures import Figure, Section, show, shown_seconds
from benchmarks.gpu_worker import SECTIONS, Worker

ROOT = Path(__file__).parents[2]
# What a machine with a GPU and nothing but the engine may lack.
HTTP = ("fastapi", "starlette", "uvicorn", "pydantic", "pydantic_settings", "prometheus_client")


# Parity has a test of its own, in tests/parity/.
@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["lora", "attention", "decode"], marks=pytest.mark.long),
        ["kv", "kv-serving"],
        pytest.param([n for n in SECTIONS if n != "parity"], marks=pytest.mark.long),
    ],
    ids=["three", "kv", "all"],
)
def test_every_section_runs_and_is_right_in_the_interpreter(
    names: list[str], tmp_path: Path
) -> None:
    result = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--output", str(result)]
    run = subprocess.run(
        [*command, "--sections", ",".join(names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    sections = {
        section["section"]: section for section in json.loads(result.read_text())["sections"]
    }
    assert list(sections) == names
    for name, section in sections.items():
        assert section["figures"], name
        wrong = [figure for figure in section["figures"] if figure["met"] is False]
        assert wrong == [], name
        # Times of the interpreter mean nothing, and are not told.
        assert not any("us" in figure for figure in section["figures"])


def test_it_is_imported_without_the_libraries_of_the_http_server() -> None:
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in HTTP)
    code = f"import sys; {blocked}import benchmarks.gpu, benchmarks.kernel_resources"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_section_that_fails_is_told_with_the_end_of_its_traceback() -> None:
    worker = Worker(quick=True)
    try:
        section = worker.run("no such section", 120.0, lambda figure: None)
    finally:
        worker.kill()
    assert section.error is not None
    assert "KeyError: 'no such section'" in section.error


def test_a_process_that_dies_is_told() -> None:
    worker = Worker(quick=True)
    worker._process.kill()
    section = worker.run("parity", 120.0, lambda figure: None)
    assert section.error == "Its process ended with -9."


def test_a_section_that_takes_too_long_is_given_up() -> None:
    worker = Worker(quick=True)
    try:
        section = worker.run("parity", 0.01, lambda figure: None)
    finally:
        worker.kill()
    assert section.error == "It was not done after 0 s."


@pytest.mark.parametrize(
    ("figure", "share", "met"),
    [
        (Figure("as fast as hoped for", 4e-6, 3e-6, 0.75), 0.75, True),
        (Figure("slower", 5e-6, 3e-6, 0.75), 0.6, False),
        (Figure("no aim", 5e-6, 3e-6), 0.6, None),
        (Figure("fast and wrong", 4e-6, 3e-6, 0.75, error=0.1), 0.75, False),
        (Figure("not a number", error=float("nan")), None, False),
        (Figure("right", error=0.001, agrees=True), None, True),
        (Figure("a difference below zero", -1e-6, 3e-6, 0.75), None, True),
        (Figure("differs", agrees=False), None, False),
    ],
)
def test_an_aim_is_met_by_what_is_right_and_fast(
    figure: Figure, share: float | None, met: bool | None
) -> None:
    assert figure.share == (None if share is None else pytest.approx(share))
    assert figure.met is met
    assert figure.to_json()["met"] is met


def test_the_table_has_what_has_an_aim_what_is_wrong_and_what_failed() -> None:
    figures = [Figure("aimed", 4e-6, 3e-6, 0.75), Figure("wrong", error=1.0), Figure("fine", 1e-6)]
    sections = [Section("one", figures), Section("two", error="Traceback\nValueError: no [room]")]
    table = show(sections, "title")
    first = [str(cell) for cell in table.columns[0].cells]
    assert first[:2] == ["aimed", "wrong"]
    assert "1 more" in first[2]
    assert "ValueError: no" in first[3]
    assert len(first) == 4


def test_seconds_are_shown_with_a_unit_that_suits_them() -> None:
    assert [shown_seconds(s) for s in (None, 2.5, 0.0031, 4.2e-6)] == [
        "",
        "2.50 s",
        "3.10 ms",
        "4.2 us",
    ]
