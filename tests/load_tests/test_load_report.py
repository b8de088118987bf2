"""The report, from a run against a server without a model to the page."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from load_tests import report
from load_tests.comparisons import Comparison
from load_tests.page import make_page
from load_tests.results import read_lines
from load_tests.run import Run
from load_tests.suites import SUITES
from load_tests.suites.suite import Suite, comparing
from load_tests.summary import table
from load_tests.workload import Synthetic, Tenants

QUICK = Synthetic(60.0, 0.3, 3, prompt_tokens=(2, 5), output_tokens=(2, 5))
VOID = {"br", "meta"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """arguments -> what the command line gives; a suite `quick` stands beside the others."""
    runs = (
        Run("open <loop>", QUICK, edge_seconds=0.05),
        Run("closed", QUICK, in_flight=2, visits="asked", edge_seconds=0.05),
    )
    monkeypatch.setitem(SUITES, "quick", Suite("For a test.", runs))
    monkeypatch.setattr(report, "_machine", lambda: {"cpu": "a <slow> one", "cores": 2})
    app = typer.Typer()
    app.command()(report.main)
    return lambda *arguments: CliRunner().invoke(app, [str(one) for one in arguments])


class Reader(HTMLParser):
    """Checks that what is opened is closed, and gathers the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_a_suite_is_run_told_and_drawn(tmp_path: Path, fake_server, command):
    done = command("quick", "--url", fake_server.url, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    first, second = read_lines(tmp_path / report.RESULTS)
    assert (first["run"], second["run"]) == ("open <loop>", "closed")
    for line in (first, second):
        assert line["suite"] == "quick"
        assert line["figures"]["outcomes"] == {"served": 18}
        asked = {"url": fake_server.url, "about": fake_server.url}
        assert line["server"] == {"model": "base", "adapters": 2} | asked
        # Of the two that there are, and of the base.
        assert {adapter for adapter, _, _ in line["services"]} <= {None, 0, 1}
        assert line["machine"] == {"cpu": "a <slow> one", "cores": 2}
        assert line["config"]["workload"]["rate"] == 60.0
        assert len(line["requests"]["first_token"]) == 18
        assert line["series"]["pages_kv"][0] == 5.0
        assert len(line["series"]["seconds"]) >= 2
        assert line["server_counts"]["adapter_loads_host"] >= 1
        assert sum(requests for _, requests, _ in line["services"]) == 18
    # Three adapters are wanted, two are there: the third request's is the first one again.
    assert {body["model"] for body in fake_server.asked} == {"base", "dates", "names"}
    page = read_page((tmp_path / report.PAGE).read_text())
    text = "".join(page.text)
    for title in ("Throughput", "Service", "Time to first token", "The pool", "open <loop>"):
        assert title in text
    # All that it shows is in it.
    assert [link for link in page.links if not link.startswith("#")] == []


def test_the_page_is_made_again_from_the_results(tmp_path: Path, fake_server, command):
    assert command("quick", "--url", fake_server.url, "--out", tmp_path).exit_code == 0
    page = (tmp_path / report.PAGE).read_text()
    again = tmp_path / "again"
    done = command("--from", tmp_path / report.RESULTS, "--out", again)
    assert done.exit_code == 0, done.output
    assert (again / report.PAGE).read_text() == page


def line(run: str = "one", **changes: Any) -> dict[str, Any]:
    """A result of which nothing was served."""
    figures = {
        "requests": 1,
        "outcomes": {"503": 1},
        "refused": 1,
        "failed": 0,
        "throughput": {"requests": 0, "requests_per_second": 0.0, "output_tokens_per_second": 0.0},
        "first_token_ms": None,
        "per_token_ms": None,
        "request_ms": None,
        "slo_attainment": 0.0,
        "satisfaction": 0.0,
        "jain_fairness": None,
    }
    figures["throughput_without_ends"] = figures["throughput"]
    return {
        "suite": "short",
        "run": run,
        "date": "2025-01-01 12:00:00",
        "config": {"slo_seconds": 6.0, "workload": {"kind": "Replay", "path": "a<b"}},
        "machine": {"cpu": "fast"},
        "revision": None,
        "server": {"about": "x", "model": "m"},
        "figures": figures,
        "server_counts": {},
        "first_failures": ["503: <b>no</b>"],
        "requests": {
            "scheduled": [0.0],
            "first_token": [None],
            "per_token": [None],
            "total": [None],
        },
        "services": [[0, 1, 0.0]],
        "series": {"seconds": []},
    } | changes


def test_a_run_of_which_nothing_was_served_has_a_page():
    page = make_page([line()])
    text = "".join(read_page(page).text)
    assert "503: <b>no</b>" in text
    assert "Replay(path a<b)" in text
    assert "<b>" not in page
    assert "First tokens over time" in text
    assert "Time per output token" not in text


def test_every_drawing_is_whole():
    page = make_page([line("a & b")])
    drawings = ["<svg" + rest.partition("</svg>")[0] + "</svg>" for rest in page.split("<svg")[1:]]
    assert len(drawings) >= 3
    for drawing in drawings:
        assert ET.fromstring(drawing).tag.endswith("svg")
    assert "a &amp; b" in drawings[0]


def test_a_terminal_of_80_characters_has_the_whole_table():
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table([line("5 adapters")], "Load test"))
    shown = console.export_text()
    assert "5 adapters" in shown
    assert "0/1" in shown
    assert "…" not in shown


