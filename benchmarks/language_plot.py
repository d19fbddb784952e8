"""The picture of the language table: wishes satisfied against fluency, by way of personalizing.

    python -m benchmarks.language_plot [benchmarks/results/language.json ...]

Draws each record's picture again, beside it.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .pictures import INK, MUTED, label_points, new_figure, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MODELS = {
    "language": "SmolLM2-135M-Instruct",
    "language-gemma": "Gemma 3 270M, which follows no instructions",
    "language-rivals": "SmolLM2-135M-Instruct",
}
"""What a table is about, by its name."""


class PointLook(NamedTuple):
    """How methods of one kind are drawn."""

    pattern: str
    """of their names"""
    name: str
    """of a point, with the pattern's groups"""
    called: str
    """in the legend"""
    color: str
    marker: str
    line: str = ""
    """of their points; none where it is empty"""


METHOD_LOOKS = [
    PointLook(r"PAD, (beta .*)", r"\1", "guided (PAD), by beta", "#1a7f37", "o", "-"),
    PointLook(r"PAD against the base, (beta .*)", r"\1", "guided, held against the base model", "#1a7f37", "^", ":"),
    PointLook(r"PAD against itself, (beta .*)", r"\1", "guided, held against itself", "#1a7f37", "v", ":"),
    PointLook(r"prompting( with examples)? and PAD", r"both\1", "guided, and the wish in the prompt", "#1a7f37", "s"),
    PointLook(
        r"PAD (?:untrained, (?=from))?(untrained|from the opposite), beta .*",
        r"\1",
        "guided by a model without training",
        "#8250df",
        "o",
    ),
    PointLook(r"Persona-judge|steering vector", r"\g<0>", "others, without training a model", "#9a6700", "D"),
    PointLook(r"prompting.*", r"\g<0>", "the wish in the prompt", "#0969da", "o"),
    PointLook(r"best of .*", r"\g<0>", "best of several answers", MUTED, "o"),
]
TUNED_PER_USER = "DPO for "
"""How their names begin. They are a line: each user has a model, trained for nothing but that user's wish."""
OF_ONE_USER = ("sliders of ", TUNED_PER_USER)
"""How the names of methods begin that answer for one user. The picture's points are methods that answer for all."""


class Plotted(NamedTuple):
    kind: PointLook
    name: str
    nll: float
    satisfied: tuple[float, float, float]
    """% of wishes, and the 95% interval"""


def rows_for_all(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of users with one wish, the methods that answer for each of them."""
    return [row for row in rows if row["group"] == "one" and not row["method"].startswith(OF_ONE_USER)]


def points_of(rows: Sequence[Mapping[str, Any]]) -> Iterator[Plotted]:
    for row in rows_for_all(rows):
        kind, match = next((k, m) for k in METHOD_LOOKS if (m := re.fullmatch(k.pattern, row["method"])))
        mean, low, high = (100 * value for value in row["satisfied"])
        yield Plotted(kind, match.expand(kind.name), row["nll"], (mean, low, high))


def plot_language(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Satisfaction against fluency, a point for each method."""
    points, unguided = list(points_of(rows)), rows[0]["nll"]
    figure = new_figure(5.8)
    axis = figure.subplots()
    plain(axis)
    axis.set_title(MODELS[path.stem], fontsize=11, color=INK, loc="left")
    xs = [unguided, *(point.nll for point in points)]
    margin = 0.15 * (max(xs) - min(xs))
    axis.set_xlim(min(xs) - margin, max(xs) + margin)
    axis.set_ylim(min(49, *(p.satisfied[1] for p in points)) - 2, max(62, *(p.satisfied[2] for p in points)) + 3)
    axis.set_xlabel("nats a token under the unguided model   (left: more fluent)", color=INK)
    axis.set_ylabel("wishes satisfied (%), with 95% intervals", color=INK)
    thin = [place for point in points for place in draw_interval(axis, point)] + draw_unguided(axis, unguided)
    lines = draw_tuned(axis, rows)
    for kind in METHOD_LOOKS:
        own = [point for point in points if point.kind is kind]
        if own:
            lines += draw_kind(axis, kind, own)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False, labelcolor=INK)
    figure.draw_without_rendering()  # lays out, so that labels know where points are
    label_points(axis, [(p.name, (p.nll, p.satisfied[0]), p.kind.color) for p in points], lines, thin)
    save(figure, path, shown_points(rows))


def draw_unguided(axis: Axes, nll: float) -> list[tuple[float, float]]:
    """Draw lines at its likelihood and at 50%, which answers reach that heed no wish; points along both lines."""
    axis.axvline(nll, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    axis.axhline(50, color=INK, linewidth=0.9, linestyle=":", zorder=1)
    at: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": INK, "annotation_clip": False}
    low, right = axis.get_ylim()[0], axis.get_xlim()[1]
    axis.annotate("unguided", (nll, low), (-4, 4), ha="right", va="bottom", **at)
    axis.annotate("50%:\nno effect", (right, 50), (4, 0), ha="left", va="center", **at)
    return along((nll, low), (nll, axis.get_ylim()[1])) + along((axis.get_xlim()[0], 50), (right, 50))


def draw_tuned(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Draw what a model for each user reaches; points along the line."""
    tuned = [100 * row["satisfied"][0] for row in rows if row["method"].startswith(TUNED_PER_USER)]
    if not tuned:
        return []
    mean, (left, right) = statistics.mean(tuned), axis.get_xlim()
    axis.axhline(mean, color=MUTED, linestyle="--", linewidth=1.2, zorder=1)
    at: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": MUTED}
    axis.annotate(f"DPO per user: {mean:.0f}%", (left, mean), (4, 3), va="bottom", **at)
    return along((left, mean), (right, mean))


def along(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """Points of a line, close enough that no label fits between two."""
    (x, y), (to_x, to_y) = start, end
    return [(x + (to_x - x) * i / 100, y + (to_y - y) * i / 100) for i in range(101)]


def draw_interval(axis: Axes, point: Plotted) -> list[tuple[float, float]]:
    _, low, high = point.satisfied
    axis.plot([point.nll] * 2, [low, high], color=point.kind.color, linewidth=1, alpha=0.45, zorder=2)
    return along((point.nll, low), (point.nll, high))


def draw_kind(axis: Axes, kind: PointLook, points: Sequence[Plotted]) -> list[tuple[float, float]]:
    """Draw points, with their line; points along that line."""
    places = [(point.nll, point.satisfied[0]) for point in points]
    look: dict[str, Any] = {"linestyle": kind.line or "none", "markersize": 7, "linewidth": 1.8, "zorder": 3}
    axis.plot(*zip(*places, strict=True), marker=kind.marker, color=kind.color, label=kind.called, **look)
    if not kind.line:
        return []
    return [place for start, end in pairwise(places) for place in along(start, end)]


def shown_points(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """What a picture says that it shows: method, nats a token, and % satisfied with its interval."""
    own = rows_for_all(rows)
    points = [[row["method"], row["nll"], *(100 * value for value in row["satisfied"])] for row in own]
    return [[rows[0]["method"], rows[0]["nll"]], *points]


def main() -> None:
    import json

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "records", nargs="*", type=Path, default=[Path("benchmarks/results", f"{name}.json") for name in MODELS]
    )
    for path in filter(Path.exists, parser.parse_args().records):
        plot_language(json.loads(path.read_text())["rows"], path.with_suffix(".png"))
        print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
