"""Whether an answer still answers its question, as far as words show it."""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_ENDINGS = ("ings", "ing", "ies", "es", "ed", "s", "y", "e")
_SHORTEST_STEM = 4
_EMPTY = """
a about after again all am an and any are as at be because been before being best better between both but by can could
describe did do does doing down each every explain few for from get give had has have having help her here him his how i
if in into is it its just let like list make many may me mean means might more most much must my name need no not of off
on once one only or other our out over own put recommend same say shall she should so some such suggest take tell than
that the their them then there these they thing things this those through to too under until up us use used want was way
ways we were what when where which while who whom whose why will with without word words would write you your
"""
"""Words that say how something is asked, and nothing of what is asked about."""
_REFUSAL = re.compile(
    r"\bi(?:'m| am) (?:sorry|unable|not able|(?:just )?an? (?:ai|language))\b|\bi apologi[sz]e\b|"
    r"\bi (?:can't|cannot|can not|won't) (?:help|assist|answer|provide|do|write|tell|give|fulfill)\b|"
    r"\bas an? (?:ai|(?:large )?language model)\b|\bi don't have (?:the ability|access|personal)\b"
)
_WHERE_REFUSED = 160
"""Letters at an answer's start, where one that refuses says so."""


def content_words(text: str) -> set[str]:
    """Stems of the words that say what a text is about."""
    words = {word for word in _WORD.findall(_plain(text)) if len(word) > 2}
    return {_stem(word) for word in words.difference(_EMPTY.split())}


def share_taken_up(question: str, answer: str) -> float:
    """Of the question's content words the share that the answer has, in any form; 1 where there are none."""
    asked = content_words(question)
    return len(asked & content_words(answer)) / len(asked) if asked else 1.0


def refuses(answer: str) -> bool:
    """Whether an answer begins by saying that it gives none."""
    return _REFUSAL.search(_plain(answer[:_WHERE_REFUSED])) is not None


def _plain(text: str) -> str:
    return text.lower().replace("\u2019", "'")


def _stem(word: str) -> str:
    word = word.removesuffix("'s")
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= _SHORTEST_STEM:
            stem = word[: -len(ending)]
            # "running", "stopped"
            return stem[:-1] if len(stem) > _SHORTEST_STEM and stem[-1] == stem[-2] else stem
    return word
