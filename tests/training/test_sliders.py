"""Sliders in the demo's world: what users want who never say it, found among attributes in words."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from benchmarks.alignment import own_record
from pad_vllm.demo import models, world
from pad_vllm.training.sliders import MAX_SLIDERS, fit_sliders, sliders_of

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
def reward() -> str:
    return str(models.build().reward)


def fitted(reward: str, wanted: Mapping[str, str], folder, seed: int = 0):
    """Sliders of a user who made 30 comparisons, and said nothing."""
    rng = random.Random(seed)
    own = models.write_records(folder / "own.jsonl", [own_record(wanted, rng) for _ in range(30)])
    (folder / "attributes.yaml").write_text("".join(f"- {text}\n" for text in ATTRIBUTES.values()))
    return fit_sliders(reward, own, folder / "attributes.yaml")


@pytest.mark.parametrize("wanted", USERS, ids=lambda wanted: "+".join(wanted.values()))
def test_the_largest_sliders_are_what_the_user_wants(wanted, reward, tmp_path):
    found = fitted(reward, wanted, tmp_path)
    assert found.num_comparisons == 30
    assert found.held_out_accuracy >= 0.9
    sliders = sliders_of(found)
    assert len(sliders) <= MAX_SLIDERS < len(ATTRIBUTES)
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
