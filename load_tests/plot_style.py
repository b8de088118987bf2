"""How the report's plots look."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# A line of a results file.
Result = Mapping[str, Any]

# Inches.
WIDTH = 10.4
INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, LIGHT_BLUE, ORANGE, RED, GREEN = "#2f6db5", "#a9c8ea", "#e58a2b", "#c8453b", "#3f9d6b"
# Runs, told apart; more runs than colours begin again with broken lines.
RUN_COLOURS = (BLUE, ORANGE, GREEN, RED, "#8059a8", "#3fa7b8", "#8c6d46", "#d06fa6")
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b8c1cc",
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    # Text stays text: small, and found by a browser's search.
    "svg.fonttype": "none",
    # The same results make the same file.
    "svg.hashsalt": "load_tests",
}


@dataclass(frozen=True)
class Plot:
    """A drawing and what is said of it."""

    title: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """The drawing alone, without what stands before it in a file of its own."""
        file = io.StringIO()
        with rc_context(STYLE):
            self.figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
        return text[text.index("<svg") :]


def legend_above(figure: Figure, axes: Axes) -> None:
    """One legend for panels that show the same, above all of them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=max(1, len(labels)))
