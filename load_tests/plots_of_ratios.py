"""The ratios of a suite that compares, beside their bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from load_tests.comparisons import Compared
from load_tests.plot_style import BLUE, FAINT, GREEN, INK, RED, STYLE, WIDTH, Plot

# Inches of one comparison.
ROW = 0.34
COLOURS = {True: GREEN, False: RED, None: BLUE}
CAPTION = (
    "A figure of one run over that of another. The dot is the median of the turns, the line goes"
    " from the least to the greatest of them, and the shaded side is where the bar wants it: green"
    " is met, red is missed, blue has no bar."
)


def draw_ratios(compared: Sequence[Compared]) -> Plot:
    """compared: at least one."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, ROW * len(compared) + 0.8), layout="constrained")
        axes = figure.add_subplot()
        shown = [ratio for one in compared for ratio in one.ratios if 0 < ratio < math.inf]
        left, right = 0.8 * min([*shown, 0.5]), 1.25 * max([*shown, 2.0])
        for place, one in enumerate(compared):
            _row(axes, place, one, left, right)
        axes.axvline(1.0, color=FAINT, linewidth=1, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlim(left, right)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylim(len(compared) - 0.4, -0.6)
        axes.set_yticks(range(len(compared)), [one.comparison.name for one in compared])
        axes.grid(visible=False, axis="y")
    return Plot("Ratios", CAPTION, figure)


def _row(axes: Axes, place: int, one: Compared, left: float, right: float) -> None:
    wanted, colour = one.comparison, COLOURS[one.met]
    if wanted.bar:
        start = left if wanted.at_least is None else wanted.at_least
        end = right if wanted.at_most is None else wanted.at_most
        axes.barh(place, end - start, 0.72, start, color=colour, alpha=0.13, linewidth=0)
    if 0 < one.ratio < math.inf:
        axes.plot([min(one.ratios), max(one.ratios)], [place, place], color=colour, alpha=0.6)
        axes.scatter([one.ratio], [place], 30, colour, zorder=3)
    axes.annotate(
        f"{one.ratio:.3g}",
        (min(max(one.ratio, left), right), place),
        (7, 4),
        textcoords="offset points",
        fontsize=7.5,
        color=INK,
    )
