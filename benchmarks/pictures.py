"""What the pictures of results share: their look, labels that stay clear of each other, and the numbers in the file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

PAGE_WIDTH, DPI = 8.3, 200
"""Inches, and pixels an inch. The README shows a picture 830 pixels wide: a point of type is 1.4 pixels there."""
INK, MUTED = "#1f2328", "#656d76"
LABEL_PLACES = [
    (
        dx * (0 if dy else gap) + 3 * dx,
        dy * gap,
        {-1: "right", 0: "center", 1: "left"}[dx],
        {-1: "top", 0: "center", 1: "bottom"}[dy],
    )
    for gap in (7, 11, 16, 24, 32)
    for dx, dy in ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1))
]
"""Where a label may stand beside its point: offset in points of type, and alignment. The first free one is taken."""


def new_figure(height: float) -> Figure:
    """``PAGE_WIDTH`` by ``height`` inches, on white: it reads the same on a light page and on a dark one."""
    from matplotlib.figure import Figure

    return Figure(figsize=(PAGE_WIDTH, height), dpi=DPI, facecolor="white", layout="constrained")


def plain(axis: Axes) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(MUTED)
    axis.tick_params(colors=INK, labelsize=9)


def label_points(
    axis: Axes,
    labels: Sequence[tuple[str, tuple[float, float], str]],
    lines: Sequence[tuple[float, float]],
    thin: Sequence[tuple[float, float]],
) -> None:
    """Write each label beside its point, where it covers the least.

    Args:
        axis: with its limits set, in a figure whose layout is done.
        labels: text, point and color of each, in the axis' units.
        lines: points of lines. A label covers one only where no other place is left; so with points and other labels.
        thin: points of thin lines, which a label covers rather than those.
    """
    import numpy as np
    from matplotlib.patheffects import withStroke

    def boxes(points: Sequence[tuple[float, float]], size: float) -> list[list[float]]:
        pixels: Any = axis.transData.transform(points) if points else []
        return [[x - size / 2, y - size / 2, x + size / 2, y + size / 2] for x, y in pixels]

    taken = boxes([point for _, point, _ in labels], 18) + boxes(lines, 8)
    taken += [list(text.get_window_extent().extents) for text in axis.texts]
    thin_ones, inside = boxes(thin, 8), axis.get_window_extent()

    def overlaps(box: Sequence[float], others: Sequence[Sequence[float]]) -> int:
        x0, y0, x1, y1 = np.reshape(others, (-1, 4)).T
        return int(((x0 < box[2]) & (box[0] < x1) & (y0 < box[3]) & (box[1] < y1)).sum())

    def covered(box: Sequence[float]) -> tuple[int, int]:
        cut = not (inside.containsx(box[0]) and inside.containsx(box[2]))
        return overlaps(box, taken) + 1000 * cut, overlaps(box, thin_ones)

    for text, point, color in labels:
        note = axis.annotate(text, point, (0, 0), textcoords="offset points", fontsize=9, color=color)
        note.set_path_effects([withStroke(linewidth=3, foreground="white")])

        def put(place: tuple[int, int, str, str], note: Annotation = note) -> list[float]:
            note.set(position=place[:2], horizontalalignment=place[2], verticalalignment=place[3])
            return list(note.get_window_extent().extents)

        taken.append(put(min(LABEL_PLACES, key=lambda place: covered(put(place)))))


def save(figure: Figure, path: Path, shown: Any) -> None:
    """Write a PNG that carries the numbers that it shows, as JSON: a test holds them against the records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Description": json.dumps(shown)})


def shown_in(path: Path) -> Any:
    """The numbers that :func:`save` wrote into a picture."""
    from PIL import Image

    with Image.open(path) as image:
        return json.loads(image.info["Description"])
