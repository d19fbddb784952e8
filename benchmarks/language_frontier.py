"""Satisfaction against likelihood and loops, by beta, with a bound on each token's divergence and without.

    python -m benchmarks.language_frontier [--prompts 4] [--methods NAME ...] [--work FOLDER] [--output FOLDER]

SmolLM2 guided by the demo's reward model, for users with one of twelve wishes, as in the language table
(``benchmarks/language.py``), whose prompts, wordings and measures these are. Answers are kept in the work folder as
they come, and are not made again, also where there are more prompts later. Writes language-frontier.md, .json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")

import numpy as np

from pad_vllm.demo.measures import loops, measures_of
from pad_vllm.demo.recipe import ENGINE
from pad_vllm.demo.smollm import build, build_untrained
from pad_vllm.evaluation.harness import Asked
from pad_vllm.evaluation.methods import BASE, Guided
from pad_vllm.evaluation.metrics import NUM_RESAMPLES, bootstrap, distinct

from .language_bench import Bench, Cell, Sizes
from .language_report import Unguided
from .record import hardware

FREE_BETAS = (0.5, 1.0, 1.5, 2.0, 3.0)
BOUNDED_BETA = 4.0
"""Stronger than is served, so that it is the bound which holds guidance back."""
BOUNDS = (0.1, 0.3, 0.6, 1.0)
"""Nats."""
Records = Mapping[str, Sequence[Mapping[str, Any]]]
"""By method; each of a cell."""


def free(beta: float) -> Guided:
    return Guided(f"beta {beta:g}", beta)


def bounded(bound: float) -> Guided:
    return Guided(
        f"beta {BOUNDED_BETA:g}, within {bound:g} nats", BOUNDED_BETA, lambda _: {"pad_max_divergence": bound}
    )


STRENGTHS = (*map(free, FREE_BETAS), *map(bounded, BOUNDS))
FREE = [free(beta).name for beta in FREE_BETAS]


def ask(bench: Bench, names: Sequence[str] = ("",)) -> Records:
    """What each method answered, of those that answered everything; ``names``: how the names begin of those that are to
    answer now."""
    everyone = range(len(bench.cells))
    first = {cell.prompt: i for i, cell in reversed(list(enumerate(bench.cells)))}
    bench.answer([Asked(BASE, [i for i in sorted(first.values()) for _ in range(bench.sizes.base_answers)])])
    bench.answer([Asked(method, everyone) for method in STRENGTHS if method.name.startswith(tuple(names))])
    found = {method.name: bench.kept(method) for method in (BASE, *STRENGTHS)}
    return {name: kept for name, kept in found.items() if name == BASE.name or len(kept) == len(bench.cells)}


class Tables:
    """Of each method and cell: whether its wish is satisfied, and nats a token; [prompts, wishes]. Unguided answers are
    satisfied by half, since their median is what satisfies."""

    def __init__(self, cells: Sequence[Cell], found: Records, unguided: Unguided) -> None:
        prompts = list(dict.fromkeys(cell.prompt for cell in cells))
        shape = len(prompts), len(cells) // len(prompts)
        self.satisfied = {BASE.name: np.full(shape, 0.5)}
        own: dict[str, list[float]] = {prompt: [] for prompt in prompts}
        for record in found[BASE.name]:
            own[cells[record["cell"]].prompt].append(record["nll"])
        self.nll = {BASE.name: np.array([np.mean(own[prompt]) for prompt in prompts])[:, None].repeat(shape[1], 1)}
        for name in (method.name for method in STRENGTHS if method.name in found):
            records = sorted(found[name], key=lambda record: record["cell"])
            self.nll[name] = np.array([record["nll"] for record in records]).reshape(shape)
            asked = ((cells[record["cell"]], measures_of(record["text"])) for record in records)
            shares = [unguided.satisfied(cell.prompt, cell.values[0], measures) for cell, measures in asked]
            self.satisfied[name] = np.array(shares).reshape(shape)


def gains(tables: Tables, name: str, seed: int = 0) -> list[float] | None:
    """By how much more a method satisfies than guidance without a bound does at the beta of its likelihood, where that
    is between two that were measured, or below the least (the curve begins with the unguided answers): the mean, and
    its 95% interval over prompts and wishes. None: beyond the strongest."""
    rng, curve = np.random.default_rng(seed), [BASE.name, *(one for one in FREE if one in tables.nll)]
    num_prompts, num_wishes = tables.nll[name].shape
    differences = []
    for i in range(NUM_RESAMPLES + 1):
        prompts, wishes = np.arange(num_prompts)[:, None], np.arange(num_wishes)[None]
        if i:
            prompts = rng.integers(num_prompts, size=(num_prompts, 1))
            wishes = rng.integers(num_wishes, size=(num_prompts, num_wishes))
        nll, satisfied = (
            {one: float(table[one][prompts, wishes].mean()) for one in (*curve, name)}
            for table in (tables.nll, tables.satisfied)
        )
        if not i and nll[name] > max(nll[one] for one in curve):
            return None
        points = sorted((nll[one], satisfied[one]) for one in curve)
        differences.append(satisfied[name] - float(np.interp(nll[name], *zip(*points, strict=True))))
    return [differences[0], *(float(np.quantile(differences[1:], share)) for share in (0.025, 0.975))]


def frontier_rows(bench: Bench, found: Records) -> list[dict[str, Any]]:
    tables = Tables(bench.cells, found, Unguided(bench, found[BASE.name]))
    rows = []
    for name, records in found.items():
        prompts = [bench.cells[record["cell"]].prompt for record in records]
        texts = [record["text"] for record in records]
        num_prompts, num_wishes = tables.nll[name].shape
        groups = [str(i) for i in range(num_prompts) for _ in range(num_wishes)]
        rows.append(
            {
                "method": name,
                "num_answers": len(records),
                "satisfied": bootstrap(tables.satisfied[name].ravel().tolist(), groups),
                "nll": float(tables.nll[name].mean()),
                "loops": bootstrap([float(loops(text)) for text in texts], prompts),
                "distinct_2": distinct(texts, 2),
                "gain": gains(tables, name) if name != BASE.name and name not in FREE else None,
            }
        )
    return rows


def in_words(gain: Sequence[float] | None, is_bounded: bool) -> str:
    if gain is None:
        return "beyond" if is_bounded else ""
    mean, low, high = (100 * value for value in gain)
    return f"{mean:+.0f} ({low:+.0f} to {high:+.0f})"


def as_markdown(rows: Sequence[Mapping[str, Any]], num_prompts: int) -> str:
    lines = [
        "# With a bound and without",
        f"SmolLM2-135M-Instruct guided by the demo's reward model, {num_prompts} prompts and 12 wishes, on "
        f"{hardware()}, in {ENGINE['dtype']}, {date.today().isoformat()}, by "
        f"`python -m benchmarks.language_frontier --prompts {num_prompts}`. "
        "Measures are those of [language.md](language.md). `within d nats`: `pad_max_divergence` d. "
        "`gain`: points of satisfaction above guidance without a bound at the beta of equal likelihood, interpolated; "
        "intervals are 95%.",
        "| | satisfied | nats a token | loops | distinct-2 | gain |\n| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        mean, low, high = (100 * value for value in row["satisfied"])
        is_bounded = row["method"] != BASE.name and row["method"] not in FREE
        lines[-1] += (
            f"\n| {row['method']} | {mean:.0f}% ({low:.0f} to {high:.0f}) | {row['nll']:.2f} | "
            f"{100 * row['loops'][0]:.0f}% | {row['distinct_2']:.2f} | {in_words(row['gain'], is_bounded)} |"
        )
    return "\n\n".join(lines) + "\n"


def plot_frontier(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True)
    by_name = {row["method"]: row for row in rows}
    free_names = [name for name in by_name if name == BASE.name or name in FREE]
    curves = {"without a bound": free_names, "with": [name for name in by_name if name not in free_names]}
    for axis, label in zip(axes, ("nats a token under the unguided base", "answers that loop (%)"), strict=True):
        for name, own in curves.items():
            points = [
                (row["nll"] if axis is axes[0] else 100 * row["loops"][0], 100 * row["satisfied"][0])
                for row in (by_name[one] for one in own)
            ]
            if points:
                axis.plot(*zip(*points, strict=True), ".-", label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("wishes satisfied (%)")
    axes[0].legend()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close("all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[""],
        metavar="NAME",
        help="how their names begin, of those that are to answer now; default: all",
    )
    parser.add_argument("--work", type=Path, help="where answers are kept (default: in the cache of models)")
    parser.add_argument("--cache-dir", help="of the models (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)")
    args = parser.parse_args()
    models, untrained = build(args.cache_dir), build_untrained(args.cache_dir)
    work = args.work or models.reward.parent / f"language-frontier-{models.reward.name}"
    bench = Bench(models, untrained, work, Sizes({"one": args.prompts, "two": 0}))
    rows = frontier_rows(bench, ask(bench, args.methods))
    args.output.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware(), "date": date.today().isoformat(), "prompts": args.prompts, "rows": rows}
    (args.output / "language-frontier.json").write_text(json.dumps(record, indent=1) + "\n")
    text = as_markdown(rows, args.prompts)
    (args.output / "language-frontier.md").write_text(text)
    plot_frontier(rows, args.output / "language-frontier.png")
    print(text)


if __name__ == "__main__":
    main()
