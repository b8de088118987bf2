"""The report's plots; those with a row for each run are drawn here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from load_tests.plot_style import (
    BLUE,
    FAINT,
    GREEN,
    LIGHT_BLUE,
    ORANGE,
    RED,
    RUN_COLOURS,
    STYLE,
    WIDTH,
    Plot,
    Result,
    legend_above,
)
from load_tests.plots_over_time import draw_panels

# Inches that a run takes in a bar chart.
ROW = 0.42
PERCENTILES = (("p50", "o", BLUE), ("p90", "D", ORANGE), ("p99", "s", RED))


def draw(results: Sequence[Result]) -> list[Plot]:
    """All plots that the results have something for."""
    with rc_context(STYLE):
        latencies = [_latency(results, *one) for one in LATENCIES]
        return [
            _throughput(results),
            _service(results),
            *(plot for plot in latencies if plot is not None),
            *draw_panels(results),
        ]


def _throughput(results: Sequence[Result]) -> Plot:
    figure, (tokens, requests) = _rows(results)
    for axes, key, unit in (
        (tokens, "output_tokens_per_second", "output tokens a second"),
        (requests, "requests_per_second", "requests a second"),
    ):
        for name, colour, shift, label in (
            ("throughput", LIGHT_BLUE, -0.19, "whole run"),
            ("throughput_without_ends", BLUE, 0.19, "without its ends"),
        ):
            values = [one["figures"][name][key] for one in results]
            bars = axes.barh(np.arange(len(results)) + shift, values, 0.36, color=colour)
            axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=7.5, color=FAINT)
            bars.set_label(label)
        axes.set_xlabel(unit)
        axes.margins(x=0.12)
    legend_above(figure, tokens)
    return Plot(
        "Throughput",
        "Requests that were served: from the start to the last one's end, and without the seconds"
        " at both ends in which the server fills up and runs dry.",
        figure,
    )


def _service(results: Sequence[Result]) -> Plot:
    figure, (axes, fair) = _rows(results)
    places = np.arange(len(results))
    for key, colour, shift, label in (
        ("slo_attainment", BLUE, -0.19, "SLO attainment"),
        ("satisfaction", GREEN, 0.19, "satisfaction"),
    ):
        values = [one["figures"][key] for one in results]
        bars = axes.barh(places + shift, values, 0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=7.5, color=FAINT)
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of all requests")
    values = [one["figures"]["jain_fairness"] or 0.0 for one in results]
    bars = fair.barh(places, values, 0.5, color=ORANGE, label="fairness")
    fair.bar_label(bars, fmt="%.3f", padding=3, fontsize=7.5, color=FAINT)
    fair.set_xlim(0, 1.12)
    fair.set_xlabel("Jain's index over adapters")
    legend_above(figure, axes)
    return Plot(
        "Service",
        "SLO attainment: the share of all requests, refused ones included, whose first token came"
        " within the bound. Satisfaction: the mean of 1 - (t / bound)², 0 beyond it. Fairness:"
        " Jain's index of the mean service of each adapter, 1 when all are equal.",
        figure,
    )


# What is measured, its key among the figures and the one of its column, unit, seconds to unit.
LATENCIES = (
    ("Time to first token", "first_token_ms", "first_token", "s", 1.0),
    ("Time per output token", "per_token_ms", "per_token", "ms", 1e3),
    ("Request, from due to done", "request_ms", "total", "s", 1.0),
)


def _latency(
    results: Sequence[Result], title: str, key: str, column: str, unit: str, scale: float
) -> Plot | None:
    samples = [
        scale * np.sort([value for value in one["requests"][column] if value is not None])
        for one in results
    ]
    if not any(found.size for found in samples):
        return None
    figure, (points, curves) = _rows(results, least=2.8, shared=False)
    places = np.arange(len(results))
    found = [one["figures"][key] for one in results]
    for place, one in enumerate(found):
        if one:
            ends = [one["p50"] * scale / 1e3, one["p99"] * scale / 1e3]
            points.plot(ends, [place, place], **_line(place) | {"linewidth": 2.5, "alpha": 0.6})
    for name, marker, colour in PERCENTILES:
        values = [one[name] * scale / 1e3 if one else np.nan for one in found]
        points.scatter(values, places, 30, colour, marker=marker, label=name, zorder=3)
    _log(points, unit)
    legend_above(figure, points)
    for place, sample in enumerate(samples):
        if sample.size:
            curves.ecdf(sample, **_line(place))
    curves.set_yticks([0, 0.5, 0.9, 0.99], ["0", "50 %", "90 %", "99 %"])
    _log(curves, unit)
    if column == "first_token":
        for bound in {one["config"]["slo_seconds"] for one in results}:
            curves.axvline(bound, color=FAINT, linewidth=1, linestyle=":")
    curves.set_ylim(0, 1.02)
    curves.set_ylabel("share of served requests")
    return Plot(title, LATENCY_CAPTIONS[column], figure)


LATENCY_CAPTIONS = {
    "first_token": "Of served requests, from when a request was due. Left: the median, and the 90th"
    " and 99th percentile; right: all of them, in the colours of the left, and the bound as a"
    " dotted line.",
    "per_token": "Of served requests, after the first token: the mean gap within one request.",
    "total": "Of served requests, from when a request was due to its last byte.",
}


def _rows(results: Sequence[Result], least: float = 1.6, shared: bool = True) -> tuple[Figure, Any]:
    """Two panels side by side with a row for each run, the first run on top; the second one has
    rows of its own unless they are shared."""
    figure = Figure(figsize=(WIDTH, max(least, ROW * len(results) + 1.0)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=shared)
    panels[0].set_yticks(range(len(results)), [one["run"] for one in results])
    panels[0].set_ylim(len(results) - 0.4, -0.6)
    for axes in panels if shared else panels[:1]:
        axes.grid(visible=False, axis="y")
    return figure, panels


def _log(axes: Axes, unit: str) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(unit)


def _line(place: int) -> dict[str, Any]:
    again, colour = divmod(place, len(RUN_COLOURS))
    return {"color": RUN_COLOURS[colour], "linestyle": ("-", "--", ":")[again % 3]}
