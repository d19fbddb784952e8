"""Reward models beside each other, wish by wish, on held-out prompts of ours and on real questions.

    python -m benchmarks.language_adapters NAME=FOLDER@BETA ... [--prompts 10] [--wordings 1] [--two N]
        [--max-tokens 128] [--work FOLDER] [--output FOLDER]

Each guides SmolLM2 for users with one of the language table's twelve wishes (``benchmarks/language.py``: its measures,
wordings and settings), and on the first ``--two`` prompts for users with two of them together; beside them stands the
wish in the prompt. Where real questions are installed (:mod:`pad_vllm.demo.questions`), as many held-out ones are
asked. There are fewer prompts of ours, so users of these say each wish in ``--wordings`` ways. Answers are kept in the
work folder as they come, and are not made again. Writes language-adapters.md and .json.
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
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, loops
from pad_vllm.demo.smollm import build, build_untrained
from pad_vllm.evaluation.harness import Asked, Method
from pad_vllm.evaluation.methods import BASE, Guided
from pad_vllm.evaluation.metrics import bootstrap

from .language_bench import Bench, Cell, Sizes
from .language_methods import prompting
from .language_report import Unguided, moves_of, say_estimate, say_percent
from .record import hardware

OURS, REAL = "ours", "real"
TWO = ", two wishes"
HEADINGS = {
    OURS: "Prompts of ours",
    REAL: "Real questions",
    OURS + TWO: "Prompts of ours, two wishes",
    REAL + TWO: "Real questions, two wishes",
}
"""By group of cells."""
FLOORED = ("lists", "person", "emphasis")
"""Measures of which most answers have none: a wish for less is met by them already, and can be a tie at best."""
_Records = Sequence[Mapping[str, Any]]


def cells_of_both(num_prompts: int, num_of_two: int = 0, num_wordings: int = 1, seed: int = 0) -> list[Cell]:
    """A cell for each prompt and wish, in words that training did not use; then for each of the first ``num_of_two``
    prompts and two wishes that no user of training had together; then for the other wordings of a wish on a prompt of
    ours."""
    rng = random.Random(seed)
    groups = {OURS: wishes.prompts(held_out=True)}
    if questions.available():
        groups[REAL] = questions.questions(max(num_prompts, num_of_two), held_out=True)
    wanted: list[tuple[str, int, Sequence[tuple[str, ...]]]] = [
        ("", num_prompts, [(value,) for value in DIRECTIONS]),
        (TWO, num_of_two, wishes.combinations(held_out=True)),
    ]
    cells = [
        Cell(group + how_many, prompt, values, wishes.preference(values, rng, held_out=True))
        for how_many, num, wants in wanted
        for group, prompts in groups.items()
        for prompt in prompts[:num]
        for values in wants
    ]
    return cells + [
        cell._replace(preference=words)
        for cell in cells
        if cell.group == OURS
        for words in _other_wordings(cell, num_wordings - 1, seed)
    ]


def _other_wordings(cell: Cell, num: int, seed: int) -> list[str]:
    others = [words for words in wishes.wordings(cell.values[0], held_out=True) if words != cell.preference]
    return random.Random(f"{seed} {cell.prompt} {cell.preference}").sample(others, num)


def answer_everything(bench: Bench, methods: Iterable[Method]) -> dict[str, _Records]:
    first = {cell.prompt: i for i, cell in reversed(list(enumerate(bench.cells)))}
    bench.answer([Asked(BASE, [i for i in sorted(first.values()) for _ in range(bench.sizes.base_answers)])])
    everyone = range(len(bench.cells))
    for method in methods:
        bench.answer([Asked(method, everyone)])
    return {method.name: bench.kept(method) for method in (BASE, *methods)}


def rows_by_group(bench: Bench, found: Mapping[str, _Records]) -> list[dict[str, Any]]:
    """A row for each group and method: ``satisfied`` as in the language table, by wish too, and of wishes that unguided
    answers leave room for (``satisfied_with_room``, where there are any); of the unguided answers what room that is."""
    unguided = Unguided(bench, found[BASE.name])
    met = without_room(bench, found[BASE.name], unguided)
    rows = []
    for group in dict.fromkeys(cell.group for cell in bench.cells):
        asked = {cell.prompt for cell in bench.cells if cell.group == group}
        for name, records in found.items():
            own = [(bench.cells[r["cell"]], r) for r in records]
            # An unguided answer belongs to its prompt, whoever asks.
            own = [one for one in own if (one[0].prompt in asked if name == BASE.name else one[0].group == group)]
            prompts = [cell.prompt for cell, _ in own]
            row = {"group": group, "method": name, "num_prompts": len(asked), "num_answers": len(own)} | {
                "loops": bootstrap([float(loops(r["text"])) for _, r in own], prompts),
                "nll": bootstrap([r["nll"] for _, r in own], prompts),
            }
            if name == BASE.name:
                cut = [r["num_tokens"] == bench.sizes.max_tokens for _, r in own]
                row |= {"cut": statistics.mean(cut), "at_the_floor": _floors(asked, met)}
            else:
                row |= moves_of(bench, [r for _, r in own], unguided)
                if with_room := [r for cell, r in own if met.isdisjoint((cell.prompt, v) for v in cell.values)]:
                    row["satisfied_with_room"] = moves_of(bench, with_room, unguided)["satisfied"]
            rows.append(row)
    return rows


def without_room(bench: Bench, base: _Records, unguided: Unguided) -> set[tuple[str, str]]:
    """Prompts and wishes for which the median unguided answer leaves no room: it has nothing of what is wanted less of,
    or, where more words are wanted, every token that an answer may have."""
    num_tokens = defaultdict(list)
    for record in base:
        num_tokens[bench.cells[record["cell"]].prompt].append(record["num_tokens"])
    full = [prompt for prompt, own in num_tokens.items() if statistics.median(own) == bench.sizes.max_tokens]
    floors = [(p, name) for p, median in unguided.median.items() for name in FLOORED if median[name] == 0]
    return {(p, DIMENSIONS["length"].more) for p in full} | {(p, DIMENSIONS[name].less) for p, name in floors}


def _floors(prompts: set[str], met: set[tuple[str, str]]) -> dict[str, float]:
    """Wish -> share of prompts whose unguided answers have nothing already of what it wants less of."""
    less = [DIMENSIONS[name].less for name in FLOORED]
    return {value: statistics.mean((prompt, value) in met for prompt in prompts) for value in less}


def summary_table(rows: Sequence[Mapping[str, Any]], group: str) -> str:
    lines = ["| | satisfied | where there is room | loops | NLL / token |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in (row for row in rows if row["group"] == group):
        said = [say_percent(row[name]) if name in row else "" for name in ("satisfied", "satisfied_with_room")]
        lines.append(f"| {row['method']} | {' | '.join(said)} | {100 * row['loops'][0]:.0f}% | {row['nll'][0]:.2f} |")
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
    by_values = ((values, moved, other["by_values"][values]) for values, moved in row["by_values"].items())
    return [values for values, moved, less in by_values if all(moved[name][1] > less[name][2] for name in moved)]


def by_wish_table(rows: Sequence[Mapping[str, Any]], group: str) -> str:
    """Bold: further than the first method, which is prompting, intervals apart."""
    own = [row for row in rows if row["group"] == group and "by_values" in row]
    further = [beyond(row, own[0]) for row in own]
    lines = [f"| | {' | '.join(row['method'] for row in own)} |", "| --- |" + " --- |" * len(own)]
    for values in own[0]["by_values"]:
        said = []
        for row, ahead in zip(own, further, strict=True):
            bold = "**" * (values in ahead)
            moved = ", ".join(map(say_estimate, row["by_values"][values].values()))
            said.append(f"{100 * row['satisfied_by_values'][values][0]:.0f}%; {bold}{moved}{bold}")
        lines.append(f"| {values} | {' | '.join(said)} |")
    counts = [
        f"- {row['method']} moves answers further than prompting for {len(ahead)} of {len(row['by_values'])}, "
        "intervals apart."
        for row, ahead in zip(own[1:], further[1:], strict=True)
    ]
    if group.endswith(TWO):
        counts += [_both_move(row) for row in own]
    return "\n".join([*lines, "", *counts])


def _both_move(row: Mapping[str, Any]) -> str:
    found = [moved.values() for moved in row["by_values"].values()]
    means, lows = (sum(all(m[i] > 0 for m in moved) for moved in found) for i in (0, 1))
    return (
        f"- {row['method']} moves both measures in the direction asked for {means} of {len(found)}, "
        f"intervals above zero for {lows}."
    )


def write_side_by_side(output: Path, rows: Sequence[Mapping[str, Any]], max_tokens: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    record = {"hardware": hardware(), "date": date.today().isoformat(), "max_tokens": max_tokens, "rows": rows}
    (output / "language-adapters.json").write_text(json.dumps(record, indent=1) + "\n")
    units = "; ".join(f"{d.less}, {d.more}: {d.unit}" for d in DIMENSIONS.values())
    text = [
        "# Reward models beside each other",
        f"SmolLM2-135M-Instruct guided by each, for one wish or for two together; on {record['hardware']}, "
        f"{record['date']}, by `python -m benchmarks.language_adapters`. Answers have at most {max_tokens} tokens. "
        "Prompts, questions, wordings and which two wishes go together are held out from training. `satisfied`: beyond "
        "the median of the unguided answers to the prompt; a tie is half. `where there is room`: without wishes for "
        "less of what the median unguided answer to the prompt has nothing of, and for more words where it has every "
        "token.",
        f"By wish: satisfied; by how much its measure moved in the direction asked ({units}), bold where that is "
        "further than prompting moved it, intervals apart. Intervals are 95%, over prompts.",
    ]
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        text.append(f"## {HEADINGS[group]}")
        said = f"{own[0]['num_prompts']} of them, and {own[0]['num_answers']} unguided answers"
        text.append(f"{said}; {own[-1]['num_answers']} answers by each other method.")
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
    parser.add_argument("--wordings", type=int, default=1, metavar="N", help="of each wish on a prompt of ours")
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
    bench.cells = cells_of_both(args.prompts, args.two, args.wordings)
    guided = [guided_by(one, models.reward) for one in args.reward_models]
    rows = rows_by_group(bench, answer_everything(bench, [prompting(bench), *guided]))
    write_side_by_side(args.output, rows, args.max_tokens)


if __name__ == "__main__":
    main()
