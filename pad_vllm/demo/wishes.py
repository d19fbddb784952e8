"""The demo's prompts and preferences: what is asked, and in which words users say how they like it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pad_vllm.demo.measures import DIRECTIONS, OPPOSITES

DATA = Path(__file__).parent / "data"
HELD_OUT_COMBINATIONS = frozenset(
    frozenset(values)
    for values in (
        ("brief", "emphatic"),
        ("simple", "upbeat"),
        ("academic", "list"),
        ("personal", "gloomy"),
        ("detailed", "prose"),
        ("impersonal", "plain"),
    )
)
"""Values that no training preference asks for together."""
FRAMES_OF_THINGS = ("I like {}.", "Give me {}.", "What I want is {}.", "Nothing beats {}.", "{}: that is for me.")
FRAMES_OF_ACTS = ("Please {}.", "{}.", "Could you {}?", "I want you to {}.", "Always {}, for my sake.")


@lru_cache
def _read(name: str) -> Any:
    return json.loads((DATA / f"{name}.json").read_text("utf-8"))


def prompts(held_out: bool = False) -> list[str]:
    return list(_read("prompts")["held_out" if held_out else "train"])


def wordings(value: str, held_out: bool = False) -> list[str]:
    """In which words users ask for a value, such as ``brief``: of training also what they like and what the answer
    shall do, each said in several ways."""
    words = _read("preferences")[value]
    if held_out:
        return list(words["held_out"])
    composed = (
        _sentence(frame, what)
        for frames, name in ((FRAMES_OF_THINGS, "things"), (FRAMES_OF_ACTS, "acts"))
        for what in words[name]
        for frame in frames
    )
    return list(dict.fromkeys([*words["train"], *composed]))


def later_wordings(value: str) -> list[str]:
    """Words from after the rounds for balance. Those rounds did not use them, and they are not held out."""
    return list(_read("preferences")[value]["later"])


def _sentence(frame: str, words: str) -> str:
    sentence = frame.format(words)
    return sentence[0].upper() + sentence[1:]


def preference(values: Sequence[str], rng: random.Random, held_out: bool = False) -> str:
    """A user's text for some values, in words that training used, or in others."""
    return " ".join(rng.choice(wordings(value, held_out)) for value in values)


def combinations(held_out: bool = False, with_opposites: bool = False) -> list[tuple[str, str]]:
    """Two values of different dimensions, in every way that training asked for, or in those that it did not.

    Args:
        with_opposites: for users of these and of the opposite values. Once each; in training none of the two is among
            those held out.
    """
    pairs = [(a, b) for a in DIRECTIONS for b in DIRECTIONS if a < b and DIRECTIONS[a][0] != DIRECTIONS[b][0]]
    chosen = [pair for pair in pairs if (frozenset(pair) in HELD_OUT_COMBINATIONS) == held_out]
    if not with_opposites or held_out:
        return chosen
    both = {frozenset(pair): frozenset(OPPOSITES[value] for value in pair) for pair in chosen}
    return [pair for pair in chosen if both[frozenset(pair)] in both and sorted(pair) < sorted(both[frozenset(pair)])]
