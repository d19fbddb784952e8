"""Sliders in the synthetic world: what users want who never say it, found among attributes in words."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.alignment import own_record
from pad_vllm.params import MAX_PREFERENCES
from pad_vllm.synthetic import models, world
from pad_vllm.training.fit import FittedWeights
from pad_vllm.training.sliders import fit_sliders, persona_of, sliders_of
from tests.support.engine import Worker

ATTRIBUTES = {
    value: world.preference({dimension: value}, random.Random(i))
    for i, (dimension, value) in enumerate((d, v) for d, values in world.DIMENSIONS.items() for v in values)
}
"""One text for each value of the world: every dimension's, and its opposite's."""

USERS = [
    {"length": "concise"},
    {"tone": "formal", "stance": "direct"},
    {"stance": "cautious", "example": "no example", "restatement": "immediate"},
    {"tone": "playful", "restatement": "restating"},  # asked for together in no training
]


@pytest.fixture(scope="module")
def reward(cache) -> str:
    return str(models.build(cache).reward)


@pytest.fixture(scope="module")
def fitted(reward, tmp_path_factory) -> Callable[[int], FittedWeights]:
    """Sliders of one of the users, who made 30 comparisons, and said nothing. Once for all tests."""

    @functools.cache
    def fit(user: int) -> FittedWeights:
        folder, rng = tmp_path_factory.mktemp("user"), random.Random(0)
        own = models.write_records(folder / "own.jsonl", [own_record(USERS[user], rng) for _ in range(30)])
        (folder / "attributes.yaml").write_text("".join(f"- {text}\n" for text in ATTRIBUTES.values()))
        return fit_sliders(reward, own, folder / "attributes.yaml")

    return fit


@pytest.mark.parametrize("user", range(len(USERS)), ids=lambda user: "+".join(USERS[user].values()))
def test_the_largest_sliders_are_what_the_user_wants(user, fitted):
    wanted, found = USERS[user], fitted(user)
    assert found.num_comparisons == 30
    assert found.held_out_accuracy >= 0.9
    sliders = sliders_of(found)
    assert len(sliders) <= MAX_PREFERENCES < len(ATTRIBUTES)
    # A dimension's two attributes say the same thing: together they are one slider from its second value to its first.
    moves = {
        dimension: sliders.get(ATTRIBUTES[first], 0) - sliders.get(ATTRIBUTES[second], 0)
        for dimension, (first, second) in world.DIMENSIONS.items()
    }
    largest = sorted(moves, key=lambda dimension: -abs(moves[dimension]))[: len(wanted)]
    assert set(largest) == set(wanted), sliders
    for dimension, value in wanted.items():
        assert (moves[dimension] > 0) == (value == world.DIMENSIONS[dimension][0]), sliders
        assert sliders.get(ATTRIBUTES[value], 0) >= 0, sliders


NUM_QUESTIONS = 24


def satisfaction(
    cache: Path, arguments: list[tuple[Mapping[str, str], Mapping[str, Any] | None]]
) -> list[tuple[float, float]]:
    """Of what a user wants, under a request's arguments; and the share of well formed answers."""
    from pad_vllm.synthetic.measure import generate, start

    topics = random.Random(0).sample(world.TOPICS, NUM_QUESTIONS)
    questions = [world.HELD_OUT_QUESTIONS[0].format(topic.task) for topic in topics]
    asked = [extra_args for _, extra_args in arguments for _ in questions]
    texts = generate(start(models.build(cache)), questions * len(arguments), asked, temperature=0.8)
    found = []
    for i, (wanted, _) in enumerate(arguments):
        own = texts[i * NUM_QUESTIONS : (i + 1) * NUM_QUESTIONS]
        satisfied = sum(world.satisfaction(text, wanted) for text in own)
        well_formed = sum(world.is_well_formed(text, topic) for text, topic in zip(own, topics, strict=True))
        found.append((satisfied / NUM_QUESTIONS, well_formed / NUM_QUESTIONS))
    return found


def test_served_they_satisfy_nearly_as_the_users_own_words_do(cache, fitted):
    arguments: list[tuple[Mapping[str, str], Mapping[str, Any] | None]] = []
    for i, wanted in enumerate(USERS[1:]):
        persona = persona_of(sliders_of(fitted(i + 1)))
        words = {"pad_preference": world.preference(wanted, random.Random(i)), "pad_reference": "neutral"}
        arguments += [(wanted, None), (wanted, words), (wanted, persona)]
    worker = Worker("v1")
    found = worker.run(satisfaction, cache, arguments)
    worker.close()
    for i in range(0, len(found), 3):
        unguided, words, sliders = found[i : i + 3]
        assert sliders[0] >= words[0] - 0.1, found
        assert sliders[0] >= unguided[0] + 0.25, found
        assert sliders[1] >= words[1] - 0.15, found
