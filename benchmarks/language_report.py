"""The language table's figures: how far each measure moved, at what price, as Markdown, JSON and a plot."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from datetime import date
from pathlib import Path
from typing import Any

from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, loops, measures_of
from pad_vllm.demo.recipe import ENGINE
from pad_vllm.evaluation.harness import Method
from pad_vllm.evaluation.methods import BASE, Guided, Prompting
from pad_vllm.evaluation.metrics import Estimate, bootstrap, distinct, win_shares

from .language_bench import Bench, Cell
from .language_grammar import Harper
from .language_methods import all_of
from .language_plot import MODELS, plot_language, rows_for_all
from .language_task import refuses, share_taken_up
from .record import hardware

NUM_SCORED = 96
"""Answers of a method whose likelihood under the unguided base takes a pass of its own: the base model that made them
had read something else than the prompt."""


Moves = list[tuple[float, str]]
"""By how much answers moved, each with its prompt."""


class Unguided:
    """The measures of unguided answers to each prompt."""

    def __init__(self, bench: Bench, records: Sequence[Mapping[str, Any]]) -> None:
        by_prompt = defaultdict(list)
        for record in records:
            by_prompt[bench.cells[record["cell"]].prompt].append(measures_of(record["text"]))
        self.mean, self.median = (
            {p: {d: f(m[d] for m in own) for d in DIMENSIONS} for p, own in by_prompt.items()}
            for f in (statistics.mean, statistics.median)
        )

    def satisfied(self, prompt: str, value: str, measures: Mapping[str, float]) -> float:
        """1 beyond the median of the prompt's unguided answers in the direction of the value, a half on it."""
        name, sign = DIRECTIONS[value]
        return win_shares([sign * measures[name]], [sign * self.median[prompt][name]])[0]


def figures(
    bench: Bench,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    is_loaded: bool = False,
    grammar: Harper | None = None,
) -> list[dict[str, Any]]:
    """A row for each method and group: ``moved`` has each measure's mean change in the direction asked, in its unit,
    over both directions; every estimate is a mean and its 95% interval, by a bootstrap over prompts.

    Args:
        is_loaded: whether the machine had other work, and times (``seconds_over_base``) are None.
        grammar: checks answers, where there is a checker.
    """
    base = found[BASE.name]
    unguided, base_seconds = Unguided(bench, base), _mean(base, "seconds")
    rows = [_base_row(bench, base, grammar)]
    for method in (one.method for one in all_of(bench) if one.method.name in found and one.method != BASE):
        records = found[method.name]
        nll = _likelihoods(bench, method, records)
        for group in dict.fromkeys(bench.cells[record["cell"]].group for record in records):
            own = [r for r in records if bench.cells[r["cell"]].group == group]
            rows.append(
                {"method": method.name, "group": group, "is_by_vllm": method.is_by_vllm}
                | {"seconds_over_base": None if is_loaded else _mean(own, "seconds") / base_seconds}
                | moves_of(bench, own, unguided)
                | _fluency([(r["text"], bench.cells[r["cell"]].prompt) for r in own], grammar)
                | {"nll": statistics.mean(nll[r["cell"]] for r in own if r["cell"] in nll)}
            )
    return rows


def _base_row(bench: Bench, records: Sequence[Mapping[str, Any]], grammar: Harper | None) -> dict[str, Any]:
    return (
        {"method": BASE.name, "group": "all", "seconds_over_base": 1.0, "num_answers": len(records)}
        | _fluency([(r["text"], bench.cells[r["cell"]].prompt) for r in records], grammar)
        | {"nll": _mean(records, "nll")}
    )


