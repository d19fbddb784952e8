"""Who the demo answers for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pad_vllm.demo.measures import DIRECTIONS

DEMO_BETA = 1.25
"""Weaker than the reward model's default: some of these users have several preferences, whose weights add up."""


@dataclass(frozen=True)
class User:
    """A user, and what the answers are measured for.

    Attributes:
        what: of this user is worth seeing.
        persona: a request's arguments, without their prefix.
        wants: values of :data:`~pad_vllm.demo.measures.DIRECTIONS`.
    """

    what: str
    persona: Mapping[str, Any]
    wants: tuple[str, ...]

    def has(self, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, bool]:
        """For each measure that is asked for: did it move that way?"""
        return {
            name: sign * (after[name] - before[name]) > 0 for name, sign in (DIRECTIONS[value] for value in self.wants)
        }

    def say(self) -> str:
        """The preference, or the sliders, as text."""
        preference, weights = self.persona["preference"], self.persona.get("preference_weights")
        if weights is None:
            return preference
        return "  ".join(f"{weight:+g} {text}" for weight, text in zip(weights, preference, strict=True))


USERS: dict[str, User] = {
    "Mia": User("a wish for words", {"preference": "Use very simple words."}, ("simple",)),
    "Noor": User(
        "two wishes that training never saw together",
        {"preference": "Keep it short. Be super excited!"},
        ("brief", "emphatic"),
    ),
    "Omar": User("a wish for form", {"preference": "Use bullet points."}, ("list",)),
    "Lena": User(
        "sliders",
        {
            "preference": ["Speak to me directly.", "Be cheerful and warm."],
            "preference_weights": [1.2, 1.0],
        },
        ("personal", "upbeat"),
    ),
    "Kofi": User(
        "a negative preference: less of it",
        {"preference": ["Give me long, detailed answers."], "preference_weights": [-0.5]},
        ("brief",),
    ),
}

DEMO_QUESTIONS = ("Are printed books better than books on a screen?", "How do I get better at chess?")
