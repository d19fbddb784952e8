"""Reward models beside each other, wish by wish, on held-out prompts of ours and on real questions.

    python -m benchmarks.language_adapters NAME=FOLDER@BETA ... [--prompts 10] [--two N] [--max-tokens 128]
        [--work FOLDER] [--output FOLDER]

Each guides SmolLM2 for users with one of the language table's twelve wishes (``benchmarks/language.py``: its measures,
wordings and settings), and on the first ``--two`` prompts for users with two of them together; beside them stands the
wish in the prompt. Where real questions are installed (:mod:`pad_vllm.demo.questions`), as many held-out ones are
asked. Answers are kept in the work folder as they come, and are not made again. Writes language-adapters.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
from collections import defaultdict
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
PROMPTS_OF = {OURS: "Prompts of ours", REAL: "Real questions"}
TWO = ", two wishes"
FLOORED = ("lists", "person", "emphasis")
"""Measures of which most answers have none: a wish for less is met by them already, and can be a tie at best."""
_Records = Sequence[Mapping[str, Any]]
_Ones = list[tuple[float, str]]
"""A number of each answer, with its prompt."""


def cells_of_both(num_prompts: int, num_of_two: int = 0, seed: int = 0) -> list[Cell]:
    """A cell for each prompt and wish, in words that training did not use; then for each of the first ``num_of_two``
    prompts and two wishes that no user of training had together."""
    rng = random.Random(seed)
    groups = {OURS: wishes.prompts(held_out=True)}
    if questions.available():
        groups[REAL] = questions.questions(max(num_prompts, num_of_two), held_out=True)
    wanted: list[tuple[str, int, Sequence[tuple[str, ...]]]] = []
    wanted += [(group, num_prompts, [(value,) for value in DIRECTIONS]) for group in groups]
    wanted += [(group + TWO, num_of_two, wishes.combinations(held_out=True)) for group in groups]
    return [
        Cell(group, prompt, values, wishes.preference(values, rng, held_out=True))
        for group, num, wants in wanted
        for prompt in groups[group.removesuffix(TWO)][:num]
        for values in wants
    ]


def answer_everything(bench: Bench, methods: Iterable[Method]) -> dict[str, _Records]:
    first = {cell.prompt: i for i, cell in reversed(list(enumerate(bench.cells)))}
    bench.answer([Asked(BASE, [i for i in sorted(first.values()) for _ in range(bench.sizes.base_answers)])])
    everyone = range(len(bench.cells))
    for method in methods:
        bench.answer([Asked(method, everyone)])
    return {method.name: bench.kept(method) for method in (BASE, *methods)}


def rows_by_group(bench: Bench, found: Mapping[str, _Records]) -> list[dict[str, Any]]:
    """A row for each group and method: ``satisfied`` as in the language table, by wish too; of the
    unguided answers what room they leave."""
    unguided = Unguided(bench, found[BASE.name])
    rows = []
    for group in dict.fromkeys(cell.group for cell in bench.cells):
        asked = {cell.prompt for cell in bench.cells if cell.group == group}
        for name, records in found.items():
            own = [(bench.cells[r["cell"]], r) for r in records]
            # An unguided answer belongs to its prompt, whoever asks.
            own = [one for one in own if (one[0].prompt in asked if name == BASE.name else one[0].group == group)]
            prompts = [cell.prompt for cell, _ in own]
            row = {"group": group, "method": name, "num_answers": len(own)} | {
                "loops": bootstrap([float(loops(r["text"])) for _, r in own], prompts),
                "nll": bootstrap([r["nll"] for _, r in own], prompts),
            }
            if name == BASE.name:
                cut = [r["num_tokens"] == bench.sizes.max_tokens for _, r in own]
                row |= {"cut": statistics.mean(cut), "at_the_floor": _floors(asked, unguided)}
            rows.append(row if name == BASE.name else row | _wishes(own, unguided))
    return rows


def _floors(prompts: set[str], unguided: Unguided) -> dict[str, float]:
    """Wish -> share of prompts whose unguided answers have nothing already of what it wants less of."""
    return {
        DIMENSIONS[name].less: statistics.mean(unguided.median[prompt][name] == 0 for prompt in prompts)
        for name in FLOORED
    }


def _wishes(own: Sequence[tuple[Cell, Mapping[str, Any]]], unguided: Unguided) -> dict[str, Any]:
    satisfied: dict[str, _Ones] = defaultdict(list)
    moved: dict[str, dict[str, _Ones]] = defaultdict(lambda: defaultdict(list))
    for cell, record in own:
        measures, wish = measures_of(record["text"]), " and ".join(cell.values)
        for name, sign in (DIRECTIONS[value] for value in cell.values):
            beyond = sign * (measures[name] - unguided.median[cell.prompt][name])
            satisfied[wish].append((0.5 * ((beyond > 0) + (beyond >= 0)), cell.prompt))
            moved[wish][name].append((sign * (measures[name] - unguided.mean[cell.prompt][name]), cell.prompt))
    everything = [one for ones in satisfied.values() for one in ones]
    return {
        "satisfied": _estimate(everything),
        "by_wish": {
            wish: {"satisfied": _estimate(ones), "moved": {name: _estimate(m) for name, m in moved[wish].items()}}
            for wish, ones in satisfied.items()
        },
    }


def _estimate(ones: _Ones) -> Estimate:
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
    """The wishes for which one method moves answers further than another, intervals apart: two wishes, in both."""
    by_wish = ((wish, row["by_wish"][wish]["moved"], other["by_wish"][wish]["moved"]) for wish in row["by_wish"])
    return [wish for wish, moved, less in by_wish if all(moved[name][1] > less[name][2] for name in moved)]


def by_wish_table(rows: Sequence[Mapping[str, Any]], group: str) -> str:
    """Bold: further than the first method, which is prompting, intervals apart."""
    own = [row for row in rows if row["group"] == group and "by_wish" in row]
    prompted, *guided = own
    lines = [f"| | {' | '.join(row['method'] for row in own)} |", "| --- |" + " --- |" * len(own)]
    for wish in prompted["by_wish"]:
        said = []
        for row in own:
            one, bold = row["by_wish"][wish], "**" * (wish in beyond(row, prompted))
            moved = ", ".join(_say(*estimate) for estimate in one["moved"].values())
            said.append(f"{100 * one['satisfied'][0]:.0f}%; {bold}{moved}{bold}")
        lines.append(f"| {wish} | {' | '.join(said)} |")
    counts = [f"{row['method']} {len(beyond(row, prompted))}" for row in guided]
    text = f"Further than prompting, intervals apart: of {len(prompted['by_wish'])} {', '.join(counts)}."
    if group.endswith(TWO):
        both = [f"{row['method']} {_both_move(row)}" for row in own]
        text += f" Both measures move in the direction asked, intervals above zero: {', '.join(both)}."
    return "\n".join(lines) + f"\n\n{text}"


def _say(mean: float, low: float, high: float) -> str:
    mean, low, high = (float(f"{value:.2g}") for value in (mean, low, high))  # two digits, and no exponent
    return f"{mean:+g} ({low:g} to {high:g})"


def _both_move(row: Mapping[str, Any]) -> str:
    found = [one["moved"].values() for one in row["by_wish"].values()]
    apart, means = (sum(all(m[i] > 0 for m in moved) for moved in found) for i in (1, 0))
    return f"{apart} (their means {means})"


def write_side_by_side(output: Path, rows: Sequence[Mapping[str, Any]], max_tokens: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware(), "date": date.today().isoformat(), "max_tokens": max_tokens, "rows": rows}
    (output / "language-adapters.json").write_text(json.dumps(record, indent=1) + "\n")
    units = "; ".join(f"{d.less}, {d.more}: {d.unit}" for d in DIMENSIONS.values())
    text = [
        "# Reward models beside each other",
        f"SmolLM2-135M-Instruct guided by each, for one wish; on {record['hardware']}, "
        f"{record['date']}, by `python -m benchmarks.language_adapters`. Answers have at most {max_tokens} tokens. "
        "Prompts, questions, wordings and which two wishes go together are held out from training. `satisfied`: beyond "
        "the median of the unguided answers to the prompt; a tie is half.",
        f"By wish: satisfied; by how much its measure moved in the direction asked ({units}), bold where that is "
        "further than prompting moved it, intervals apart. Intervals are 95%, over prompts.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        text.append(f"## {PROMPTS_OF[group.removesuffix(TWO)]}{TWO if group.endswith(TWO) else ''}")
        if not group.endswith(TWO):
            text.append(what_there_can_be(own[0]))
        text.append(summary_table(rows, group))
        if len(own) > 2:
            text.append(by_wish_table(rows, group))
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
    parser.add_argument("--two", type=int, default=0, metavar="N", help="prompts of users with two wishes, likewise")
    parser.add_argument("--max-tokens", type=int, default=Sizes.max_tokens, help="of an answer")
    parser.add_argument("--work", type=Path, help="where answers are kept (default: in the cache of models)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--cache-dir", help="of the models (default $PAD_VLLM_CACHE or ~/.cache/pad-vllm)")
    args = parser.parse_args()
    models = build(args.cache_dir)
    work = args.work or models.reward.parent / "language-adapters"
    sizes = Sizes({"one": 0, "two": 0}, max_tokens=args.max_tokens)
    bench = Bench(models, build_untrained(args.cache_dir), work, sizes)
    bench.cells = cells_of_both(args.prompts, args.two)
    guided = [guided_by(one, models.reward) for one in args.reward_models]
    rows = rows_by_group(bench, answer_everything(bench, [prompting(bench), *guided]))
    write_side_by_side(args.output, rows, args.max_tokens)


if __name__ == "__main__":
    main()
