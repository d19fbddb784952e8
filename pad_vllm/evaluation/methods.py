"""Ways to personalize answers, as the tables hold them side by side."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pad_vllm.evaluation.engine import Answers, Request
from pad_vllm.evaluation.harness import Cell, Engine, Method, Models, Plan, Prompt, in_tokens_of, preference_of, taken
from pad_vllm.reward.source import Source, source_of
from pad_vllm.training.data import Example
from pad_vllm.training.loading import load_source
from pad_vllm.training.trainer import score_answers


@dataclass(frozen=True)
class Base(Method):
    """The base model, which knows nothing of the user."""

    @property
    def is_personal(self) -> bool:
        return False

    def plan(self, models: Models, cells: Sequence[Cell]) -> list[Plan]:
        requests = [Request(models.plain(cell.prompt)) for cell in cells]
        return [Plan(Engine(models.base, models.pad), requests)]


BASE = Base("base")


@dataclass(frozen=True)
class Prompting(Method):
    """The preference in the base model's prompt.

    Attributes:
        read: what the base model reads of a prompt and a preference.
    """

    read: Callable[[Models, Prompt, str], list[int]]

    @property
    def reads_the_prompt(self) -> bool:
        return False

    def ids(self, models: Models, cell: Cell) -> list[int]:
        """What the base model reads of a cell."""
        return self.read(models, cell.prompt, preference_of(cell))

    def plan(self, models: Models, cells: Sequence[Cell]) -> list[Plan]:
        return [Plan(Engine(models.base, models.pad), [Request(self.ids(models, cell)) for cell in cells])]


def in_last_turn(template: str) -> Callable[[Models, Prompt, str], list[int]]:
    """Prompting by a text with ``{prompt}`` and ``{preference}``, which becomes a chat's last message."""

    def read(models: Models, prompt: Prompt, preference: str) -> list[int]:
        if isinstance(prompt, str):
            return models.plain(template.format(prompt=prompt, preference=preference))
        *head, last = prompt
        content = template.format(prompt=last["content"], preference=preference)
        return models.plain([*head, {**last, "content": content}])

    return read


@dataclass(frozen=True)
class Examples(Method):
    """Prompting after examples of what the user likes.

    Attributes:
        examples: a cell's, records with ``prompt`` and ``chosen``.
    """

    prompting: Prompting
    examples: Callable[[Any], Sequence[Mapping[str, Any]]]

    @property
    def reads_the_prompt(self) -> bool:
        return False

    def ids(self, models: Models, cell: Cell) -> list[int]:
        """What the base model reads of a cell."""
        return self.prompting.read(models, self._conversation(cell), preference_of(cell))

    def plan(self, models: Models, cells: Sequence[Cell]) -> list[Plan]:
        return [Plan(Engine(models.base, models.pad), [Request(self.ids(models, cell)) for cell in cells])]

    def _conversation(self, cell: Cell) -> list[Mapping[str, str]]:
        turns: list[Mapping[str, str]] = []
        for record in self.examples(cell):
            turns.append({"role": "user", "content": record["prompt"]})
            turns.append({"role": "assistant", "content": record["chosen"]})
        last = [{"role": "user", "content": cell.prompt}] if isinstance(cell.prompt, str) else cell.prompt
        return [*turns, *last]


def nothing(cell: Cell) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Guided(Method):
    """Guidance by the preference.

    Attributes:
        arguments: further arguments of a cell's request.
        reward_model: a reward model other than the table's.
        prompting: also puts the preference into the base model's prompt.
    """

    beta: float
    arguments: Callable[[Any], Mapping[str, Any]] = nothing
    reward_model: str | None = None
    prompting: Prompting | Examples | None = None

    @property
    def reads_the_prompt(self) -> bool:
        return self.prompting is None

    @property
    def needs_reward_model(self) -> bool:
        return self.reward_model is None

    def plan(self, models: Models, cells: Sequence[Cell]) -> list[Plan]:
        pad = models.pad if self.reward_model is None else {**models.pad, "reward_model": self.reward_model}
        return [Plan(Engine(models.base, pad), [self._request(models, cell) for cell in cells])]

    def _request(self, models: Models, cell: Cell) -> Request:
        preference = preference_of(cell)
        arguments = {"pad_preference": preference, "pad_beta": self.beta, **self.arguments(cell)}
        if self.prompting is None:
            return Request(models.plain(cell.prompt), arguments)
        return Request(self.prompting.ids(models, cell), arguments)


@dataclass(frozen=True)
class Weighted(Method):
    """Guidance by numbers, known of the user or fitted: weights over value heads, or sliders.

    Attributes:
        arguments: of a cell's request.
    """

    arguments: Callable[[Any], Mapping[str, Any]]

    @property
    def needs_reward_model(self) -> bool:
        return True

    def plan(self, models: Models, cells: Sequence[Cell]) -> list[Plan]:
        requests = [Request(models.plain(cell.prompt), self.arguments(cell)) for cell in cells]
        return [Plan(Engine(models.base, models.pad), requests)]


