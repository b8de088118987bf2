"""Quality against bytes: the plot of `kv_quality.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.plot_labels import places
from load_tests.plot_style import BLUE, FAINT, GREEN, INK, ORANGE, STYLE, WIDTH

# Inches of one model, and points of a label.
HEIGHT, FONT = 4.2, 7.5
# Costs are linear up to this one, in percent, and logarithmic beyond it.
LINEAR = 1.0
TICKS = (-2, -1, 0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


@dataclass(frozen=True)
class Point:
    """One way."""

    name: str
    # Bytes that an answer's token reads, of native KV in full; 1.0 is as many.
    read: float
    # Of native full attention's perplexity; 0.0 is nothing. And its standard error.
    cost: float
    error: float
    is_format: bool
    is_selection: bool

    @property
    def at(self) -> tuple[float, float]:
        return self.read, 100 * self.cost

    @property
    def colour(self) -> str:
        if self.is_format:
            return GREEN if self.is_selection else BLUE
        return ORANGE


def draw(models: Mapping[str, Sequence[Point]], bars: Iterable[float]) -> Figure:
    """models: by name, the points of each."""
    with rc_context(STYLE):
        size = (WIDTH, HEIGHT * len(models) + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0]
        most = max([3.0, *(100 * point.cost for points in models.values() for point in points)])
        for axes, (name, points) in zip(panels, models.items(), strict=True):
            _panel(axes, points, sorted({*bars}), most)
            axes.set_title(name)
        panels[-1].set_xlabel("bytes of KV that an answer's token reads, of native in full")
        handles = [
            panels[0].scatter([], [], 24, colour, label=label)
            for colour, label in ((BLUE, "format"), (ORANGE, "selection"), (GREEN, "both"))
        ]
        figure.legend(handles=handles, loc="outside upper right", ncols=3)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, points in zip(panels, models.values(), strict=True):
            _label(figure, axes, points)
    return figure


def save(figure: Figure, path: Path) -> None:
    """In the format that the file's name ends with."""
    with rc_context(STYLE):
        no_date = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=no_date)


def _panel(axes: Axes, points: Sequence[Point], bars: Sequence[float], most: float) -> None:
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=1.0)
    least = min([0.0, *(100 * (point.cost - point.error) for point in points)])
    axes.set_ylim(least - 0.2 * LINEAR, 1.4 * most)
    axes.set_yticks([tick for tick in TICKS if least <= tick <= most])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, 1.15)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_ylabel("perplexity, % above native")
    for bar in bars:
        axes.axhline(100 * bar, color=FAINT, linewidth=0.8, linestyle=":")
    for point in points:
        axes.errorbar(*point.at, yerr=100 * point.error, color=point.colour, fmt="none", alpha=0.5)
        axes.scatter(*point.at, 24, point.colour, zorder=3)


def _label(figure: Figure, axes: Axes, points: Sequence[Point]) -> None:
    """Once it is known where the axes lie."""
    scale = 72 / figure.dpi
    box = axes.get_window_extent()
    pixels = [axes.transData.transform(point.at) for point in points]
    at = [((x - box.x0) * scale, (y - box.y0) * scale) for x, y in pixels]
    placed = places(at, [point.name for point in points], FONT, box.width * scale)
    for point, (x, y), (left, middle) in zip(points, at, placed, strict=True):
        near = abs(middle - y) < FONT
        axes.annotate(
            point.name,
            point.at,
            (left - x, middle - y),
            textcoords="offset points",
            va="center",
            fontsize=FONT,
            color=INK,
            arrowprops=None if near else {"arrowstyle": "-", "color": FAINT, "linewidth": 0.5},
        )
