"""Reward models beside each other, wish by wish, on held-out prompts of ours and on real questions.

    python -m benchmarks.language_adapters NAME=FOLDER@BETA ... [--prompts 10] [--work FOLDER] [--output FOLDER]

Each guides SmolLM2 for users with one of the language table's twelve wishes (``benchmarks/language.py``: its measures,
wordings and settings); beside them stands the wish in the prompt. Where real questions are installed
(:mod:`pad_vllm.demo.questions`), as many held-out ones are asked. Answers are kept in the work folder as they come, and
are not made again. Writes language-adapters.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", HF_HUB_OFFLINE="1")

from pad_vllm.demo import questions, wishes
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, loops, measures_of
from pad_vllm.demo.smollm import build, build_untrained
from pad_vllm.evaluation.harness import Asked, Method
from pad_vllm.evaluation.methods import BASE, Guided
from pad_vllm.evaluation.metrics import Estimate, bootstrap

from .language_bench import Bench, Cell, Sizes
from .language_methods import prompting
from .language_report import Unguided
from .record import hardware

OURS, REAL = "ours", "real"
FLOORED = ("lists", "person", "emphasis")
"""Measures of which most answers have none: a wish for less is met by them already, and can be a tie at best."""
_Records = Sequence[Mapping[str, Any]]


def cells_of_both(num_prompts: int, seed: int = 0) -> list[Cell]:
    """A cell for each prompt and wish, in words that training did not use."""
    rng = random.Random(seed)
    groups = {OURS: wishes.prompts(held_out=True)}
    if questions.available():
        groups[REAL] = questions.questions(num_prompts, held_out=True)
    return [
        Cell(group, prompt, (value,), wishes.preference([value], rng, held_out=True))
        for group, prompts in groups.items()
        for prompt in prompts[:num_prompts]
        for value in DIRECTIONS
    ]


def answer_everything(bench: Bench, methods: Iterable[Method]) -> dict[str, _Records]:
    first = {cell.prompt: i for i, cell in reversed(list(enumerate(bench.cells)))}
    bench.answer([Asked(BASE, [i for i in sorted(first.values()) for _ in range(bench.sizes.base_answers)])])
    everyone = range(len(bench.cells))
    for method in methods:
        bench.answer([Asked(method, everyone)])
    return {method.name: bench.kept(method) for method in (BASE, *methods)}


def rows_by_group(bench: Bench, found: Mapping[str, _Records]) -> list[dict[str, Any]]:
    """A row for each group and method: ``satisfied`` as in the language table, by value too; of the
    unguided answers what room they leave."""
    unguided = Unguided(bench, found[BASE.name])
    rows = []
    for group in dict.fromkeys(cell.group for cell in bench.cells):
        for name, records in found.items():
            own = [(bench.cells[r["cell"]], r) for r in records if bench.cells[r["cell"]].group == group]
            prompts = [cell.prompt for cell, _ in own]
            row = {"group": group, "method": name, "num_answers": len(own)} | {
                "loops": bootstrap([float(loops(r["text"])) for _, r in own], prompts),
                "nll": bootstrap([r["nll"] for _, r in own], prompts),
            }
            if name == BASE.name:
                cut = [r["num_tokens"] == bench.sizes.max_tokens for _, r in own]
                row |= {"cut": statistics.mean(cut), "at_the_floor": _floors(set(prompts), unguided)}
            rows.append(row if name == BASE.name else row | _wishes(own, unguided))
    return rows


def _floors(prompts: set[str], unguided: Unguided) -> dict[str, float]:
    """Wish -> share of prompts whose unguided answers have nothing already of what it wants less of."""
    return {
        DIMENSIONS[name].less: statistics.mean(unguided.median[prompt][name] == 0 for prompt in prompts)
        for name in FLOORED
    }


def _wishes(own: Sequence[tuple[Cell, Mapping[str, Any]]], unguided: Unguided) -> dict[str, Any]:
    satisfied: dict[str, list[tuple[float, str]]] = {value: [] for value in DIRECTIONS}
    moved: dict[str, list[tuple[float, str]]] = {value: [] for value in DIRECTIONS}
    for cell, record in own:
        (value,) = cell.values
        name, sign = DIRECTIONS[value]
        has, median = measures_of(record["text"])[name], unguided.median[cell.prompt][name]
        beyond = sign * (has - median)
        satisfied[value].append((0.5 * ((beyond > 0) + (beyond >= 0)), cell.prompt))
        moved[value].append((sign * (has - unguided.mean[cell.prompt][name]), cell.prompt))
    everything = [one for ones in satisfied.values() for one in ones]
    return {
        "satisfied": _estimate(everything),
        "by_value": {
            value: {"satisfied": _estimate(satisfied[value]), "moved": _estimate(moved[value])} for value in DIRECTIONS
        },
    }


def _estimate(ones: Sequence[tuple[float, str]]) -> Estimate:
    return bootstrap([value for value, _ in ones], [prompt for _, prompt in ones])


def summary_table(rows: Sequence[Mapping[str, Any]], group: str) -> str:
    lines = ["| | satisfied | loops | NLL / token |", "| --- | ---: | ---: | ---: |"]
    for row in (row for row in rows if row["group"] == group):
        said = ""
        if "satisfied" in row:
            mean, low, high = (100 * value for value in row["satisfied"])
            said = f"{mean:.0f}% ({low:.0f} to {high:.0f})"
        lines.append(f"| {row['method']} | {said} | {100 * row['loops'][0]:.0f}% | {row['nll'][0]:.2f} |")
    return "\n".join(lines)


def what_there_can_be(base: Mapping[str, Any]) -> str:
    """Of a group's unguided answers: which wishes they leave no room for."""
    floors = base["at_the_floor"]
    most = 1 - 0.5 * sum(floors.values()) / len(DIRECTIONS)
    said = ", ".join(f"{value} at {100 * share:.0f}%" for value, share in floors.items())
    return (
        f"Unguided answers meet some wishes already, and then a tie, which counts half, is the best there can be: "
        f"{said} of prompts. So at most {100 * most:.0f}% can be satisfied. {100 * base['cut']:.0f}% of unguided "
        "answers have every token that the table allows; there, more words can only be shorter ones."
    )


