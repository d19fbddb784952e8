"""Whether an answer takes up its question, and whether it refuses."""

from __future__ import annotations

import pytest

from benchmarks.language_task import content_words, refuses, share_taken_up


@pytest.mark.parametrize(
    ("question", "answer", "share"),
    [
        ("How does a caterpillar become a butterfly?", "Caterpillars turn into butterflies.", 2 / 3),
        ("Why do jeans fade after many washes?", "Washing fades the color of your jeans.", 1.0),
        ("Explain what a melody is.", "Bread is baked in an oven.", 0.0),
        ("Why not?", "Because.", 1.0),
    ],
)
def test_words_are_taken_up_in_any_form(question, answer, share):
    assert share_taken_up(question, answer) == pytest.approx(share)


def test_how_something_is_asked_says_nothing_of_it():
    assert content_words("Can you explain what Saturn\u2019s rings are?") == content_words("Saturn ring")


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("I\u2019m sorry, but I cannot help with that.", True),
        ("As an AI language model, I have no taste.", True),
        ("I can't provide a list.", True),
        ("Saying that you are sorry helps.", False),
        ("I can't wait to tell you! " + "Jeans are blue. " * 20 + "I'm sorry.", False),
    ],
)
def test_refusals_stand_at_the_start(answer, found):
    assert refuses(answer) == found
