"""Names beside points of a plot, so that none lies on another or on a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Of the font's size: the mean width of a character, and the height of a line.
CHARACTER, LINE = 0.56, 1.25
# How far a label begins beside its point, and half of what a point covers.
BESIDE, POINT = 6.0, 3.5
# Labels are moved up and down by so much at a time, so many times.
STEP, STEPS = 3.0, 40


@dataclass(frozen=True)
class Box:
    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )


def places(
    points: Sequence[tuple[float, float]], names: Sequence[str], font_size: float, width: float
) -> list[tuple[float, float]]:
    """The left end and the middle of each name's line. points: in typographic points, as all
    lengths here; width: names end before it."""
    taken = [Box(x - POINT, y - POINT, x + POINT, y + POINT) for x, y in points]
    placed = []
    for point, name in zip(points, names, strict=True):
        size = (CHARACTER * font_size * len(name), LINE * font_size)
        boxes = [box for box in _candidates(point, size) if box.left >= 0 and box.right <= width]
        box = next((box for box in boxes if not any(box.meets(one) for one in taken)), boxes[0])
        taken.append(box)
        placed.append((box.left, (box.bottom + box.top) / 2))
    return placed


def _candidates(point: tuple[float, float], size: tuple[float, float]) -> Iterator[Box]:
    """The nearest first."""
    (x, y), (width, height) = point, size
    for number in range(STEPS):
        for up in (number * STEP, -number * STEP) if number else (0.0,):
            bottom = y + up - height / 2
            for left in (x + BESIDE, x - BESIDE - width):
                yield Box(left, bottom, left + width, bottom + height)
