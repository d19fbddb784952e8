"""What is measured of an English answer, on answers where it can be seen."""

from __future__ import annotations

import pytest

from pad_vllm.demo import wishes
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, loops, measures_of

PAIRS = {
    "grade": (
        "The sun is hot. It is a big ball of gas. We see its light.",
        "Thermonuclear fusion of hydrogen nuclei in the stellar interior constantly liberates electromagnetic energy.",
    ),
    "sentiment": (
        "Sadly, this is a terrible idea. It will hurt people, and they will hate it.",
        "What a lovely idea. It will help people, and they will love it.",
    ),
    "length": ("Water them.", "Water them in the morning, before the sun is high, and never let the soil dry out."),
    "lists": ("Buy eggs and milk.\nThen bake.", "Shopping:\n- eggs\n* milk\n1. flour\n2) sugar"),
    "person": ("People water plants in the morning.", "You water your plants yourself in the morning."),
    "emphasis": ("This is a good day.", "This is a very good day! It is absolutely amazing!"),
}


@pytest.mark.parametrize("name", DIMENSIONS)
def test_more_is_more(name):
    less, more = (measures_of(text)[name] for text in PAIRS[name])
    assert less < more


def test_units():
    found = measures_of("You like it!\n\n- You do.")
    assert found["length"] == 5
    assert found["lists"] == 50
    assert found["person"] == 40
    assert found["emphasis"] == 20
    assert measures_of("You like it!!!")["emphasis"] == measures_of("You like it!")["emphasis"]
    assert set(measures_of("")) == set(DIMENSIONS)
    assert set(measures_of("").values()) == {0.0}


def test_an_item_of_a_list_is_a_sentence():
    """Else a list would be one long sentence, of a very learned writer."""
    items = [f"{n}. wash the {thing} in warm water" for n, thing in enumerate(("cup", "plate", "bowl", "pan"), 1)]
    assert measures_of("\n".join(items))["grade"] < 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I am still here. " * 4, True),
        ("- Go to the shop.\n" * 3, True),
        ("Yes" + "!" * 10, True),
        ("So good! \U0001f60e! " + "\U0001f60e " * 10, True),
        ("| a | b |\n|-------------|-------------|", False),
        ("One day a bird came to the window. It sang, and it flew away.", False),
        ("", False),
    ],
)
def test_loops(text, expected):
    assert loops(text) == expected


def test_what_is_held_out_stays_out():
    train, held_out = wishes.prompts(), wishes.prompts(held_out=True)
    assert len(train) + len(held_out) >= 400
    assert not set(train) & set(held_out)
    for value in DIRECTIONS:
        words, other_words = wishes.wordings(value), wishes.wordings(value, held_out=True)
        assert len(set(words)) == len(words) >= 10
        assert len(set(other_words)) == len(other_words) >= 5
        assert not set(words) & set(other_words)
    seen, unseen = wishes.combinations(), wishes.combinations(held_out=True)
    assert len(unseen) == len(wishes.HELD_OUT_COMBINATIONS)
    assert not set(seen) & set(unseen)
    for a, b in (*seen, *unseen):
        assert DIRECTIONS[a][0] != DIRECTIONS[b][0]