def beyond(row: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The wishes for which one method moves answers further than another, intervals apart."""
    moved, less = row["by_value"], other["by_value"]
    return [value for value in DIRECTIONS if moved[value]["moved"][1] > less[value]["moved"][2]]


def value_table(rows: Sequence[Mapping[str, Any]], group: str) -> str:
    """Bold: further than the first method, which is prompting, intervals apart."""
    own = [row for row in rows if row["group"] == group and "by_value" in row]
    further = [beyond(row, own[0]) for row in own]
    lines = [f"| | {' | '.join(row['method'] for row in own)} |", "| --- |" + " --- |" * len(own)]
    for value in DIRECTIONS:
        said = []
        for row, values in zip(own, further, strict=True):
            one = row["by_value"][value]
            mean, low, high = one["moved"]
            bold = "**" * (value in values)
            said.append(f"{100 * one['satisfied'][0]:.0f}%; {bold}{mean:+.2g} ({low:.2g} to {high:.2g}){bold}")
        lines.append(f"| {value} | {' | '.join(said)} |")
    counts = [f"{row['method']} {len(values)}" for row, values in zip(own[1:], further[1:], strict=True)]
    return "\n".join(lines) + f"\n\nFurther than prompting, intervals apart: of twelve wishes {', '.join(counts)}."


def write_side_by_side(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware(), "date": date.today().isoformat(), "rows": rows}
    (output / "language-adapters.json").write_text(json.dumps(record, indent=1) + "\n")
    units = "; ".join(f"{d.less}, {d.more}: {d.unit}" for d in DIMENSIONS.values())
    text = [
        "# Reward models beside each other",
        f"SmolLM2-135M-Instruct guided by each, for one wish; on {record['hardware']}, "
        f"{record['date']}, by `python -m benchmarks.language_adapters`. Prompts, questions and wordings are held out "
        "from training. `satisfied`: beyond the median of the unguided answers to the prompt; a tie is half.",
        f"By wish: satisfied; by how much its measure moved in the direction asked ({units}), bold where that is "
        "further than prompting moved it, intervals apart. Intervals are 95%, over prompts.",
    ]
    for group, title in ((OURS, "Prompts of ours"), (REAL, "Real questions")):
        own = [row for row in rows if row["group"] == group]
        if own:
            text += [f"## {title}", what_there_can_be(own[0]), summary_table(rows, group)]
        if len(own) > 2:
            text.append(value_table(rows, group))
    (output / "language-adapters.md").write_text("\n\n".join(text) + "\n")


def guided_by(said: str, demo: Path) -> Guided:
    """``NAME=FOLDER@BETA``; the demo's reward model where no folder is named. The method's name says which reference
    the folder sets: against another one the same weights guide otherwise."""
    found = re.fullmatch(r"([^=]+)=(.*)@([0-9.]+)", said)
    if found is None:
        raise SystemExit(f"{said!r}: expected NAME=FOLDER@BETA, or NAME=@BETA for the demo's reward model")
    name, folder, beta = found.groups()
    reference = json.loads((Path(folder or demo) / "pad.json").read_text())["reference"]
    against = {"base": "the base", "neutral": "itself"}[reference]
    return Guided(f"{name}, against {against}, beta {float(beta):g}", float(beta), reward_model=folder or str(demo))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reward_models", nargs="*", metavar="NAME=FOLDER@BETA", help="without a folder: the demo's")
    parser.add_argument("--prompts", type=int, default=10, help="of ours, and as many real questions")
    parser.add_argument("--work", type=Path, help="where answers are kept (default: in the cache of models)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache-dir", help="of the models (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)")
    args = parser.parse_args()
    models = build(args.cache_dir)
    work = args.work or models.reward.parent / "language-adapters"
    bench = Bench(models, build_untrained(args.cache_dir), work, Sizes({"one": 0, "two": 0}))
    bench.cells = cells_of_both(args.prompts)
    guided = [guided_by(one, models.reward) for one in args.reward_models]
    write_side_by_side(args.output, rows_by_group(bench, answer_everything(bench, [prompting(bench), *guided])))


if __name__ == "__main__":
    main()
