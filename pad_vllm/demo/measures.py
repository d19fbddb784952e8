"""What can be measured of an English answer, and what a preference asks of it.

Reading grade and sentiment are other people's (textstat, vaderSentiment); the rest is counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple


class Dimension(NamedTuple):
    """A measure, its unit, and the preferences for less and for more of it."""

    unit: str
    less: str
    more: str


DIMENSIONS = {
    "grade": Dimension("school grades (Flesch-Kincaid)", "simple", "academic"),
    "sentiment": Dimension("VADER compound, -1 to 1, mean over sentences", "gloomy", "upbeat"),
    "length": Dimension("words", "brief", "detailed"),
    "lists": Dimension("% of lines that are list items", "prose", "list"),
    "person": Dimension("second person pronouns in 100 words", "impersonal", "personal"),
    "emphasis": Dimension("exclamation marks and intensifiers in 100 words", "plain", "emphatic"),
}
DIRECTIONS: Mapping[str, tuple[str, int]] = {
    value: (name, sign)
    for name, dimension in DIMENSIONS.items()
    for value, sign in ((dimension.less, -1), (dimension.more, 1))
}
"""Value -> its dimension, and whether it is for more (1) or less (-1) of it."""

OPPOSITES: Mapping[str, str] = {d.less: d.more for d in DIMENSIONS.values()} | {
    d.more: d.less for d in DIMENSIONS.values()
}

_ITEM = re.compile(r"\s*(?:[-*•+]|\d{1,2}[.)])\s+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_EXCLAMATIONS = re.compile("!+")
_SAME_SIGN = re.compile(r"([^\w\s-])(?:\s*\1){9}")
_NO_WORDS = re.compile(r"(?:[^\w\s-]|[\d_])(?:[\s-]*(?:[^\w\s-]|[\d_])){29}")
_SECOND_PERSON = re.compile(r"\b(?:you|your|yours|yourself|yourselves)\b", re.IGNORECASE)
_INTENSIFIERS = re.compile(
    r"\b(?:very|really|absolutely|truly|totally|incredibly|extremely|definitely|amazing|amazingly|wonderful|fantastic|"
    r"awesome|incredible|perfect|perfectly)\b",
    re.IGNORECASE,
)
LOOP_WORDS, LOOP_TIMES = 4, 4


def measures_of(text: str) -> dict[str, float]:
    """Each dimension's measure of an answer, in its unit."""
    lines = [line for line in text.splitlines() if line.strip()]
    words = _WORD.findall(text)
    hundreds = max(len(words), 1) / 100
    return {
        "grade": _grade(lines),
        "sentiment": _sentiment(text),
        "length": float(len(words)),
        "lists": 100 * sum(_ITEM.match(line) is not None for line in lines) / max(len(lines), 1),
        "person": len(_SECOND_PERSON.findall(text)) / hundreds,
        "emphasis": (len(_EXCLAMATIONS.findall(text)) + len(_INTENSIFIERS.findall(text))) / hundreds,
    }


def loops(text: str) -> bool:
    """Whether an answer goes in circles: some four words come four times, or a line three times, or a sign ten times in
    a row, or thirty signs and digits without a word."""
    words = [word.lower() for word in _WORD.findall(text)]
    grams = Counter(tuple(words[i : i + LOOP_WORDS]) for i in range(len(words) - LOOP_WORDS + 1))
    lines = Counter(line.strip().lower() for line in text.splitlines() if len(line.split()) > 2)
    return (
        max(grams.values(), default=0) >= LOOP_TIMES
        or max(lines.values(), default=0) >= 3
        or _SAME_SIGN.search(text) is not None
        or _NO_WORDS.search(text) is not None
    )


def _grade(lines: list[str]) -> float:
    import textstat

    # An item of a list is a sentence, whether or not it ends like one.
    sentences = [_ITEM.sub("", line).strip() for line in lines]
    text = " ".join(s if s[-1:] in ".!?" else f"{s}." for s in sentences if s)
    return float(textstat.flesch_kincaid_grade(text)) if _WORD.search(text) else 0.0


@lru_cache(maxsize=1)
def _analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def _sentiment(text: str) -> float:
    sentences = [s for s in _SENTENCE_END.split(text) if _WORD.search(s)]
    scores = [_analyzer().polarity_scores(s)["compound"] for s in sentences]
    return sum(scores) / max(len(scores), 1)
