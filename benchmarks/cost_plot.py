"""The picture of what guidance costs: tokens a second of each way to be guided, over those of unguided vLLM.

    python -m benchmarks.cost_plot [--cpu RECORD] [--card RECORD] [--output PICTURE]

Draws benchmarks/results/cost.png from the records there. A panel shows one machine, and compares only its own runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .pictures import INK, MUTED, new_figure, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECORDS = Path("benchmarks/results")
GUIDED, DRAFTED, OTHER = "#1a7f37", "#8250df", "#8c959f"
COLORS = {"pad-vllm": GUIDED, "pad-vllm, drafts": DRAFTED}
BAR_NAMES = {
    "guided": "pad-vllm",
    "transformers loop, cached": "loop over transformers",
    "naive plugin": "naive plugin, a row at a time",
}
"""Methods of the section ``baselines``, and what their bars are called."""


class Bar(NamedTuple):
    name: str
    ratio: float
    """to unguided vLLM of the same run"""
    between: tuple[float, float] | None
    """where the repeats lie; None where the record does not say"""


def cpu_bars(record: Mapping[str, Any]) -> list[Bar]:
    rows = {row["label"]: row for row in record["results"]["baselines"]["rows"]}
    return [Bar(name, rows[label]["ratio"], tuple(rows[label]["middle_half"])) for label, name in BAR_NAMES.items()]


def card_bars(record: Mapping[str, Any]) -> Iterator[Bar]:
    """By batch, without drafts and with. Drafts ran in an engine of their own: both are compared with the other one's
    unguided tokens."""
    rows = {(row["mode"], row["batch"]): row for row in record["results"]}
    for batch in (batch for mode, batch in rows if mode == "draft"):
        unguided = rows["pad", batch]["ms_per_token"]["unguided"]
        for mode, name in (("pad", "pad-vllm"), ("draft", "pad-vllm, drafts")):
            least, most = rows[mode, batch]["least_and_most"]["guided"]
            between = (
                (unguided / most, unguided / least) if least > 0 else None
            )  # of differences: noise may exceed them
            yield Bar(f"{name}, batch {batch}", unguided / rows[mode, batch]["ms_per_token"]["guided"], between)


def draw(axis: Axes, bars: Sequence[Bar], title: str) -> None:
    plain(axis)
    axis.set_title(title, fontsize=9.5, color=INK, loc="left")
    for i, bar in enumerate(bars):
        color = COLORS.get(bar.name.partition(", batch")[0], OTHER)
        axis.barh(i, bar.ratio, height=0.62, color=color)
        end = bar.ratio
        if bar.between:
            axis.plot(bar.between, [i, i], color=INK, linewidth=1)
            end = max(end, bar.between[1])
        axis.annotate(
            f"{bar.ratio:.2f}", (end, i), (5, 0), textcoords="offset points", va="center", fontsize=10, color=INK
        )
    axis.axvline(1, color=INK, linewidth=1, linestyle="--", zorder=0)
    axis.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axis.invert_yaxis()
    axis.tick_params(axis="y", length=0)


def plot_cost(cpu: Mapping[str, Any], card: Mapping[str, Any], path: Path) -> None:
    """Two panels, of one CPU and one card, with a bar for each way to be guided."""
    panels = [cpu_bars(cpu), list(card_bars(card))]
    figure = new_figure(4.6)
    axes = figure.subplots(2, sharex=True, height_ratios=[len(bars) + 0.5 for bars in panels])
    batch = cpu["results"]["baselines"]["rows"][0]["cell"]["batch"]
    titles = [
        f"{cpu['hardware']}, {cpu['results']['baselines']['date']}: 110M guided by 11M, "
        f"{cpu['settings']['dtype']}, batch {batch}",
        f"one {card['hardware']}, {card['date']}: 8B guided by 1B, dummy weights, bfloat16",
    ]
    for axis, bars, title in zip(axes, panels, titles, strict=True):
        draw(axis, bars, title)
    at: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 10, "color": MUTED}
    axes[0].annotate("unguided vLLM: 1", (1, 1), (5, 0), **at)
    axes[0].tick_params(axis="x", length=0)
    axes[1].set_xlim(0, 2)
    axes[1].set_xlabel("tokens a second, over those of unguided vLLM on the same machine", color=INK)
    save(figure, path, shown_costs(cpu, card))


def shown_costs(cpu: Mapping[str, Any], card: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """Machine and date of each panel -> name and ratio of its bars."""
    panels = [
        (f"{cpu['hardware']}, {cpu['results']['baselines']['date']}", cpu_bars(cpu)),
        (f"{card['hardware']}, {card['date']}", card_bars(card)),
    ]
    return {machine: [[bar.name, round(bar.ratio, 2)] for bar in bars] for machine, bars in panels}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cpu", type=Path, default=RECORDS / "throughput.json", help="record of pad-vllm bench")
    parser.add_argument("--card", type=Path, default=max(RECORDS.glob("h200/cost-*.json")), help="record of a card")
    parser.add_argument("--output", type=Path, default=RECORDS / "cost.png")
    args = parser.parse_args()
    cpu, card = (json.loads(path.read_text()) for path in (args.cpu, args.card))
    plot_cost(cpu, card, args.output)
    print(args.output)


if __name__ == "__main__":
    main()
