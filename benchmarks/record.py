"""The record of a benchmark: sections measured on one machine under one set of settings, kept as each of them ends.

``NAME.json`` is the record; ``NAME.md`` and, with matplotlib, ``NAME.png`` are drawn from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any


class Record:
    """What ``folder`` holds of measurements on this machine with these settings; of others, nothing.
    That of throughput; other benchmarks have their own name, report and plot.

    Args:
        folder: of the record; None keeps it in memory.
        settings: whatever a result depends on, as JSON has it.
        sections: name -> what it shows, in the order of the report.
    """

    name = "throughput"

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], sections: Mapping[str, str]) -> None:
        self.folder, self.sections = folder, sections
        self.of = {"hardware": hardware(), "settings": json.loads(json.dumps(settings))}
        self.results: dict[str, dict[str, Any]] = {}
        if folder is not None and (folder / f"{self.name}.json").exists():
            kept = json.loads((folder / f"{self.name}.json").read_text())
            if all(kept.get(key) == value for key, value in self.of.items()):
                self.results = kept["results"]

    def add(self, section: str, rows: list[Any], is_whole: bool = True) -> None:
        """Keep a section's rows, in place of those that it had. Not ``is_whole``: there will be more."""
        self.results[section] = {"date": date.today().isoformat(), "rows": rows} | (
            {} if is_whole else {"unfinished": True}
        )
        self.results = {name: self.results[name] for name in self.sections if name in self.results}
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{self.name}.json.part"
        part.write_text(json.dumps(self.of | {"results": self.results}, indent=1) + "\n")
        part.rename(self.folder / f"{self.name}.json")  # whole, or as it was
        (self.folder / f"{self.name}.md").write_text("\n".join(self.report()) + "\n")
        with contextlib.suppress(ImportError):
            self.plot(self.folder / f"{self.name}.png")

    def plot(self, path: Path) -> None:
        plot_throughput(path, self.results)

    def report(self) -> Iterator[str]:
        settings = self.of["settings"]
        models = f"{settings['base']} and {settings['reward']}" if settings["base"] else "random models made for it"
        dates = sorted({section["date"] for section in self.results.values()})
        yield "# Throughput\n\nWhat guidance costs: vLLM with and without it, and the other ways to get it.\n"
        yield (
            f"On {self.of['hardware']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {settings['dtype']}"
            f"{', eager' if settings['enforce_eager'] else ''}, {models}. The entries of a section ran one after the "
            "other, and back; a ratio is the median of its repeats' own; in brackets between which the middle half "
            "of them lies, and how many there are."
        )
        for name, section in self.results.items():
            yield f"\n## {name}\n\n{self.sections[name]}\n"
            yield from REPORTS.get(name, comparison)(section["rows"])


def breakdown_table(rows: list[Any]) -> Iterator[str]:
    yield "| ms per step | " + " | ".join(row["label"] for row in rows) + " |"
    yield "| --- |" + " ---: |" * len(rows)
    for part in rows[0]["milliseconds"]:
        times = [row["milliseconds"].get(part) for row in rows]
        yield f"| {part} | " + " | ".join("" if ms is None else f"{ms:.3f}" for ms in times) + " |"


def drafts(rows: list[Any]) -> Iterator[str]:
    yield "| drafter | n | beta | temperature | tokens a pass | reward passes a pass | accepted | 8B + 1B |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |"
    for row in rows:
        kind = f"{row['n']} | {'' if row['beta'] is None else row['beta']} | {row['temperature']}"
        positions = " ".join(f"{part:.2f}" for part in row["accepted"])
        yield (
            f"| {row['label']} | {kind} | {row['tokens_per_pass']} | {row['reward_passes_per_pass']} | {positions} "
            f"| {row['speed_8b_1b']} |"
        )
    yield "\nThe last column is the cost model's: time a token of an unguided 8B base over that with drafts."


def comparison(rows: list[Any]) -> Iterator[str]:
    table = [row for row in rows if "tokens_per_s" in row]
    if table:
        yield "| | batch | prompt | output | k | tokens / s | ratio | |"
        yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
    for row in table:
        cell = row["cell"]
        spread = "({} to {}, {})".format(*row["middle_half"], row["repeats"]) if "repeats" in row else ""
        shape = f"{cell['batch']} | {cell['prompt_len']} | {cell['output_len']} | {cell['top_k']}"
        yield f"| {row['label']} | {shape} | {row['tokens_per_s']} | {row['ratio']} | {spread} |"
    for row in rows:
        if "tokens_per_s" not in row:
            figures = ", ".join(f"{key} {value}" for key, value in row.items() if key != "label")
            yield f"\n{figures} ({row['label']})"


REPORTS = {"breakdown": breakdown_table, "breakdown-v2": breakdown_table, "drafts": drafts, "drafters": drafts}


def hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    cpu = {name.strip(): value.strip() for name, _, value in lines}
    numbers = ", ".join(f"{name.split()[-1]} {cpu[name]}" for name in ("cpu family", "model") if name in cpu)
    # Virtual machines call processors that differ by two times the same.
    name = f"{cpu.get('model name') or platform.machine()}{f' ({numbers})' if numbers else ''}"
    num_cores = len(os.sched_getaffinity(0))
    return f"{num_cores} core{'s' * (num_cores > 1)} of {name}"


def plot_throughput(path: Path, results: Mapping[str, Any]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    if "batch" not in results:
        return
    figure, axis = pyplot.subplots(figsize=(5, 3.5))
    labels = dict.fromkeys(row["label"] for row in results["batch"]["rows"] if row["label"] != "reward model alone")
    for label in labels:
        rows = [row for row in results["batch"]["rows"] if row["label"] == label]
        axis.plot([row["cell"]["batch"] for row in rows], [row["ratio"] for row in rows], "o-", label=label)
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 1.1)
    axis.set_xlabel("batch size")
    axis.set_ylabel("throughput / unguided vLLM")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close("all")
