"""Comparisons of answers that a wish was to change with those that were asked for nothing."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pad_vllm.demo import wishes
from pad_vllm.demo.balance_sizes import Balance
from pad_vllm.demo.comparisons import FAR, is_sound
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, OPPOSITES, loops, measures_of
from pad_vllm.demo.recipe import PLAIN


def compare_with_plain(
    answers: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, sizes: Balance, held_out: bool = False
) -> list[dict[str, Any]]:
    """Comparisons of answers with plain ones to the same prompt: records as ``pad-vllm train`` reads them.

    Every two answers are compared by a user who wants what the one has more of, and by one who wants the opposite;
    answers to two wishes also by a user of both and by one of both opposites. An answer that loops never wins.

    Args:
        held_out: preferences in words that training does not use.
    """
    rng = random.Random(f"{sizes.seed} {held_out}")
    by_prompt: dict[str, list[_Answer]] = defaultdict(list)
    for answer in answers:
        ids = tokenizer.encode(answer["text"], add_special_tokens=False)
        if ids and (answer["finished"] or len(ids) > sizes.max_answer):
            text = tokenizer.decode(ids[: sizes.max_answer])
            sound = is_sound({**answer, "text": text})
            values = tuple(answer["values"])
            by_prompt[answer["prompt"]].append(_Answer(text, measures_of(text), answer["how"] == PLAIN, sound, values))
    measured = [one.measures for own in by_prompt.values() for one in own if one.sound]
    spread = {name: statistics.pstdev(m[name] for m in measured) or 1.0 for name in DIMENSIONS}
    records: list[dict[str, Any]] = []
    for name, dimension in DIMENSIONS.items():
        found = sorted(_couples(by_prompt, name, spread, sizes.margin), key=lambda couple: -couple[0])
        for less_is_plain in (True, False):  # as many to learn what is more than usual from as what is less
            own = [couple for couple in found if couple[3].plain == less_is_plain]
            for _, prompt, more, less in own[: max(1, sizes.num_each // 4)]:
                for value, chosen, rejected in ((dimension.more, more, less), (dimension.less, less, more)):
                    records.append(_record(prompt, [value], chosen.text, rejected.text, rng, held_out))
    combined = list(_combined(by_prompt, spread, sizes.margin))
    for prompt, other, plain in rng.sample(combined, min(sizes.num_combined // 2, len(combined))):
        opposites = tuple(OPPOSITES[value] for value in other.values)
        for values, chosen, rejected in ((other.values, other, plain), (opposites, plain, other)):
            records.append(_record(prompt, values, chosen.text, rejected.text, rng, held_out))
    looping = [
        (prompt, one, other)
        for prompt, own in by_prompt.items()
        for one in own
        if loops(one.text)
        for other in own
        if other.sound
    ]
    for prompt, one, other in rng.sample(looping, min(sizes.num_looping, len(looping))):
        value = _suiting(other, one, spread, rng)
        records.append(_record(prompt, [value], other.text, one.text, rng, held_out))
    rng.shuffle(records)
    return records


@dataclass(frozen=True)
class _Answer:
    text: str
    measures: Mapping[str, float]
    plain: bool
    sound: bool
    values: tuple[str, ...]
    """That were asked for"""


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


def _combined(
    by_prompt: Mapping[str, Sequence[_Answer]], spread: Mapping[str, float], margin: float
) -> Iterator[tuple[str, _Answer, _Answer]]:
    """A sound answer to two wishes and a plain one that has less of both; of several the one that is nearest."""
    for prompt, own in by_prompt.items():
        plain = [one for one in own if one.plain and one.sound]
        for other in (one for one in own if one.sound and len(one.values) == 2):
            found = []
            for one in plain:
                beyond = [
                    sign * (other.measures[name] - one.measures[name]) / spread[name]
                    for name, sign in (DIRECTIONS[value] for value in other.values)
                ]
                if min(beyond) > 0 and max(beyond) >= margin:
                    found.append((sum(beyond), one))
            if found:
                yield prompt, other, min(found, key=lambda two: two[0])[1]


def _suiting(one: _Answer, other: _Answer, spread: Mapping[str, float], rng: random.Random) -> str:
    """A value that ``one`` suits no worse than ``other``: circles are not the price of a wish that is met."""
    suited = [v for v, (n, sign) in DIRECTIONS.items() if sign * (one.measures[n] - other.measures[n]) >= 0]
    return rng.choice(suited)


def _record(
    prompt: str, values: Sequence[str], chosen: str, rejected: str, rng: random.Random, held_out: bool
) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "preference": wishes.preference(values, rng, held_out),
        "chosen": chosen,
        "rejected": rejected,
        "labels": dict(DIRECTIONS[value] for value in values),
    }
