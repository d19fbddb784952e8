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
from pad_vllm.evaluation.rivals import Judged, Steered
from pad_vllm.training.records import write_records

from .language_bench import Bench, Cell
from .language_steering import steering_of

NUM_EXAMPLES = 3
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
    for beta in sizes.neutral_betas:
        asked.append(Asked(Guided(f"PAD against itself, beta {beta:g}", float(beta), against_itself), everyone))
    asked.append(Asked(with_guidance(bench, "prompting and PAD", prompted), everyone))
    untrained = str(bench.untrained)
    for beta in sizes.untrained_betas:
        asked.append(Asked(Guided(f"PAD untrained, beta {beta:g}", float(beta), reward_model=untrained), everyone))
        if beta == sizes.opposite_beta:
            name = f"PAD untrained, from the opposite, beta {beta:g}"
            asked.append(Asked(Guided(name, float(beta), from_the_opposite(bench), untrained), singles))
    prompts = list(dict.fromkeys(cells[i].prompt for i in singles))[: sizes.best_of_prompts]
    best_of = BestOf(f"best of {sizes.best_of}", sizes.best_of, shared=True, seed=BEST_OF_SEED)
    asked.append(Asked(best_of, [i for i in everyone if cells[i].prompt in prompts]))
    if sizes.is_judged:
        asked.append(Asked(Judged("Persona-judge", prompted, two_preferences(bench)), everyone))
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
        asked.append(Asked(with_guidance(bench, "prompting with examples and PAD", examples), singles))
        if sizes.steering_prompts:
            asked.append(Asked(Steered("steering vector", steering_of(bench)), singles))
    for value in sizes.fitted:
        for num in sizes.choices:
            sliders = Weighted(f"sliders of {value}, {num} choices", for_all(fit_user, bench, value, num))
            asked.append(Asked(sliders, users(value)))
            if num == sizes.bounded:
                bounded = for_all(fit_user, bench, value, num, sizes.bound)
                asked.append(Asked(Weighted(f"{sliders.name}, within {sizes.bound:g} nats", bounded), users(value)))
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


def with_guidance(bench: Bench, name: str, prompting: Prompting | Examples) -> Guided:
    """Against the base: a neutral reference would read the preference too, in the base's prompt."""
    return Guided(name, bench.sizes.beta_with_prompting, prompting=prompting)


def against_itself(cell: Cell) -> dict[str, Any]:
    return {"pad_reference": "neutral"}


def from_the_opposite(bench: Bench) -> Callable[[Cell], dict[str, Any]]:
    """A slider: more of the wish, less of its opposite."""

    def arguments(cell: Cell) -> dict[str, Any]:
        rng = random.Random(f"{bench.sizes.seed} {cell.preference} {cell.prompt}")
        opposite = wishes.preference([OPPOSITES[cell.values[0]]], rng, held_out=True)
        return {"pad_preference": [cell.preference, opposite], "pad_preference_weights": [1.0, -1.0]}

    return arguments


def two_preferences(bench: Bench) -> Callable[[Cell], tuple[str, str]]:
    """Of Persona-judge: a user's two wishes, or one in two wordings, as its authors ask for a single dimension."""

    def preferences(cell: Cell) -> tuple[str, str]:
        rng = random.Random(f"{bench.sizes.seed} {cell.preference} {cell.prompt}")
        if len(cell.values) == 2:
            one, other = (wishes.preference([value], rng, held_out=True) for value in cell.values)
            return one, other
        others = [text for text in wishes.wordings(cell.values[0], held_out=True) if text != cell.preference]
        return cell.preference, rng.choice(others)

    return preferences


def examples_of(bench: Bench) -> Callable[[Cell], Sequence[Mapping[str, Any]]]:
    """Three of the user's own choices."""

    def examples(cell: Cell) -> list[dict[str, Any]]:
        rng = random.Random(f"{bench.sizes.seed} {cell.prompt}")
        return rng.sample(bench.choices[cell.values[0]], NUM_EXAMPLES)

    return examples


def for_all(make: Callable[..., Any], bench: Bench, *what: Any) -> Callable[[Cell], Any]:
    """What is made once, when the first of a user's cells asks for it."""

    @cache
    def made() -> Any:
        return make(bench, *what)

    return lambda cell: made()


def fit_user(bench: Bench, value: str, num_choices: int, bound: float | None = None) -> dict[str, Any]:
    """Arguments of a user's requests, from comparisons in which the user never said what was wanted.

    Args:
        bound: on each token's divergence, in nats.
    """
    from pad_vllm.training.sliders import fit_sliders, persona_of, sliders_of

    file = bench.work / f"sliders of {value} from {num_choices}.json"
    if not file.exists():
        # One text for each end of three dimensions, the user's among them.
        names = list(dict.fromkeys([DIRECTIONS[value][0], *DIMENSIONS]))[:3]
        texts = [wishes.wordings(end)[0] for name in names for end in (DIMENSIONS[name].less, DIMENSIONS[name].more)]
        with tempfile.TemporaryDirectory() as folder:
            attributes = Path(folder, "attributes.json")
            attributes.write_text(json.dumps(texts))
            data = write_records(Path(folder, "choices.jsonl"), _first(bench.choices[value], num_choices))
            fitted = fit_sliders(str(bench.folders.reward), data, attributes)
        print(f"{file.stem}: {sliders_of(fitted)}, {fitted.held_out_accuracy:.0%} of what was left out", flush=True)
        file.write_text(json.dumps(sliders_of(fitted)))
    beta = bench.sizes.betas[len(bench.sizes.betas) // 2]
    arguments = persona_of(json.loads(file.read_text())) | {"pad_beta": beta}
    return arguments if bound is None else arguments | {"pad_max_divergence": bound}


def _first(choices: Sequence[Mapping[str, Any]], num: int) -> Sequence[Mapping[str, Any]]:
    if len(choices) < num:
        raise ValueError(f"choices: {num} are asked for, and there are {len(choices)}; take more choice_prompts")
    return choices[:num]


def tune_user(bench: Bench, value: str) -> str:
    """A model for one user, by DPO: the PAD objective without a preference to read. Its folder, of a LoRA, is kept."""
    from pad_vllm.training.train import TrainingConfig, train

    target = bench.work / f"DPO for {value}"
    if not target.exists():
        choices = _first(bench.choices[value], bench.sizes.tuned_pairs)
        data = write_records(
            bench.work / f"choices of {value}.jsonl", [{**r, "preference": None, "labels": {}} for r in choices]
        )
        stage = replace(recipe.FULL.rounds[0].stage, epochs=2.0, opposites=False)
        config = TrainingConfig(
            str(data),
            str(bench.folders.base),
            str(target),
            stages=("backbone",),
            lora_rank=recipe.FULL.lora_rank,
            save_steps=8,  # a stopped one goes on from there
            max_answer=recipe.FULL.max_answer,
            backbone=stage,
            trainer=recipe.TRAINER,
        )
        train(config)
    return str(target)