def moves_of(bench: Bench, records: Sequence[Mapping[str, Any]], unguided: Unguided) -> dict[str, Any]:
    """How often a method's answers satisfied, and how far each measure moved, each also by the cell's wish or wishes
    (``satisfied_by_values``, ``by_values``)."""
    moved: dict[str, Moves] = defaultdict(list)
    together: dict[str, dict[str, Moves]] = defaultdict(lambda: defaultdict(list))
    satisfied: dict[str, Moves] = defaultdict(list)
    for record in records:
        cell = bench.cells[record["cell"]]
        values, measures = " and ".join(cell.values), measures_of(record["text"])
        for value in cell.values:
            name, sign = DIRECTIONS[value]
            moved[name].append((sign * (measures[name] - unguided.mean[cell.prompt][name]), cell.prompt))
            together[values][name].append(moved[name][-1])
            satisfied[values].append((unguided.satisfied(cell.prompt, value, measures), cell.prompt))
    return {
        "num_answers": len(records),
        "satisfied": _estimate([one for own in satisfied.values() for one in own]),
        "satisfied_by_values": {values: _estimate(own) for values, own in satisfied.items()},
        "moved": {name: _estimate(moved[name]) for name in DIMENSIONS if name in moved},
        "by_values": {
            values: {name: _estimate(found) for name, found in own.items()} for values, own in together.items()
        },
    }


def _estimate(values: Moves) -> Estimate:
    return bootstrap([value for value, _ in values], [prompt for _, prompt in values])


def _fluency(answers: Sequence[tuple[str, str]], grammar: Harper | None) -> dict[str, Any]:
    texts, prompts = zip(*answers, strict=True)
    faults = {} if grammar is None else {"faults": bootstrap(grammar.faults_per_hundred_words(texts), prompts)}
    return faults | {
        "loops": bootstrap([float(loops(text)) for text in texts], prompts),
        "distinct_2": distinct(texts, 2),
        "taken_up": bootstrap([share_taken_up(prompt, text) for text, prompt in answers], prompts),
        "refuses": bootstrap([float(refuses(text)) for text in texts], prompts),
    }


