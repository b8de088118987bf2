"""Plots with a panel for each run: what happened while it ran, and to which adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from load_tests.plot_style import BLUE, FAINT, GREEN, LIGHT_BLUE, ORANGE, RED, WIDTH, Plot, Result

# Inches; panels side by side.
PANEL, COLUMNS = 2.1, 2
# Series of the pool's owners, from the bottom up.
OWNERS = {
    "pages_kv": ("KV in use", BLUE),
    "pages_cached": ("prefix cache", LIGHT_BLUE),
    "pages_adapters": ("adapters in use", ORANGE),
    "pages_adapters_idle": ("idle adapters", "#f6cf9f"),
    "pages_free": ("free", "#eef1f4"),
}


def draw_panels(results: Sequence[Result]) -> list[Plot]:
    """All of them that the results have something for."""
    plots = [_panels(results, *one) for one in PANELS]
    return [plot for plot in plots if plot is not None]


def _pool(axes: Axes, one: Result) -> bool:
    series = one["series"]
    owners = [name for name in OWNERS if name in series]
    if not owners:
        return False
    axes.stackplot(
        series["seconds"],
        [series[name] for name in owners],
        colors=[OWNERS[name][1] for name in owners],
        labels=[OWNERS[name][0] for name in owners],
        linewidth=0,
    )
    axes.margins(x=0)
    axes.set_ylim(0, max(series.get("pool_pages", [0])) or None)
    axes.set_ylabel("pages")
    return True


def _queue(axes: Axes, one: Result) -> bool:
    series = one["series"]
    drawn = [name for name in ("running", "waiting", "waiting_for_adapter") if name in series]
    for name, colour in zip(drawn, (BLUE, RED, ORANGE), strict=False):
        axes.plot(series["seconds"], series[name], color=colour, label=name.replace("_", " "))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("requests")
    return bool(drawn)


def _swaps(axes: Axes, one: Result) -> bool:
    """Loads into the pool and evictions of adapters, since the start."""
    drawn = False
    for name, label, colour in (
        ("adapter_loads_files", "read as uploaded", RED),
        ("adapter_loads_packed", "read packed", GREEN),
        ("adapter_loads_host", "into the pool", BLUE),
        ("evictions_adapter", "out of the pool", ORANGE),
    ):
        values = one["series"].get(name, [])
        if values and values[-1] > values[0]:
            drawn = True
            grown = np.asarray(values) - values[0]
            axes.plot(one["series"]["seconds"], grown, color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("adapters")
    return drawn


def _first_tokens(axes: Axes, one: Result) -> bool:
    """Each request where it was due: what it waited, or that it was not served."""
    requests = one["requests"]
    due, waited = np.asarray(requests["scheduled"]), requests["first_token"]
    served = np.asarray([value is not None for value in waited], dtype=bool)
    times = np.asarray([value for value in waited if value is not None])
    axes.scatter(due[served], times, 9, BLUE, alpha=0.65, linewidths=0, label="first token")
    if not served.all():
        height = np.full(int((~served).sum()), times.max() if times.size else 1.0)
        axes.scatter(due[~served], height, 22, RED, marker="x", linewidths=1.1, label="not served")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("s")
    return bool(due.size)


def _services(axes: Axes, one: Result) -> bool:
    """Each adapter's mean service; larger where it had more requests."""
    services = [each for each in one["services"] if each[0] is not None]
    if len(services) < 2:
        return False
    adapters, requests, service = np.asarray(services, dtype=float).T
    sizes = 6 + 60 * requests / requests.max()
    axes.scatter(adapters, service, sizes, ORANGE, alpha=0.75, linewidths=0, label="an adapter")
    axes.axhline(service.mean(), color=FAINT, linewidth=1, linestyle=":", label="their mean")
    axes.set_ylim(0, 1.1 * service.max() or None)
    axes.set_ylabel("tokens a second")
    return True


# Title, what is below the panels, what draws one, and the caption.
PANELS = (
    (
        "First tokens over time",
        "seconds after the start",
        _first_tokens,
        "Every request, where it was due. A rising line is a queue that grows.",
    ),
    (
        "Running and waiting",
        "seconds after the start",
        _queue,
        "As the server's /metrics had it twice a second.",
    ),
    (
        "The pool",
        "seconds after the start",
        _pool,
        "Pages by who holds them: KV and adapters share one pool.",
    ),
    (
        "Adapters in and out",
        "seconds after the start",
        _swaps,
        "Adapters read from disk, loaded into the pool and evicted, since the start of the run.",
    ),
    (
        "Fairness over adapters",
        "adapter",
        _services,
        "Output tokens that a request got for each second of its stay, the mean over each adapter's"
        " requests; the more requests, the larger the dot.",
    ),
)


def _panels(
    results: Sequence[Result],
    title: str,
    below: str,
    panel: Callable[[Axes, Result], bool],
    caption: str,
) -> Plot | None:
    """A panel for each run that has something to show."""
    shown = [one for one in results if panel(Figure().add_subplot(), one)]
    if not shown:
        return None
    lines = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(WIDTH, PANEL * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, COLUMNS, squeeze=False).flat
    labels: dict[str, Any] = {}
    for axes, one in zip(grid, shown, strict=False):
        panel(axes, one)
        axes.set_title(one["run"])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    for axes in list(figure.axes)[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel(below, fontsize=9)
    figure.legend(labels.values(), labels.keys(), loc="outside upper left", ncols=len(labels))
    return Plot(title, caption, figure)
