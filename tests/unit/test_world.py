"""The synthetic world: the generator and the checker agree, and what is held out stays out."""

import random
from collections import Counter

import pytest

from pad_vllm.synthetic import world
from pad_vllm.synthetic.world import DIMENSIONS, HELD_OUT_QUESTIONS, STYLES, TOPICS, Style, measure, satisfaction


@pytest.fixture
def rng():
    return random.Random(0)


@pytest.mark.parametrize("style", STYLES, ids="-".join)
def test_checker_reads_the_style_the_generator_wrote(style, rng):
    for topic in TOPICS:
        for _ in range(5):
            text = world.answer(topic, style, rng)
            assert measure(text) == style._asdict(), text
            assert world.is_well_formed(text, topic)


def test_answers_say_what_the_topic_says(rng):
    topic = TOPICS[0]
    detailed = world.answer(topic, Style("detailed", "formal", "direct", "example", "restating", "neutral"), rng)
    assert all(part in detailed for part in (*topic.tips, topic.reason, topic.example))
    concise = world.answer(topic, Style("concise", "formal", "direct", "no example", "restating", "neutral"), rng)
    assert sum(tip in concise for tip in topic.tips) == 1
    assert topic.example not in concise


def test_wording_varies(rng):
    assert len({world.answer(TOPICS[0], STYLES[0], rng) for _ in range(100)}) > 20
    questions = {world.sample_pair(rng).question for _ in range(4000)}
    assert len(questions) == len(world.TRAIN_TOPICS) * len(world.TRAIN_QUESTIONS)
    assert len({world.preference({"tone": "playful", "example": "example"}, rng) for _ in range(100)}) > 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("Water boils.", {"length": "concise"}),
        ("word " * 24, {}),  # neither short nor long
        ("Furthermore, yay!", {"length": "concise"}),  # both tones
        ("Maybe always.", {"length": "concise"}),  # both stances
        # A long example does not make a short answer long.
        ("Go. For example, " + "word " * 40, {"length": "concise", "example": "example"}),
        ("Go. So you want to go on?", {"length": "concise", "restatement": "restating"}),
    ],
)
def test_checker_takes_no_side_on_text_that_shows_none(text, expected):
    absent = {"example": "no example", "restatement": "immediate", "encouragement": "neutral"} if text else {}
    assert measure(text) == dict.fromkeys(DIMENSIONS) | absent | expected


def test_topics_carry_no_style():
    for topic in TOPICS:
        for part in (topic.task, *topic.tips, topic.reason, topic.example):
            measured = measure(part)
            assert (measured["tone"], measured["stance"]) == (None, None), part
            assert (measured["example"], measured["restatement"]) == ("no example", "immediate"), part
            assert measured["encouragement"] == "neutral", part


def test_satisfaction_is_the_share_of_wanted_dimensions(rng):
    text = world.answer(TOPICS[3], Style("concise", "playful", "direct", "example", "restating", "neutral"), rng)
    assert satisfaction(text, {"tone": "playful"}) == 1
    assert satisfaction(text, {"tone": "formal"}) == 0
    assert (
        satisfaction(text, {"length": "concise", "tone": "formal", "stance": "direct", "example": "no example"}) == 0.5
    )


def test_a_preference_names_what_is_wanted_and_nothing_else(rng):
    words = {**world._ADJECTIVES, **world._PHRASES}
    for i in range(1000):
        held_out = i % 2 == 0
        wanted = world.sample_wanted(rng, held_out)
        text = world.preference(wanted, rng, held_out)
        known = {value: phrases[-1:] if held_out else phrases[:-1] for value, phrases in words.items()}
        assert {value for value, phrases in known.items() if any(p in text for p in phrases)} == set(wanted.values())
        others = {value: phrases[:-1] if held_out else phrases[-1:] for value, phrases in words.items()}
        assert not any(p in text for phrases in others.values() for p in phrases), text
        assert world.is_held_out(wanted) == held_out


def test_what_is_held_out():
    assert world.is_held_out({"tone": "playful", "restatement": "restating"})
    assert world.is_held_out({"length": "concise", "tone": "formal", "stance": "direct"})
    assert not world.is_held_out({"length": "concise", "tone": "formal", "example": "example"})
    assert len(world.HELD_OUT_TOPICS) == 8
    assert not set(world.HELD_OUT_TOPICS) & set(world.TRAIN_TOPICS)
    assert not set(HELD_OUT_QUESTIONS) & set(world.TRAIN_QUESTIONS)


@pytest.mark.parametrize("held_out", [False, True])
def test_pairs(held_out, rng):
    """What is held out never appears in training; the answers differ in wanted dimensions, often in one."""
    num_flipped = Counter()
    for _ in range(3000):
        pair = world.sample_pair(rng, held_out)
        assert world.is_held_out(pair.wanted) == held_out
        assert (pair.topic in world.HELD_OUT_TOPICS) == held_out
        assert any(pair.question == q.format(pair.topic.task) for q in HELD_OUT_QUESTIONS) == held_out
        assert satisfaction(pair.chosen, pair.wanted) == 1
        chosen, rejected = measure(pair.chosen), measure(pair.rejected)
        flipped = [dimension for dimension in DIMENSIONS if chosen[dimension] != rejected[dimension]]
        assert set(flipped) <= set(pair.wanted)
        assert pair.labels == {DIMENSIONS[d][0]: 1 if chosen[d] == DIMENSIONS[d][0] else -1 for d in flipped}
        num_flipped[len(flipped)] += 1
    assert set(num_flipped) == ({1, 2, 3, 4} if held_out else {1, 2, 3})
    assert num_flipped[1] > 1000


@pytest.mark.parametrize(
    ("change", "well_formed"),
    [
        (lambda text: text, True),
        (lambda text: text.upper(), False),
        (lambda text: text.rsplit(" ", 1)[0], False),
        (lambda text: text + " and", False),
        (lambda text: text.replace(TOPICS[0].reason, TOPICS[1].reason), False),
        (lambda text: " ".join(reversed(text.split(". "))), False),
    ],
)
def test_well_formed_answers_are_whole_and_about_the_topic(change, well_formed, rng):
    text = world.answer(TOPICS[0], Style("detailed", "formal", "direct", "example", "restating", "encouraging"), rng)
    assert world.is_well_formed(change(text), TOPICS[0]) == well_formed
    assert not world.is_well_formed(text, TOPICS[1])


def test_an_answer_of_mixed_styles_is_well_formed():
    text = "Thank you for asking. Just hang a feeder in a quiet spot! No promises, though!"
    assert world.is_well_formed(text, next(topic for topic in TOPICS if topic.task == "attract garden birds"))
