"""The language table's methods, and what some of them do for a user before they answer: fitting sliders, DPO."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from pad_vllm.demo import recipe, wishes
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, OPPOSITES
from pad_vllm.evaluation.harness import Asked, Models, Prompt
from pad_vllm.evaluation.methods import BASE, BestOf, Examples, Guided, Prompting, Tuned, Weighted
from pad_vllm.training.records import write_records

from .language_bench import Bench, Cell

NUM_EXAMPLES = 3
NUM_CHOICES = 30
"""Comparisons of a user to whom sliders are fitted."""
BEST_OF_SEED = 10**6
"""Of samples: far from those of the answers that ``base`` gives."""


def all_of(bench: Bench) -> list[Asked]:
    """The table's methods, in its order, and the cells that each answers. ``base`` answers each prompt."""
    return [*at_once(bench), *after_work(bench)]


def at_once(bench: Bench) -> list[Asked]:
    """Those that need nothing but the models."""
    sizes, cells, everyone = bench.sizes, bench.cells, range(len(bench.cells))
    first = {cell.prompt: i for i, cell in reversed(list(enumerate(cells)))}
    singles, prompted = singles_of(bench), prompting(bench)
    asked = [
        Asked(BASE, [i for i in sorted(first.values()) for _ in range(sizes.base_answers)]),
        Asked(prompted, everyone),
    ]
    for beta in sizes.betas:
        asked.append(Asked(Guided(f"PAD, beta {beta:g}", float(beta)), everyone))
    for beta in sizes.base_betas:
        asked.append(Asked(Guided(f"PAD against the base, beta {beta:g}", float(beta), against_the_base), everyone))
    if sizes.base_betas:  # a neutral reference would read the preference too, in the base's prompt
        beta = float(sizes.base_betas[0])
        asked.append(Asked(Guided("prompting and PAD", beta, against_the_base, prompting=prompted), everyone))
    untrained = str(bench.untrained)
    for beta in sizes.untrained_betas:
        asked.append(Asked(Guided(f"PAD untrained, beta {beta:g}", float(beta), reward_model=untrained), everyone))
        name = f"PAD untrained, from the opposite, beta {beta:g}"
        asked.append(Asked(Guided(name, float(beta), from_the_opposite(bench), untrained), singles))
    prompts = list(dict.fromkeys(cells[i].prompt for i in singles))[: sizes.best_of_prompts]
    best_of = BestOf(f"best of {sizes.best_of}", sizes.best_of, shared=True, seed=BEST_OF_SEED)
    asked.append(Asked(best_of, [i for i in singles if cells[i].prompt in prompts]))
    return asked


def after_work(bench: Bench) -> list[Asked]:
    """Those that need a user's choices, and models or sliders made of these."""
    sizes, singles = bench.sizes, singles_of(bench)

    def users(value: str) -> list[int]:
        return [i for i in singles if bench.cells[i].values == (value,)]

    asked = []
    if sizes.choice_prompts:
        examples = Examples("prompting with examples", prompting(bench), examples_of(bench))
        asked.append(Asked(examples, singles))
    for value in sizes.fitted:
        asked.append(Asked(Weighted(f"sliders of {value}", for_all(fit_user, bench, value)), users(value)))
    for value in sizes.tuned:
        asked.append(Asked(Tuned(f"DPO for {value}", for_all(tune_user, bench, value)), users(value)))
    return asked


def singles_of(bench: Bench) -> list[int]:
    """Cells of users with one wish."""
    return [i for i, cell in enumerate(bench.cells) if cell.group == "one"]


def prompting(bench: Bench) -> Prompting:
    """The base model reads the preference where the demo's reward models do."""

    def read(models: Models, prompt: Prompt, preference: str) -> list[int]:
        return bench.template.compose(models.plain(prompt), preference)

    return Prompting("prompting", read)


def against_the_base(cell: Cell) -> dict[str, Any]:
    return {"pad_reference": "base"}


def from_the_opposite(bench: Bench) -> Callable[[Cell], dict[str, Any]]:
    """A slider: more of the wish, less of its opposite."""

    def arguments(cell: Cell) -> dict[str, Any]:
        rng = random.Random(f"{bench.sizes.seed} {cell.preference} {cell.prompt}")
        opposite = wishes.preference([OPPOSITES[cell.values[0]]], rng, held_out=True)
        return {"pad_preference": [cell.preference, opposite], "pad_preference_weights": [1.0, -1.0]}

    return arguments


def examples_of(bench: Bench) -> Callable[[Cell], Sequence[Mapping[str, Any]]]:
    """Three of the user's own choices."""

    def examples(cell: Cell) -> list[dict[str, Any]]:
        rng = random.Random(f"{bench.sizes.seed} {cell.prompt}")
        return rng.sample(bench.choices[cell.values[0]], NUM_EXAMPLES)

    return examples


def for_all(make: Callable[[Bench, str], Any], bench: Bench, value: str) -> Callable[[Cell], Any]:
    """What is made once, when the first of a user's cells asks for it."""

    @cache
    def made() -> Any:
        return make(bench, value)

    return lambda cell: made()


def fit_user(bench: Bench, value: str) -> dict[str, Any]:
    """Arguments of a user's requests, from comparisons in which the user never said what was wanted."""
    from pad_vllm.training.sliders import fit_sliders, persona_of, sliders_of

    # One text for each end of three dimensions, the user's among them.
    names = list(dict.fromkeys([DIRECTIONS[value][0], *DIMENSIONS]))[:3]
    texts = [wishes.wordings(end)[0] for name in names for end in (DIMENSIONS[name].less, DIMENSIONS[name].more)]
    with tempfile.TemporaryDirectory() as folder:
        attributes = Path(folder, "attributes.json")
        attributes.write_text(json.dumps(texts))
        data = write_records(Path(folder, "choices.jsonl"), bench.choices[value][:NUM_CHOICES])
        fitted = fit_sliders(str(bench.folders.reward), data, attributes)
    print(f"sliders of {value}: {sliders_of(fitted)}, {fitted.held_out_accuracy:.0%} of what was left out", flush=True)
    return persona_of(sliders_of(fitted)) | {"pad_beta": bench.sizes.betas[len(bench.sizes.betas) // 2]}


def tune_user(bench: Bench, value: str) -> str:
    """A model for one user, by DPO: the PAD objective without a preference to read."""
    from pad_vllm.training.train import TrainingConfig, train

    target = Path(bench.scratch.name, value)
    records = [{**r, "preference": None, "labels": {}} for r in bench.choices[value][: bench.sizes.tuned_pairs]]
    data = write_records(target.with_name("choices.jsonl"), records)
    stage = replace(recipe.FULL.rounds[0].stage, epochs=2.0, opposites=False)
    config = TrainingConfig(
        str(data),
        str(bench.folders.base),
        str(target),
        stages=("backbone",),
        lora_rank=recipe.FULL.lora_rank,
        save_steps=10**6,
        max_answer=recipe.FULL.max_answer,
        backbone=stage,
        trainer=recipe.TRAINER,
    )
    train(config)
    return str(target)
