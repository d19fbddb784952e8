"""``served.json``, and the tables and the plot that are drawn from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .models import BASE_SIZES, REWARD_SIZES
from .record import Record

TO_FIRST, BETWEEN = "ttft_median_ms", "itl_median_ms"
SHOWN = {
    "requests_per_s": ("requests / s", 2, False),
    "tokens_per_s": ("tokens / s", 1, True),
    TO_FIRST: ("first token, ms", 1, True),
    "ttft_p90_ms": ("90th percentile", 1, False),
    BETWEEN: ("between tokens, ms", 1, True),
    "itl_p90_ms": ("90th percentile", 1, False),
}
"""Figure -> its column, its decimals, and whether the ratio to the first configuration stands beside it."""

Runs = list[Mapping[str, Any]]


class ServedRecord(Record):
    """That of ``benchmarks/served.py``. Runs of a section with the same ``part`` are one repeat."""

    name = "served"

    def report(self) -> Iterator[str]:
        settings = self.of["settings"]
        base, reward = (
            sizes | settings[key] for sizes, key in ((BASE_SIZES, "base_config"), (REWARD_SIZES, "reward_config"))
        )
        made = "random models, {num_hidden_layers} layers of {hidden_size} guided by {} of {}"
        models = made.format(reward["num_hidden_layers"], reward["hidden_size"], **base)
        if settings["base"]:
            models = f"{settings['base']} guided by {settings['reward']}"
        most_others = max(row["others"] for section in self.results.values() for row in section["rows"])
        dates = sorted({section["date"] for section in self.results.values()})
        yield "# Under load\n\nWhat guidance costs a server: `python -m benchmarks.served`, by vLLM's own client.\n"
        yield (
            f"On {self.of['hardware']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, vLLM {settings['vllm']}, "
            f"{settings['dtype']}{', eager' if settings['enforce_eager'] else ''}, {models}. Prompts of "
            f"{settings['prompt_len']} tokens, answers of {settings['output_len']}, k = {settings['top_k']}; at most "
            f"{settings['max_num_seqs']} requests in a batch. Servers and client share the machine. "
            "Medians of the repeats; in brackets the ratio to the first row, the median of the repeats' own, and "
            "between which two these lie. The 90th percentiles are medians of the repeats' own. "
            f"Processes that have no part in it took {most_others:.0%} of the processors at most."
        )
        for section in self.results.values():
            for offered in dict.fromkeys(row["offered_per_s"] for row in section["rows"]):
                yield from self._table([row for row in section["rows"] if row["offered_per_s"] == offered], offered)

    def _table(self, rows: Runs, offered: float | None) -> Iterator[str]:
        first = rows[0]
        repeats = len({row["part"] for row in rows})
        if offered is None:
            yield f"\n## Saturation: {first['requests']} requests at once, {repeats} times\n"
        else:
            yield f"\n## {offered:.2f} requests a second arrive, {first['requests']} in all, {repeats} times\n"
        yield "| | " + " | ".join(name for name, _, _ in SHOWN.values()) + " |"
        yield "| --- |" + " ---: |" * len(SHOWN)
        for configuration in configurations_of(rows):
            cells = [median_of(rows, configuration, *column) for column in SHOWN.items()]
            yield f"| {configuration} | " + " | ".join(cells) + " |"

    def plot(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        rows: Runs = self.results.get("rates", {}).get("rows", [])
        if not rows:
            return
        plotted = {
            TO_FIRST: "time to first token, ms",
            BETWEEN: "time between tokens, ms",
            "tokens_per_s": "tokens / s",
        }
        figure, axes = pyplot.subplots(1, len(plotted), figsize=(12, 3.5), layout="constrained")
        rates = sorted({row["offered_per_s"] for row in rows})
        for axis, (figure_name, label) in zip(axes, plotted.items(), strict=True):
            for configuration in configurations_of(rows):
                own = [row for row in rows if row["configuration"] == configuration]
                values = [[row[figure_name] for row in own if row["offered_per_s"] == rate] for rate in rates]
                axis.plot(rates, list(map(statistics.median, values)), "o-", label=configuration)
            axis.set_xlabel("requests / s that arrive")
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
        figure.savefig(path, dpi=110, bbox_inches="tight")
        pyplot.close("all")


def configurations_of(rows: Runs) -> list[str]:
    """In the order of their first repeat."""
    return list(dict.fromkeys(row["configuration"] for row in rows))


def median_of(rows: Runs, configuration: str, figure: str, column: tuple[str, int, bool]) -> str:
    """A figure's median over the repeats, with its ratio to the first configuration's in the same repeat."""
    _, decimals, with_ratio = column
    own = {row["part"]: row[figure] for row in rows if row["configuration"] == configuration}
    text = f"{statistics.median(own.values()):.{decimals}f}"
    first = configurations_of(rows)[0]
    if not with_ratio or configuration == first:
        return text
    reference = {row["part"]: row[figure] for row in rows if row["configuration"] == first}
    ratios = sorted(value / reference[part] for part, value in own.items())
    return f"{text} ({statistics.median(ratios):.2f}: {ratios[0]:.2f} to {ratios[-1]:.2f})"