def _likelihoods(bench: Bench, method: Method, records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Cell -> negative log-likelihood per token of its answer after the plain prompt, by the unguided base."""
    if method.reads_the_prompt:
        return {record["cell"]: record["nll"] for record in records}
    file = bench.work / f"nll of {method.name}, {len(records)} answers.json"
    if not file.exists():
        from transformers import AutoModelForCausalLM

        from pad_vllm.training.data import Example
        from pad_vllm.training.trainer import score_answers

        model = AutoModelForCausalLM.from_pretrained(bench.models.base).eval()
        some = random.Random(0).sample(list(records), min(NUM_SCORED, len(records)))
        examples = [
            Example(bench.models.plain(bench.cells[r["cell"]].prompt), bench.answer_ids(r["text"])) for r in some
        ]
        sums = score_answers(model, examples).tolist()
        per_token = [-total / max(len(e.answer), 1) for total, e in zip(sums, examples, strict=True)]
        file.write_text(json.dumps([[r["of"], n] for r, n in zip(some, per_token, strict=True)]))
    nll = {tuple(of): value for of, value in json.loads(file.read_text())}
    return {i: nll[place] for i, place in enumerate(bench.places(method)) if place in nll}


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.mean(record[name] for record in records)


def verdicts(rows: Sequence[Mapping[str, Any]], methods: Sequence[Method]) -> list[str]:
    """Of users with one wish: which measures PAD moves further than prompting does."""
    own = {row["method"]: row for row in rows if row["group"] == "one"}
    base = next(row for row in rows if row["method"] == BASE.name)
    prompted = next((own[m.name]["moved"] for m in methods if isinstance(m, Prompting) and m.name in own), None)
    if prompted is None:
        return []
    lines = []
    for method in methods:
        if not isinstance(method, Guided) or method.name not in own:
            continue
        row = own[method.name]
        further = [name for name, (_, low, _) in row["moved"].items() if low > prompted[name][2]]
        less = [name for name, (_, _, high) in row["moved"].items() if high < prompted[name][1]]
        said = (
            f"{method.name} moves {len(further)} of {len(row['moved'])} measures further than prompting, intervals "
            f"apart ({', '.join(further) or 'none'}), and {len(less)} less ({', '.join(less) or 'none'})"
        )
        if "date" not in row:  # of another day, these unguided answers say nothing
            said += f"; {100 * (row['loops'][0] - base['loops'][0]):+.0f} points of looping answers against base"
        lines.append(f"{said}.")
    return lines


def group_table(rows: Sequence[Mapping[str, Any]], group: str) -> str:
    own = [row for row in rows if row["group"] == group]
    names = list(DIMENSIONS)
    columns = [
        "satisfied",
        *names,
        "loops",
        "NLL / token",
        "distinct-2",
        "taken up",
        "refuses",
        "faults",
        "time / base",
    ]
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    for row in own:
        moved = [say_estimate(row["moved"][name]) if name in row["moved"] else "" for name in names]
        seconds = row["seconds_over_base"]
        time = "" if seconds is None else f"{seconds:.1f}{'' if row['is_by_vllm'] else ' (transformers)'}"
        faults = say_estimate(row["faults"]) if "faults" in row else ""
        lines.append(
            f"| {row['method']} | {say_percent(row['satisfied'])} | {' | '.join(moved)} | "
            f"{say_percent(row['loops'])} | {row['nll']:.2f} | {row['distinct_2']:.2f} | "
            f"{say_percent(row['taken_up'])} | {say_percent(row['refuses'])} | {faults} | {time} |"
        )
    return "\n".join(lines)


def say_percent(estimate: Sequence[float]) -> str:
    """A share and its interval."""
    mean, low, high = (100 * value for value in estimate)
    return f"{mean:.0f}% ({low:.0f} to {high:.0f})"


def wish_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of users with one wish: how many answers satisfied each, by method."""
    lines = [f"| | {' | '.join(DIRECTIONS)} |", "| --- |" + " ---: |" * len(DIRECTIONS)]
    for row in (row for row in rows if row["group"] == "one"):
        found = row["satisfied_by_values"]
        said = [f"{100 * found[value][0]:.0f}%" if value in found else "" for value in DIRECTIONS]
        lines.append(f"| {row['method']} | {' | '.join(said)} |")
    return "\n".join(lines)


def combination_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of each two values that were asked for together, how far their measures moved, by method."""
    own = [row for row in rows if row["group"] == "two"]
    lines = [f"| | {' | '.join(row['method'] for row in own)} |", "| --- |" + " --- |" * len(own)]
    for values in own[0]["by_values"]:
        found = (row["by_values"].get(values, {}) for row in own)
        said = ["; ".join(f"{name} {say_estimate(moved)}" for name, moved in moves.items()) for moves in found]
        lines.append(f"| {values} | {' | '.join(said)} |")
    return "\n".join(lines)


def say_estimate(estimate: Sequence[float]) -> str:
    """A mean and its interval, in as many digits as the mean has to show."""
    mean, low, high = estimate
    digits = 0 if abs(mean) >= 10 else 1 if abs(mean) >= 1 else 2
    return f"{mean:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


MADE_BY = {
    "language": "`make alignment`",
    "language-gemma": "`python -m benchmarks.language --gemma`",
    "language-rivals": "`python -m benchmarks.language --rivals`",
}
"""What wrote a table, by its name."""
CONTEXT_STEERING = (
    "[context steering](https://arxiv.org/abs/2405.01768) of lambda = beta - 1 over the base's 40 likeliest tokens: "
    "the base's logits with the preference, and lambda times what the preference changed"
)
TITLES = {"one": "One wish", "two": "Two wishes"}


def write(
    output: Path,
    name: str,
    bench: Bench,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    is_loaded: bool = False,
    grammar: Harper | None = None,
    keep: bool = False,
) -> list[dict[str, Any]]:
    """Write the table, its record and its picture into ``output``; returns the rows.

    Args:
        keep: whether the record that is there keeps its rows of methods that are not in ``found``; where it is of
            another reward model, those that need none.

    Raises:
        ValueError: rows are to be kept, but they are of other prompts or wishes.
    """
    made_of = {"reward_model": bench.folders.reward.name, "cells": digest_of(bench.cells)}
    before = None
    if keep and (output / f"{name}.json").exists():
        before = json.loads((output / f"{name}.json").read_text())
        if before.get("cells") != made_of["cells"]:
            raise ValueError(f"{output / name}.json: its rows cannot be kept: it is of other cells")
    rows, everything = figures(bench, found, is_loaded, grammar), [one.method for one in all_of(bench)]
    if before is not None:
        same_reward_model = before.get("reward_model") == made_of["reward_model"]
        holding = {one.name for one in everything if same_reward_model or not one.needs_reward_model}
        rows = with_kept(rows, before, [one.name for one in everything], holding)
    record = {"hardware": hardware(), "date": date.today().isoformat(), **made_of, "rows": rows}
    methods = [method for method in everything if any(row["method"] == method.name for row in rows)]
    base = rows[0]
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    units = "; ".join(f"`{name}`: {d.unit}, for {d.more} or {d.less}" for name, d in DIMENSIONS.items())
    text = [
        "# Language",
        f"What guidance does to the English of {MODELS[name]}, beside other ways to personalize it; on "
        f"{record['hardware']}, in {ENGINE['dtype']}, {record['date']}, by {MADE_BY[name]}. `PAD`: by the demo's "
        "reward model, trained on SmolLM2's answers, held against the base model; `against itself`: held against what "
        "it says without the preference; `untrained`: so by SmolLM2 itself"
        + ("" if name == "language-gemma" else f", which is {CONTEXT_STEERING}")
        + "; `from the opposite`: more of the wish, less of its opposite. Prompts, wordings and the combinations of "
        "two wishes are held out from training.",
        "Of each measure: by how much an answer moved in the direction asked, less or more, from the unguided answers "
        f"to its prompt ({units}). `satisfied`: beyond the median of these. `taken up`: of a question's content words "
        "those that its answer has; `refuses`: begins by saying that it gives no answer. "
        + ("" if grammar is None else "`faults`: of grammar in 100 words, those that Harper's rules find. ")
        + f"{'Grammar and w' if grammar is None else 'W'}hether an answer stays with its question in meaning "
        f"{'are' if grammar is None else 'is'} not measured. Intervals are 95%, over prompts.",
        f"Unguided: {say_percent(base['loops'])} of answers loop, {base['nll']:.2f} nats a token, distinct-2 "
        f"{base['distinct_2']:.2f}, {say_percent(base['taken_up'])} taken up, {say_percent(base['refuses'])} refuse; "
        f"{base['num_answers']} answers to {len({cell.prompt for cell in bench.cells})} prompts.",
        "\n".join(f"- {line}" for line in verdicts(rows, methods)),
    ]
    for group, title in TITLES.items():
        if any(row["group"] == group for row in rows):
            text += [f"## {title}", group_table(rows, group)]
        if group == "one":
            text += ["Satisfied, by wish:", wish_table(rows)]
    if any(row["group"] == "two" for row in rows):
        text += ["Each two wishes by themselves:", combination_table(rows)]
    if scored := [method.name for method in methods if not method.reads_the_prompt]:
        text.append(f"{', '.join(scored)}: the likelihood is that of at most {NUM_SCORED} answers.")
    if is_loaded:
        text.append("Times are left out: the machine had other work.")
    if others := [method.name for method in methods if not method.is_by_vllm]:
        text.append(f"{', '.join(others)}: by transformers, in batches; time against that of the base in vLLM.")
    answered = [method.name for method in methods if method.is_personal and method.name in found]
    if parts := [name for name in answered if is_a_part(bench, found[name])]:
        text.append(f"{', '.join(parts)}: for a part of the prompts or of the users.")
    for day in sorted({row["date"] for row in rows if "date" in row}):
        kept = dict.fromkeys(row["method"] for row in rows if row.get("date") == day)
        text.append(f"Of {day}, beside the unguided answers of that day: {', '.join(kept)}.")
    (output / f"{name}.md").write_text("\n\n".join(text) + "\n")
    if rows_for_all(rows):
        plot_language(rows, output / f"{name}.png")
    return rows


def digest_of(cells: Sequence[Cell]) -> str:
    """Which prompts and wishes a table is of, in a few characters."""
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()[:8]


def with_kept(
    rows: Sequence[dict[str, Any]], before: Mapping[str, Any], names: Sequence[str], holding: Set[str]
) -> list[dict[str, Any]]:
    """Rows, and an earlier record's of methods that have none among them, with their day; in the order of ``names``, of
    all methods.

    Args:
        holding: methods whose earlier rows still hold.
    """
    wanted = holding - {row["method"] for row in rows}
    kept = [{"date": before["date"], **row} for row in before["rows"] if row["method"] in wanted]
    known = [row for row in (*rows, *kept) if row["method"] in names]
    return sorted(known, key=lambda row: names.index(row["method"]))


def is_a_part(bench: Bench, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a method answered but a part of a group's prompts, or of its users."""
    answered = {record["cell"] for record in records}
    groups = {bench.cells[i].group for i in answered}
    return answered != {i for i, cell in enumerate(bench.cells) if cell.group in groups}