@dataclass(frozen=True)
class BestOf(Method):
    """Sample ``n`` answers from the base model, and take the one with the highest reward.

    Attributes:
        shared: whether cells with the same prompt choose among the same samples.
        seed: added to the table's seed.
    """

    n: int
    shared: bool = False
    seed: int = 0

    @property
    def needs_reward_model(self) -> bool:
        return True

    def plan(self, models: Models, cells: Sequence[Cell]) -> list[Plan]:
        prompts = [models.plain(cell.prompt) for cell in cells]
        asked = dict(zip(self._lots(prompts), prompts, strict=True))
        requests = [Request(prompt) for prompt in asked.values() for _ in range(self.n)]
        return [Plan(Engine(models.base, models.pad), requests, self.seed)]

    def _lots(self, prompts: Sequence[list[int]]) -> list[int]:
        """Which lot of n samples each cell chooses from."""
        if not self.shared:
            return list(range(len(prompts)))
        numbers: dict[tuple[int, ...], int] = {}
        return [numbers.setdefault(tuple(prompt), len(numbers)) for prompt in prompts]

    def pick(self, models: Models, cells: Sequence[Cell], outputs: Answers) -> Answers:
        prompts = [models.plain(cell.prompt) for cell in cells]
        reads = [(models.context(cell), models.reference_context(cell)) for cell in cells]
        return pick_best(models, reads, [range(n * self.n, (n + 1) * self.n) for n in self._lots(prompts)], outputs)


def pick_best(
    models: Models, reads: Sequence[tuple[list[int], list[int]]], choices: Sequence[range], samples: Answers
) -> Answers:
    """Of each cell's samples the one of the highest reward, log pi_theta(y | x, p) - log pi_ref(y | x), against the
    reference that guides (``models.reference``).

    Args:
        reads: of each cell what the reward model reads, and what the reference does.
        choices: of each cell its samples.
    """
    start = time.perf_counter()
    pairs = [(cell, sample) for cell, own in enumerate(choices) for sample in own]
    rewards = torch.zeros(len(pairs))
    reward = ("reward_model", models.source, models.reward_tokenizer)
    base = ("base", Source(models.base, models.base, None), models.tokenizer)
    terms = [(1, reward), *{"base": [(-1, base)], "neutral": [(-1, reward)], "none": []}[models.reference]]
    for side, (sign, (key, source, reads_tokens)) in enumerate(terms):
        answers = in_tokens_of(reads_tokens, samples, models.tokenizer)
        examples = [Example(reads[cell][side], answers[sample]) for cell, sample in pairs]
        rewards += sign * score_answers(load_scorer(key, source), examples)
    own_rewards = rewards.split([len(own) for own in choices])
    best = [own[int(own_reward.argmax())] for own, own_reward in zip(choices, own_rewards, strict=True)]
    return taken(samples, best, samples.seconds + time.perf_counter() - start)


@dataclass(frozen=True)
class RewardModel(Method):
    """The reward model answers alone."""

    @property
    def reads_the_prompt(self) -> bool:
        return False

    @property
    def needs_reward_model(self) -> bool:
        return True

    def tokenizer(self, models: Models) -> PreTrainedTokenizerBase:
        return models.reward_tokenizer

    def plan(self, models: Models, cells: Sequence[Cell]) -> list[Plan]:
        return [Plan(_engine_without_pad(models.source), [Request(models.context(cell)) for cell in cells])]


@dataclass(frozen=True)
class Tuned(Method):
    """Models of the base's kind, each tuned for its user (DPO).

    Attributes:
        model: path of the one for a cell: a model, or an adapter of one.
    """

    model: Callable[[Any], str]

    @property
    def reads_the_prompt(self) -> bool:
        return False

    def plan(self, models: Models, cells: Sequence[Cell]) -> list[Plan]:
        return [
            Plan(
                _engine_without_pad(source_of({"reward_model": path}, None)),
                [Request(models.plain(cells[i].prompt)) for i in own],
            )
            for path, own in self._by_model(cells).items()
        ]

    def _by_model(self, cells: Sequence[Cell]) -> dict[str, list[int]]:
        by_model = defaultdict(list)
        for i, cell in enumerate(cells):
            by_model[self.model(cell)].append(i)
        return by_model

    def pick(self, models: Models, cells: Sequence[Cell], outputs: Answers) -> Answers:
        asked = [i for own in self._by_model(cells).values() for i in own]
        return taken(outputs, sorted(range(len(asked)), key=asked.__getitem__), outputs.seconds)


def _engine_without_pad(source: Source) -> Engine:
    return Engine(source.model, adapter=source.reward_model if source.is_adapter else None)


def load_scorer(key: str, source: Source) -> Any:
    """A causal language model in transformers, to score answers."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_source(key, source).eval().to(device)
