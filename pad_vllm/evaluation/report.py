"""An evaluation as a Markdown table, and as plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pad_vllm.evaluation.harness import Method
from pad_vllm.evaluation.methods import Base, Guided, Prompting

TABLE_HEADER = ("method", "satisfaction", "win rate", "well formed", "NLL / token", "distinct-2", "time / base")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of an evaluation in Markdown, a table for each group of users. Intervals are 95%."""

    def share(estimate: Sequence[float]) -> str:
        mean, low, high = (100 * value for value in estimate)
        return f"{mean:.0f}% ({low:.0f} to {high:.0f})"

    parts = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        lines = [f"### {group} ({own[0]['num_users']} users, {own[0]['num_answers']} answers a method)", ""]
        lines += [f"| {' | '.join(TABLE_HEADER)} |", "|" + " --- |" * len(TABLE_HEADER)]
        for row in own:
            values = [share(row[name]) for name in ("satisfaction", "win_rate", "well_formed")]
            values += [f"{row['nll'][0]:.2f}", f"{row['distinct_2']:.2f}", f"{row['seconds_over_base']:.1f}"]
            lines.append(f"| {' | '.join([row['method'], *values])} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def plot(
    results: Mapping[str, Sequence[Mapping[str, Any]]], folder: str | Path, methods: Sequence[Method]
) -> list[Path]:
    """Write two PNG files: satisfaction against well-formedness over beta, and satisfaction by dimension.

    Args:
        results: rows by base model.
        methods: of the rows.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots take `pip install 'pad-vllm[plot]'`") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    folder = Path(folder)
    unguided = next(method for method in methods if isinstance(method, Base))
    answered = {row["method"] for row in next(iter(results.values()))}
    guided = [method for method in methods if isinstance(method, Guided) and method.name in answered]
    groups = list(dict.fromkeys(row["group"] for rows in results.values() for row in rows))
    figure, axes = pyplot.subplots(
        len(groups),
        len(results),
        figsize=(4.5 * len(results), 4 * len(groups)),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for (base, rows), column in zip(results.items(), axes.T, strict=True):
        for group, axis in zip(groups, column, strict=True):
            own = {row["method"]: row for row in rows if row["group"] == group}
            points = {name: (100 * row["well_formed"][0], 100 * row["satisfaction"][0]) for name, row in own.items()}
            path = [(f"{method.beta:g}", points.pop(method.name)) for method in guided if method.name in points]
            line = [points[unguided.name], *(point for _, point in path)]
            axis.plot(*zip(*line, strict=True), ".-", color="tab:green", linewidth=1, label="pad, by beta")
            for i, (beta, point) in enumerate(path):  # at high satisfaction they crowd: above and below in turn
                place = {"xytext": (0, 5 if i % 2 else -11), "textcoords": "offset points", "ha": "center"}
                axis.annotate(beta, point, **place, fontsize=7, color="tab:green")
            for (name, point), marker in zip(points.items(), "oXsDP^vd<>*h", strict=False):
                axis.plot(*point, marker, markersize=5, alpha=0.7, label=name)
            axis.set_title(f"{base}, {group}", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("well formed answers (%)")
    for axis in axes[:, 0]:
        axis.set_ylabel("preference satisfaction (%)")
    axes[0, 0].legend(fontsize=7, loc="lower left")
    paths = [folder / "alignment-beta.png", folder / "alignment-dimensions.png"]
    figure.savefig(paths[0], dpi=110, bbox_inches="tight")

    figure, axes = pyplot.subplots(
        len(groups),
        len(results),
        figsize=(4.5 * len(results), 3 * len(groups)),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    prompting = [method for method in methods if isinstance(method, Prompting)]
    shown = {method.name for method in (unguided, *prompting, *guided[(len(guided) - 1) // 2 :][:1])}
    for (base, rows), column in zip(results.items(), axes.T, strict=True):
        for group, axis in zip(groups, column, strict=True):
            own = {row["method"]: row for row in rows if row["group"] == group and row["method"] in shown}
            names = list(own[unguided.name]["dimensions"])
            for i, (method, row) in enumerate(own.items()):
                positions = [x + (i - 1) * 0.27 for x in range(len(names))]
                axis.bar(positions, [100 * row["dimensions"][n] for n in names], 0.25, label=method)
            axis.set_xticks(range(len(names)), names, rotation=30, fontsize=7, ha="right")
            axis.set_title(f"{base}, {group}", fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("preference satisfaction (%)")
    axes[-1, 0].legend(fontsize=7, loc="lower left")
    figure.savefig(paths[1], dpi=110, bbox_inches="tight")
    pyplot.close("all")
    return paths
