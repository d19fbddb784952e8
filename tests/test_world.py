"""The demo's world: the generator and the checker agree, and the held-out combinations stay out."""

import random
from collections import Counter

import pytest

from pad_vllm.demo import world
from pad_vllm.demo.world import DIMENSIONS, HELD_OUT, HELD_OUT_QUESTIONS, STYLES, TOPICS, Style, measure, satisfaction


@pytest.fixture
def rng():
    return random.Random(0)


@pytest.mark.parametrize("style", STYLES, ids="-".join)
def test_checker_reads_the_style_the_generator_wrote(style, rng):
    for topic in TOPICS:
        for _ in range(5):
            text = world.answer(topic, style, rng)
            assert measure(text) == style._asdict(), text


def test_answers_say_what_the_topic_says(rng):
    topic = TOPICS[0]
    detailed = world.answer(topic, Style("detailed", "formal", "direct", "with"), rng)
    assert all(part in detailed for part in (*topic.tips, topic.reason, topic.example))
    concise = world.answer(topic, Style("concise", "formal", "direct", "without"), rng)
    assert sum(tip in concise for tip in topic.tips) == 1
    assert topic.example not in concise


def test_wording_varies(rng):
    assert len({world.answer(TOPICS[0], STYLES[0], rng) for _ in range(100)}) > 20
    assert len({world.sample_pair(rng).question for _ in range(2000)}) == len(TOPICS) * len(world.TRAIN_QUESTIONS)
    assert len({world.preference({"tone": "playful", "example": "with"}, rng) for _ in range(100)}) > 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"length": None, "tone": None, "stance": None, "example": None}),
        ("Water boils.", {"length": "concise", "tone": None, "stance": None, "example": "without"}),
        # Neither short nor long; both tones; both stances.
        ("word " * 24, {"length": None, "tone": None, "stance": None, "example": "without"}),
        ("Furthermore, yay!", {"length": "concise", "tone": None, "stance": None, "example": "without"}),
        ("Maybe always.", {"length": "concise", "tone": None, "stance": None, "example": "without"}),
        # A long example does not make a short answer long.
        ("Go. For example, " + "word " * 40, {"length": "concise", "tone": None, "stance": None, "example": "with"}),
    ],
)
def test_checker_takes_no_side_on_text_that_shows_none(text, expected):
    assert measure(text) == expected


def test_topics_carry_no_style():
    for topic in TOPICS:
        for part in (topic.task, *topic.tips, topic.reason, topic.example):
            measured = measure(part)
            assert (measured["tone"], measured["stance"], measured["example"]) == (None, None, "without"), part


def test_satisfaction_is_the_share_of_wanted_dimensions(rng):
    text = world.answer(TOPICS[3], Style("concise", "playful", "direct", "with"), rng)
    assert satisfaction(text, {"tone": "playful"}) == 1
    assert satisfaction(text, {"tone": "formal"}) == 0
    assert satisfaction(text, {"length": "concise", "tone": "formal", "stance": "direct", "example": "without"}) == 0.5


def test_a_preference_names_what_is_wanted_and_nothing_else(rng):
    words = {**world._ADJECTIVES, **world._EXAMPLE_PHRASES}
    for _ in range(500):
        wanted = world.sample_wanted(rng)
        text = world.preference(wanted, rng)
        named = {value for value, phrases in words.items() if any(phrase in text for phrase in phrases)}
        assert named == set(wanted.values()), text


def test_what_is_held_out():
    style = HELD_OUT[0]._asdict()
    assert world.is_held_out(style)
    three = {dimension: style[dimension] for dimension in ("length", "tone", "stance")}
    assert world.is_held_out(three)
    assert not world.is_held_out({dimension: style[dimension] for dimension in ("length", "tone")})
    assert not world.is_held_out({**three, "tone": "formal"})
    assert len(set(HELD_OUT)) >= 3


def test_training_pairs(rng):
    """Held-out combinations and phrasings never appear; the answers differ in wanted dimensions, often in one."""
    num_flipped = Counter()
    for _ in range(3000):
        pair = world.sample_pair(rng)
        assert not world.is_held_out(pair.wanted)
        assert satisfaction(pair.chosen, pair.wanted) == 1
        chosen, rejected = measure(pair.chosen), measure(pair.rejected)
        assert not any(pair.question.startswith(question.split("{}")[0]) for question in HELD_OUT_QUESTIONS)
        flipped = [dimension for dimension in DIMENSIONS if chosen[dimension] != rejected[dimension]]
        assert set(flipped) <= set(pair.wanted)
        num_flipped[len(flipped)] += 1
    assert set(num_flipped) == {1, 2, 3, 4}
    assert num_flipped[1] > 1000
