"""`polydelta adapters formats`, and the README's tables, which it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from polydelta.adapters_store.formats.refusals import REFUSALS
from polydelta.adapters_store.formats.registry import FORMATS

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- polydelta adapters formats --markdown -->", "<!-- end of formats -->"

Run = Callable[..., str]


@pytest.fixture
def run(polydelta: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `polydelta adapters formats ...`; stdout."""
    for setting in ("MODEL", "DTYPE"):
        monkeypatch.delenv(f"POLYDELTA_{setting}", raising=False)

    def call(*arguments: str) -> str:
        code, out, _ = polydelta("adapters", "formats", *arguments)
        assert code == 0
        return out

    return call


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|│").replace("│", "|").split("|")]


def by_format(out: str) -> dict[str, list[str]]:
    return {row[1]: row for row in map(cells, out.splitlines()) if len(row) == 6}


def test_the_readme_has_what_the_command_writes(run: Run) -> None:
    section = README.read_text().partition(BEGIN)[2].partition(END)[0]
    assert section.strip() == run("--markdown").strip(), (
        f"Put what `polydelta adapters formats --markdown` prints between {BEGIN} and {END}."
    )


def test_every_format_is_listed_with_what_it_costs_or_why_it_is_refused(run: Run) -> None:
    rows = [cells(line) for line in run("--markdown").splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {6, 2}
    assert all(all(row) for row in rows)
    listed = {name.strip("`") for row in rows if len(row) == 6 for name in row[1].split(", ")}
    assert FORMATS.keys() <= listed
    assert {row[0].strip("`") for row in rows if len(row) == 2} >= REFUSALS.keys()


def test_costs_are_those_over_the_default_model(run: Run) -> None:
    table = by_format(run())
    # 30 layers, each with A [8, 576] twice and B [576, 8] and [192, 8]; over 3,538,944 weights.
    assert table["LORA, LORA use_rslora, LORA use_qalora, LORA use_bdlora"][4:] == [
        "0.434%",
        "921.6 KB",
    ]
    # Twice 30 layers of 3 heads of 64, for each of 20 tokens.
    assert table["PREFIX_TUNING"][4:] == ["attends to 20 more", "460.8 KB"]
    assert table["LN_TUNING"][4] == "nothing"


def test_another_dtype_takes_other_bytes(run: Run) -> None:
    table = by_format(run("--dtype", "float32"))
    assert table["LORA, LORA use_rslora, LORA use_qalora, LORA use_bdlora"][4:] == [
        "0.434%",
        "1.8 MB",
    ]
