"""Answers that a wish was to change, beside plain ones to the same prompt, as comparisons of users."""

from __future__ import annotations

import random
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pad_vllm.demo import wishes
from pad_vllm.demo.comparisons import FAR, is_sound
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, loops, measures_of
from pad_vllm.demo.recipe import PLAIN

EARLIER = 12
"""Tokens by which an answer that ended early is shorter, at least."""
_LENGTH = DIMENSIONS["length"]
_SENTENCE_END = re.compile(r"[.!?](?=\s)")


@dataclass(frozen=True)
class PlainComparisons:
    """What is compared, and how much of it.

    Attributes:
        max_answer: tokens of an answer that are measured and learned from, the first ones.
        margin: by how many standard deviations of the answers' measure two of a comparison differ.
        num_each: comparisons of each measure, at most, a user's and the opposite user's counted.
        num_looping: in which one answer goes in circles.
        num_ends: of an answer with itself, ended early, at most.
    """

    max_answer: int = 64
    margin: float = 0.7
    num_each: int = 72
    num_looping: int = 24
    num_ends: int = 0
    seed: int = 0


def compare_with_plain(
    answers: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    sizes: PlainComparisons,
    held_out: bool = False,
) -> list[dict[str, Any]]:
    """Comparisons of answers with plain ones to the same prompt: records as ``pad-vllm train`` reads them.

    Every two answers are compared by a user who wants what the one has more of, and by one who wants the opposite; an
    answer that loops never wins.

    Args:
        answers: ``prompt``, ``how``, ``values`` (asked for), ``text``, and whether it has ``finished``.
        held_out: preferences in words that training does not use.
    """
    rng = random.Random(f"{sizes.seed} {held_out}")
    by_prompt: dict[str, list[_Answer]] = defaultdict(list)
    for answer in answers:
        ids = tokenizer.encode(answer["text"], add_special_tokens=False)
        if ids and (answer["finished"] or len(ids) > sizes.max_answer):
            text = tokenizer.decode(ids[: sizes.max_answer])
            sound = is_sound({**answer, "text": text})
            asked = answer["values"][0] if answer["how"] != PLAIN else None
            by_prompt[answer["prompt"]].append(_Answer(text, measures_of(text), asked, sound))
    measured = [one.measures for own in by_prompt.values() for one in own if one.sound]
    spread = {name: statistics.pstdev(m[name] for m in measured) or 1.0 for name in DIMENSIONS}
    records: list[dict[str, Any]] = []
    for name, dimension in DIMENSIONS.items():
        found = sorted(_couples(by_prompt, name, spread, sizes.margin), key=lambda couple: -couple[0])
        for less_is_plain in (True, False):  # as many to learn what is more than usual from as what is less
            own = [couple for couple in found if couple[3].plain == less_is_plain]
            for _, prompt, more, less in own[: max(1, sizes.num_each // 4)]:
                for value, chosen, rejected in ((dimension.more, more, less), (dimension.less, less, more)):
                    records.append(_record(prompt, value, chosen.text, rejected.text, rng, held_out))
    looping = [
        (prompt, one, other)
        for prompt, own in by_prompt.items()
        for one in own
        if loops(one.text)
        for other in own
        if other.sound
    ]
    for prompt, one, other in rng.sample(looping, min(sizes.num_looping, len(looping))):
        value = _suiting(other, one, rng)
        records.append(_record(prompt, value, other.text, one.text, rng, held_out))
    records += _ends(by_prompt, tokenizer, sizes.num_ends, rng, held_out)
    rng.shuffle(records)
    return records


def _ends(
    by_prompt: Mapping[str, Sequence[_Answer]],
    tokenizer: PreTrainedTokenizerBase,
    num_ends: int,
    rng: random.Random,
    held_out: bool,
) -> list[dict[str, Any]]:
    """Answers that are plain, or were to be of another length, each compared with its own beginning up to the end of a
    sentence. The two differ only in where they end: a user of few words wants the beginning, a user of many the whole.
    """
    found = []
    for prompt, own in by_prompt.items():
        for one in (one for one in own if one.sound and one.asked in (None, _LENGTH.less, _LENGTH.more)):
            ends = [match.end() for match in _SENTENCE_END.finditer(one.text)]
            lengths = [len(tokenizer.encode(one.text[:end], add_special_tokens=False)) for end in ends]
            num_tokens = len(tokenizer.encode(one.text, add_special_tokens=False))
            early = [end for end, n in zip(ends, lengths, strict=True) if n <= num_tokens - EARLIER]
            if early:
                found.append((prompt, one.text, one.text[: rng.choice(early)]))
    records = []
    for prompt, more, less in rng.sample(found, min(num_ends // 2, len(found))):
        for value, chosen, rejected in ((_LENGTH.more, more, less), (_LENGTH.less, less, more)):
            records.append(_record(prompt, value, chosen, rejected, rng, held_out))
    return records


@dataclass(frozen=True)
class _Answer:
    text: str
    measures: Mapping[str, float]
    asked: str | None
    """The wish that it was to change for; None of a plain one"""
    sound: bool

    @property
    def plain(self) -> bool:
        return self.asked is None


def _couples(
    by_prompt: Mapping[str, Sequence[_Answer]], name: str, spread: Mapping[str, float], margin: float
) -> Iterator[tuple[float, str, _Answer, _Answer]]:
    """Two sound answers, one of them plain, that differ in a measure and as little as can be otherwise, with how good
    they are to learn from. No answer that is not plain comes twice."""
    for prompt, own in by_prompt.items():
        plain = [one for one in own if one.plain and one.sound]
        for other in (one for one in own if one.sound and not one.plain):
            best = None
            for one in plain:
                apart = {n: (other.measures[n] - one.measures[n]) / spread[n] for n in DIMENSIONS}
                unasked = statistics.mean(min(abs(apart[n]), FAR) for n in DIMENSIONS if n != name)
                good = min(abs(apart[name]), FAR) - unasked
                if abs(apart[name]) >= margin and (best is None or good > best[0]):
                    best = (good, prompt, *((other, one) if apart[name] > 0 else (one, other)))
            if best is not None:
                yield best


def _suiting(one: _Answer, other: _Answer, rng: random.Random) -> str:
    """A value that ``one`` suits no worse than ``other``: circles are not the price of a wish that is met. The one that
    ``other`` was made for, if it can be."""
    suited = [v for v, (n, sign) in DIRECTIONS.items() if sign * (one.measures[n] - other.measures[n]) >= 0]
    return other.asked if other.asked in suited else rng.choice(suited)


def _record(prompt: str, value: str, chosen: str, rejected: str, rng: random.Random, held_out: bool) -> dict[str, Any]:
    name, sign = DIRECTIONS[value]
    return {
        "prompt": prompt,
        "preference": wishes.preference([value], rng, held_out),
        "chosen": chosen,
        "rejected": rejected,
        "labels": {name: sign},
    }
