"""The language table's cells, and what each method answered to them so far."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pad_vllm.demo import recipe, wishes
from pad_vllm.demo.comparisons import compare
from pad_vllm.demo.measures import DIRECTIONS
from pad_vllm.demo.smollm import PROMPT_TEMPLATE, DemoModels
from pad_vllm.evaluation.engine import Answers
from pad_vllm.evaluation.harness import Asked, Method, Models, answers
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import answer_ids
from pad_vllm.training.records import read_records, write_records

GROUPS = ("one", "two")
PROMPTS_PER_PART = 17
"""Of the prompts whose answers users choose from: answered, and then kept."""


@dataclass(frozen=True)
class Sizes:
    """How many prompts each group's users ask, and how far the costly methods go.

    Attributes:
        prompts: by group.
        base_answers: unguided answers to each prompt, against which the others are held.
        best_of: answers that the reward model chooses from, for ``best_of_prompts`` of the prompts.
        betas: strengths of guidance by the trained reward model, with the reference that its folder names: the base.
        untrained_betas: and by SmolLM2 itself; one of them is ``opposite_beta``, also from the opposite of a wish.
        neutral_betas: and held against what it says itself without the preference (``reference: neutral``).
        beta_with_prompting: of guidance whose wish is in the prompt too.
        is_judged: whether Persona-judge answers.
        fitted: values of users to whom sliders are fitted, from each number of ``choices``.
        bounded, bound: from how many choices sliders also answer within a bound, and that bound, in nats a token.
        tuned: values of users for whom a model is tuned by DPO, from ``tuned_pairs`` comparisons.
        choice_prompts: training prompts whose answers those users chose from.
        steering_prompts: training prompts on which a steering vector's layer and strength are chosen, among
            ``steering_layers`` and ``steering_strengths`` (times the difference of means), by the first
            ``steering_tokens`` of answers.
        together: methods that an engine answers before their answers are kept.
        part: most cells that a method answers before its answers are kept. None: all.
    """

    prompts: Mapping[str, int]
    base_answers: int = 4
    best_of: int = 8
    best_of_prompts: int = 80
    betas: tuple[float, ...] = (1.0, 1.5, 2.0)
    untrained_betas: tuple[float, ...] = (1.5, 2.5, 4.0)
    opposite_beta: float = 2.5
    neutral_betas: tuple[float, ...] = (1.0,)
    beta_with_prompting: float = 1.0
    is_judged: bool = True
    fitted: tuple[str, ...] = ("brief", "emphatic")
    choices: tuple[int, ...] = (5, 10, 20, 40)
    bounded: int = 10
    bound: float = 0.4
    tuned: tuple[str, ...] = ("brief", "personal", "emphatic", "simple", "upbeat", "list")
    tuned_pairs: int = 96
    choice_prompts: int = 85
    steering_prompts: int = 4
    steering_layers: tuple[int, ...] = (10, 15, 20)
    steering_strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    steering_tokens: int = 64
    max_tokens: int = 128
    temperature: float = 0.7
    top_k: int = 40
    seed: int = 0
    together: int = 2
    part: int | None = None


FULL = Sizes({"one": 80, "two": 16})
GEMMA: dict[str, Any] = {
    "neutral_betas": (0.8, 1.0),
    "beta_with_prompting": 0.8,
    "untrained_betas": (2.5,),
    "best_of_prompts": 0,
    "is_judged": False,
    "fitted": (),
    "tuned": (),
    "choice_prompts": 0,
}
"""What is not done on Gemma: answers that take models or choices of its own, or another end than an end token."""
FEW_PROMPTS: dict[str, Any] = {
    "prompts": {"one": 12, "two": 0},
    "choice_prompts": 34,
    "fitted": ("brief", "upbeat"),
    "tuned": ("brief", "personal", "emphatic", "simple", "upbeat", "academic"),
    "tuned_pairs": 32,
    "steering_prompts": 2,
    "steering_tokens": 48,
    "together": 1,
    "part": 96,
}
"""Every method on a few prompts, for cores that have other work, too."""
SMALL = Sizes(
    {"one": 1, "two": 1},
    base_answers=1,
    best_of=2,
    best_of_prompts=1,
    betas=(1.5,),
    untrained_betas=(2.5,),
    is_judged=False,
    fitted=(),
    tuned=(),
    choice_prompts=0,
    max_tokens=16,
    together=9,
)


class Cell(NamedTuple):
    """What a user wants of an answer to a prompt, and how the user says it."""

    group: str
    prompt: str
    values: tuple[str, ...]
    preference: str


class Bench:
    """Answers of every method, made as they are asked for and kept in ``work``.

    Args:
        models: the base, and the trained reward model.
        untrained: the reward model that is SmolLM2.
        stop: how the base goes on after an answer, other than by an end token.
    """

    def __init__(self, models: DemoModels, untrained: Path, work: Path, sizes: Sizes, stop: Sequence[str] = ()) -> None:
        self.folders, self.untrained, self.work, self.sizes, self.stop = models, untrained, work, sizes, stop
        self.models = Models.load(str(models.base), {"top_k": sizes.top_k, "reward_model": str(models.reward)})
        self.template = PromptTemplate(self.models.tokenizer, PROMPT_TEMPLATE)
        self.cells = list(cells(sizes))
        work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def choices(self) -> dict[str, list[dict[str, Any]]]:
        """Comparisons that a user of each value made among SmolLM2's answers to training prompts."""
        base = self.folders.base
        sizes = replace(recipe.FULL, num_prompts=self.sizes.choice_prompts, prompts_per_part=PROMPTS_PER_PART)
        records = compare(recipe.sample(self.work, base, base, sizes), self.models.tokenizer, num=10**6, combined=0.0)
        once = {(r["prompt"], r["chosen"], r["rejected"], *r["labels"].items()): r for r in records}.values()
        return {value: [r for r in once if r["labels"] == {name: sign}] for value, (name, sign) in DIRECTIONS.items()}

    def answer(self, asked: Sequence[Asked]) -> None:
        """Have each method answer what it has not answered yet, part by part. A few methods share an engine."""
        while left := [one for one in map(self._left, asked) if one.indices]:
            self._answer([one._replace(indices=one.indices[: self.sizes.part]) for one in left])

    def _answer(self, asked: Sequence[Asked]) -> None:
        found = answers(
            self.models,
            self.cells,
            asked,
            seed=self.sizes.seed,
            together=self.sizes.together,
            temperature=self.sizes.temperature,
            max_tokens=self.sizes.max_tokens,
            nll=True,
            stop=self.stop,
            **recipe.ENGINE,
        )
        for one, theirs in found:
            self._keep(one, theirs)

    def _left(self, asked: Asked) -> Asked:
        """What is left of a method's cells after what was kept."""
        records = self.kept(asked.method)
        kept = Counter(record["cell"] for record in records)
        left = []
        for i in asked.indices:
            kept[i] -= 1
            if kept[i] < 0:
                left.append(i)
        return Asked(asked.method, left, len(records))

    def kept(self, method: Method) -> list[dict[str, Any]]:
        """What a method answered so far, of the cells that there are: records with ``cell``, ``text``, ``num_tokens``,
        ``nll`` (None of what transformers answered), ``seconds``."""
        first: dict[tuple[str, ...], int] = {}
        for i, place in enumerate(self.places(method)):
            first.setdefault(place, i)
        records = [record | {"cell": first.get(tuple(record["of"]))} for record in self._records(method)]
        return [record for record in records if record["cell"] is not None]

    def _records(self, method: Method) -> list[dict[str, Any]]:
        file = self.work / f"{method.name}.jsonl"
        return read_records(file) if file.exists() else []

    def places(self, method: Method) -> list[tuple[str, ...]]:
        """What each cell is to a method, in words: to one that knows nothing of users, a prompt."""
        if not method.is_personal:
            return [(cell.prompt,) for cell in self.cells]
        return [(cell.group, cell.prompt, cell.preference) for cell in self.cells]

    def _keep(self, asked: Asked, found: Answers) -> None:
        """Add answers to what was kept."""
        seconds, places = found.seconds / len(asked.indices), self.places(asked.method)
        nll: Sequence[float | None] = found.nll or [None] * len(asked.indices)
        records = [
            {"of": places[i], "text": text.strip(), "num_tokens": len(tokens), "nll": value, "seconds": seconds}
            for i, text, tokens, value in zip(asked.indices, found.texts, found.tokens, nll, strict=True)
        ]
        print(f"{asked.method.name}: {len(records)} answers in {found.seconds:.0f} s", flush=True)
        write_records(self.work / f"{asked.method.name}.jsonl", [*self._records(asked.method), *records])

    def answer_ids(self, text: str) -> list[int]:
        """An answer in the base's tokens, as it would have written it."""
        if self.stop:  # a document, which has no end token
            return self.models.tokenizer.encode(f" {text}", add_special_tokens=False)
        return answer_ids(text, self.models.tokenizer)


def cells(sizes: Sizes) -> Iterator[Cell]:
    prompts = wishes.prompts(held_out=True)
    for number, group in enumerate(GROUPS):
        rng = random.Random(sizes.seed + number)
        wants = wishes.combinations(held_out=True) if group == "two" else [(value,) for value in DIRECTIONS]
        for prompt in prompts[: sizes.prompts[group]]:
            for values in wants:
                yield Cell(group, prompt, values, wishes.preference(values, rng, held_out=True))
