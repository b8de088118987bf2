"""`polydelta kv-formats`, and the tables of docs/kv_cache.md, which it wrote."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from polydelta.engine.kv_composition import ROWS, Option, in_full, names_of
from polydelta.server.options import as_options

DOCS = Path(__file__).parents[2] / "docs" / "kv_cache.md"
BEGIN, END = "<!-- polydelta kv-formats --markdown -->", "<!-- end of kv-formats -->"

Run = Callable[..., str]


@pytest.fixture
def run(polydelta: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `polydelta kv-formats ...` for a pool of 2GiB on a CPU; stdout."""
    for setting in ("MODEL", "DTYPE", "KV_SELECT", "BLOCK_SIZE"):
        monkeypatch.delenv(f"POLYDELTA_{setting}", raising=False)

    def call(*arguments: object) -> str:
        code, out, err = polydelta("kv-formats", "--device", "cpu", "--pool", "2GiB", *arguments)
        assert code == 0, err
        return out

    return call


def rows(out: str) -> list[list[str]]:
    """Of both tables in Markdown, by their cells."""
    lines = [line for line in out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def by_format(out: str) -> dict[str, list[str]]:
    return {cells[0]: cells[1:] for cells in rows(out) if len(cells) == 5}


def test_the_docs_have_what_the_command_writes(run: Run) -> None:
    section = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    assert section.strip() == run("--markdown").strip(), (
        f"Put what `polydelta kv-formats --markdown` prints between {BEGIN} and {END}."
    )


def test_every_method_is_listed(run: Run) -> None:
    out = run("--markdown")
    assert by_format(out).keys() >= set(names_of(Option.FORMAT))
    composed = [(cells[0], name) for cells in rows(out) for name in cells[1].split(", ")]
    for option in Option:
        flag = f"--{option.replace('_', '-')}"
        assert all((flag, in_full(name)) in composed for name in names_of(option))


def test_no_name_is_cut_off_in_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run()
    for option in Option:
        assert f"--{option.replace('_', '-')}" in out
        assert all(in_full(name) in out for name in names_of(option))
    assert "…" not in out
    settings = re.findall(r"--[a-z-]+", " ".join(as_options(row.limits) for row in ROWS))
    assert len(settings) == 2
    assert all(setting in out for setting in settings)
    assert max(map(len, out.splitlines())) <= 80


def test_sizes_are_those_of_the_default_model(run: Run) -> None:
    table = by_format(run("--markdown"))
    # 30 layers, keys and values, 3 heads of 64, 2 bytes; pages of 16 tokens in 2 GiB.
    assert table["native"] == ["23,040", "16", "93,200", "1.00x"]
    # 31 tokens of 6 * (64 + 2) bytes are 12,276 of a page's 12,288.
    assert table["int8"] == ["11,892", "31", "180,575", "1.94x"]
    # The open pages of 64 sequences and one more lie in the pool's memory too.
    tokens = int(table["kivi-4"][2].replace(",", ""))
    assert tokens < (2 << 30) // (12_288 * 30) * int(table["kivi-4"][1])


def test_what_a_selection_notes_takes_room_in_a_page(run: Run) -> None:
    plain, with_bounds = (
        by_format(run("--markdown")),
        by_format(run("--markdown", "--kv-select", "quest")),
    )
    assert int(with_bounds["native"][1]) < int(plain["native"][1])


def test_another_pool_holds_another_number_of_tokens(run: Run) -> None:
    table = by_format(run("--markdown", "--pool", "64MiB"))
    assert table["native"][2] == f"{(64 << 20) // (12_288 * 30) * 16:,}"


def test_a_pool_that_is_too_small_is_told_what_would_do(run: Run) -> None:
    out = run("--markdown", "--pool", "64MiB")
    # 65 open pages of 56 native tokens, and two pages of 16; all of 23,040 bytes.
    least = -(-23_040 * (65 * 56 + 2 * 16) // (1 << 20))
    assert by_format(out)["int4"][2] == "0"
    assert "int4: A pool of 64.0 MiB has room for no pages of 0.35 MiB" in out
    assert f"raise pool to {least} MiB, or lower --max-batch-size or --block-size." in out
    assert by_format(run("--markdown", "--pool", f"{least}MiB"))["int4"][2] != "0"
    assert by_format(run("--markdown", "--pool", f"{least - 1}MiB"))["int4"][2] == "0"


def test_formats_that_a_selection_refuses_have_no_sizes(run: Run) -> None:
    out = run("--markdown", "--kv-select", "double-sparsity:64")
    assert by_format(out)["int4"] == ["", "", "", ""]
    said = "--kv-format int4 does not go with --kv-select double-sparsity:64, but with full, window"
    assert f"\nint4: {said}" in out


def test_what_prompts_read_is_looked_at_too(run: Run) -> None:
    out = run("--markdown", "--prefill", "xattention")
    assert by_format(out)["int8"][0]
    assert by_format(out)["kivi-4"] == ["", "", "", ""]
    assert "\nkivi-4: --kv-format kivi-4 does not go with --prefill xattention" in out


def test_a_pool_that_was_split_holds_half_as_many_tokens(run: Run) -> None:
    one, half = (
        by_format(run("--markdown", "--pool", pool)) for pool in ("2GiB", "2GiB,split:0.5")
    )
    for name, cells in half.items():
        if name in names_of(Option.FORMAT):
            tokens, of_all = (int(some[2].replace(",", "")) for some in (cells, one[name]))
            assert abs(2 * tokens - of_all) <= 2 * int(cells[1])


def test_a_page_that_is_too_small_says_what_can_be_done(run: Run) -> None:
    out = run("--markdown", "--block-size", "1", "--kv-select", "quest")
    assert by_format(out)["native"] == ["", "", "", ""]
    assert "raise --block-size" in out


def test_what_no_format_goes_with_is_one_line(
    polydelta: Callable[..., tuple[int, str, str]],
) -> None:
    code, _, err = polydelta("kv-formats", "--kv-select", "window", "--prefill", "xattention")
    assert code == 1
    assert err.startswith("Error: --kv-select window:4+512 does not go with --prefill xattention")
    assert err.count("\n") == 1


def test_a_wrong_setting_is_one_line(polydelta: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = polydelta("kv-formats", "--kv-select", "few")
    assert code == 1
    assert err.startswith("Error: --kv-select")
    assert err.count("\n") == 1
