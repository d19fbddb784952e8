"""The picture of what :mod:`.kernel` measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_kernel(record: dict[str, Any], path: Path) -> None:
    """Fraction of the byte limit over rows, a line for each shape."""
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(row["part"] for row in record["results"]))
    figure = Figure(figsize=(4 * len(parts) + 1, 4.5), layout="tight")
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)
    for axis, part in zip(axes[0], parts, strict=True):
        lines: dict[tuple[int, ...], dict[int, float]] = {}
        for row in (row for row in record["results"] if row["part"] == part):
            shape = (row["vocab_size"], row["hidden_size"], row["top_k"])
            lines.setdefault(shape, {})[row["rows"]] = row["fraction"]
        for line, points in lines.items():
            axis.plot(*zip(*points.items(), strict=True), marker="o", label="V {:,} d {} k {}".format(*line))
        axis.set(title=part, xlabel="guided rows", xscale="log", ylim=(0, 1.05))
        axis.legend(fontsize=6)
    axes.flat[0].set_ylabel("fraction of the byte limit")
    figure.suptitle(f"The guidance step on {record['hardware']}, {record['date']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
