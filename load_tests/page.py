"""The HTML report: one file without scripts and without anything fetched from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from load_tests.comparisons import Compared
from load_tests.plots import draw
from load_tests.plots_of_ratios import draw_ratios
from load_tests.summary import PAGE_COLUMNS, RATIO_COLUMNS, page_cells, ratio_cells

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #f5f7fa; color: #1f2933;
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }}
main {{ max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }}
h1 {{ font-size: 26px; margin: 0 0 4px; }}
h2 {{ font-size: 17px; margin: 0 0 2px; }}
p {{ margin: 0; }}
.about, .caption {{ color: #52606d; }}
.caption {{ font-size: 13.5px; max-width: 75ch; }}
section {{ background: #fff; border: 1px solid #e4e7eb; border-radius: 8px; padding: 18px 20px;
  margin-top: 20px; overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums;
  margin-top: 10px; }}
th, td {{ padding: 5px 12px 5px 0; text-align: right; border-bottom: 1px solid #e4e7eb;
  vertical-align: top; white-space: nowrap; }}
th {{ color: #52606d; font-weight: 600; vertical-align: bottom; }}
th:first-child, td:first-child, .facts td {{ text-align: left; }}
.facts td + td, .facts td:only-child {{ white-space: normal; overflow-wrap: anywhere; }}
tr:last-child td {{ border-bottom: 0; }}
.run {{ margin-top: 12px; }}
summary {{ cursor: pointer; font-size: 13.5px; }}
pre {{ font-size: 12.5px; margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
svg {{ display: block; width: 100%; height: auto; margin-top: 12px; }}
.bad {{ color: #c8453b; font-weight: 600; }}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="about">{about}</p>
{sections}
</main>
</body>
</html>
"""


def make_page(
    results: Sequence[Mapping[str, Any]], about: str = "", compared: Sequence[Compared] = ()
) -> str:
    """results: lines of a results file, at least one. about: what the suite is for. compared: then
    runs stand there several times, of which the first is drawn."""
    suites = dict.fromkeys(one["suite"] for one in results)
    sections = [_section("Ratios", _ratios(compared))] if compared else []
    sections.append(_section("Summary", _summary(results)))
    drawn = list({one["run"]: one for one in reversed(results)}.values())[::-1]
    for plot in draw(drawn if compared else results):
        caption = f'<p class="caption">{escape(plot.caption)}</p>'
        sections.append(_section(plot.title, caption + plot.svg()))
    sections.append(_section("Where", _where(results)))
    sections.append(_section("Configuration", "".join(map(_configuration, results))))
    return _PAGE.format(
        title=escape(f"Load test: {', '.join(suites)}"),
        about=escape(about),
        sections="\n".join(sections),
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _summary(results: Sequence[Mapping[str, Any]]) -> str:
    rows = [page_cells(one) for one in results]
    head = "".join(f"<th>{_lines(column)}</th>" for column in PAGE_COLUMNS)
    caption = "Percentiles are p50 / p90 / p99 of served requests; service is over all requests."
    return f'<p class="caption">{caption}</p><table><tr>{head}</tr>{_rows(rows)}</table>'


def _ratios(compared: Sequence[Compared]) -> str:
    plot = draw_ratios(compared)
    head = "".join(f"<th>{_lines(column)}</th>" for column in (*RATIO_COLUMNS, "figure"))
    rows = _rows([[*ratio_cells(one), one.comparison.figure] for one in compared])
    return (
        f'<p class="caption">{escape(plot.caption)}</p>{plot.svg()}'
        f"<table><tr>{head}</tr>{rows}</table>"
    )


def _where(results: Sequence[Mapping[str, Any]]) -> str:
    """The facts of all runs; runs that differ in one have it several times."""
    facts = {
        "when": f"{results[0]['date']} to {results[-1]['date']}",
        "revision": _distinct(one["revision"] or "unknown" for one in results),
        "server": _distinct(one["server"]["about"] for one in results),
        "model": _distinct(one["server"]["model"] for one in results),
    }
    for name in results[0]["machine"]:
        facts[name] = _distinct(str(one["machine"].get(name)) for one in results)
    return f'<table class="facts">{_rows([list(fact) for fact in facts.items()])}</table>'


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _configuration(one: Mapping[str, Any]) -> str:
    """What a run was told, and what the server counted; all but the workload on a click."""
    told = {name: one[name] for name in ("config", "server", "server_counts")}
    text = json.dumps(told, indent=2, ensure_ascii=False)
    failures = "".join(f'<p class="bad">{escape(line)}</p>' for line in one["first_failures"])
    workload = f'<p class="caption">{escape(_workload(one["config"]["workload"]))}</p>'
    return (
        f"<div class='run'><strong>{escape(one['run'])}</strong>{workload}{failures}"
        f"<details><summary>All of it</summary><pre>{escape(text)}</pre></details></div>"
    )


def _workload(told: Mapping[str, Any]) -> str:
    """`{"kind": "Synthetic", "rate": 4.0}` -> "Synthetic(rate 4.0)"; what is in it likewise."""
    facts = (
        f"{name} {_workload(value) if isinstance(value, Mapping) else value}"
        for name, value in told.items()
        if name != "kind"
    )
    return f"{told.get('kind', '')}({', '.join(facts)})"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "".join(
        f"<tr>{''.join(f'<td>{_lines(cell)}</td>' for cell in row)}</tr>\n" for row in rows
    )


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")
