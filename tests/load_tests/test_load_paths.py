"""Results say nothing of where on a machine they were made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.served import Served
from load_tests import made_adapters, report
from load_tests.brief import write_brief
from load_tests.results import ROOT, read_lines
from load_tests.run import Run
from load_tests.suites import SUITES
from load_tests.suites.pressure import TENANTS
from load_tests.suites.suite import Suite
from load_tests.workload import Synthetic

COMMITTED = sorted((ROOT / "benchmarks" / "results").iterdir())
# At the start of a word, as `tokens/s` and `../benchmarks/` have no path: two names at least.
ABSOLUTE_PATH = re.compile(r"""(?<![\w./)\]}-])/[\w.-]+/[\w.-]+""")


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_name_no_absolute_path(path: Path):
    assert ABSOLUTE_PATH.findall(path.read_text()) == []


def test_results_of_a_server_of_ones_own_name_the_repositorys_files_from_its_root(
    tmp_path: Path, fake_server, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    @contextmanager
    def served(arguments: str) -> Iterator[Served]:
        asked.append(arguments)
        yield Served(fake_server.url, 1.0)

    monkeypatch.setattr(report, "served", served)
    monkeypatch.setattr(report, "_machine", dict)
    monkeypatch.setattr(made_adapters, "make", lambda wanted: made_adapters.FOLDER / wanted.name)
    options = ("--tenants", str(TENANTS))
    run = Run("quick", Synthetic(60.0, 0.1, 3), server=options, edge_seconds=0.01)
    monkeypatch.setitem(SUITES, "quick", Suite("For a test.", (run,)))
    report.main("quick", tmp_path, only="")
    (arguments,) = asked
    assert arguments.count(f"{ROOT}/") == 3, "the server is told where the files are"
    names = report.RESULTS, report.BRIEF, report.PAGE
    for text in ((tmp_path / name).read_text() for name in names):
        assert str(ROOT) not in text
    (line,) = read_lines(tmp_path / report.RESULTS)
    assert line["config"]["server"] == ["--tenants", "load_tests/suites/tenants.toml"]
    assert line["server"]["arguments"] == (
        "--tenants load_tests/suites/tenants.toml"
        " --adapters build/load_tests/adapters/3-attention-r8 --store build/load_tests/store"
    )
    # Nor do brief results of those that were written with other paths.
    line["server"]["arguments"] = arguments
    write_brief(tmp_path / report.BRIEF, "quick", [line], [])
    (line,) = map(json.loads, (tmp_path / report.BRIEF).read_text().splitlines())
    assert "--store build/load_tests/store" in line["server"]["arguments"]