def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path, command):
    def said(*arguments: object) -> str:
        done = command(*arguments)
        assert done.exit_code != 0
        return str(done.exception)

    assert "no suite 'long'" in said("long")
    assert "nothing with 'x'" in said("smoke", "--only", "x")
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("{}\n")
    assert "no results of load tests" in said("--from", nothing)
    assert "7" in said("quick", "--url", "http://127.0.0.1:7", "--out", tmp_path)


def test_a_server_without_adapters_or_one_that_serves_nothing_is_told(
    tmp_path: Path, fake_server, command
):
    fake_server.respond = lambda body: (503, "full")
    done = command("quick", "--url", fake_server.url, "--out", tmp_path)
    assert "serves nothing: 503: full" in str(done.exception)
    fake_server.models = fake_server.models[:1]
    done = command("quick", "--url", fake_server.url, "--out", tmp_path)
    assert "lists no adapters" in str(done.exception)


def test_the_suites_are_listed(command):
    shown = command("--list").output
    assert all(name in shown for name in SUITES)
    assert "2,000 adapters" in shown


def test_results_are_json_line_by_line(tmp_path: Path, fake_server, command):
    assert command("quick", "--only", "closed", "--url", fake_server.url, "--out", tmp_path)
    (text,) = (tmp_path / report.RESULTS).read_text().splitlines()
    assert json.loads(text)["run"] == "closed"


@pytest.fixture
def comparing_command(monkeypatch: pytest.MonkeyPatch, command):
    """The same with a suite that compares."""
    closed, many = Run("closed", QUICK, in_flight=2), Run("a & b", QUICK, in_flight=8)
    tokens = "throughput.output_tokens_per_second"
    comparisons = (
        Comparison("8 in flight / 2", tokens, many, closed, at_least=1e-6),
        Comparison("what was <served>", "slo_attainment", closed, None, at_least=2.0),
    )
    monkeypatch.setitem(SUITES, "turns", comparing("For a test.", comparisons))
    return command


def test_runs_that_take_turns_leave_ratios_and_brief_results(
    tmp_path: Path, fake_server, comparing_command
):
    done = comparing_command("turns", "--url", fake_server.url, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "8 in flight / 2" in done.output
    assert "at least 2  missed" in done.output
    runs = read_lines(tmp_path / report.RESULTS)
    assert [one["run"] for one in runs] == ["a & b", "closed", "closed", "a & b"]
    brief = [json.loads(text) for text in (tmp_path / report.BRIEF).read_text().splitlines()]
    assert [one.get("met") for one in brief] == [True, False, None, None, None, None]
    assert brief[1]["values"] == [1.0, 1.0]
    for one, whole in zip(brief[2:], runs, strict=True):
        assert one["figures"] == whole["figures"]
        assert one["config"] == whole["config"]
        for name, column in one["requests"].items():
            assert column == pytest.approx(whole["requests"][name], abs=0.01)
        assert one["server_counts"] == whole["server_counts"]
    assert (tmp_path / report.BRIEF).stat().st_size < 0.8 * (
        (tmp_path / report.RESULTS).stat().st_size
    )
    text = "".join(read_page((tmp_path / report.PAGE).read_text()).text)
    assert "Ratios" in text
    assert "what was <served>" in text
    # Brief results make a page, too.
    again = comparing_command("--from", tmp_path / report.BRIEF, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert "8 in flight / 2" in again.output
    assert "Ratios" in (tmp_path / "again" / report.PAGE).read_text()


def test_a_suite_that_compares_is_chosen_from_by_comparison(comparing_command):
    shown = comparing_command("--list").output
    assert "8 in flight / 2" in shown
    assert [run.name for run in SUITES["turns"].only("served").runs] == ["closed", "closed"]
    assert SUITES["turns"].only("nothing").runs == ()


def test_a_server_at_a_url_is_not_asked_with_the_suites_keys(
    tmp_path: Path, fake_server, command, monkeypatch: pytest.MonkeyPatch
):
    load = Tenants((("light", QUICK), ("flood", QUICK)))
    keys = (("light", "sk-light"), ("flood", "sk-flood"))
    run = Run("two tenants", load, tenant_keys=keys, api_key="sk-operator", edge_seconds=0.05)
    monkeypatch.setitem(SUITES, "tenants", Suite("For a test.", (run,)))
    url = ("--url", fake_server.url, "--api-key", "mine")
    assert command("tenants", *url, "--out", tmp_path).exit_code == 0
    assert set(fake_server.keys) == {"mine"}
    (line,) = read_lines(tmp_path / report.RESULTS)
    told = line["figures"]["tenants"]
    assert {tenant: each["outcomes"] for tenant, each in told.items()} == {
        "light": {"served": 18},
        "flood": {"served": 18},
    }
