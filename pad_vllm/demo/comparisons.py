"""Answers that differ in a measure, as comparisons of users who want more or less of it."""

from __future__ import annotations

import itertools
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from pad_vllm.demo import wishes
from pad_vllm.demo.measures import DIMENSIONS, DIRECTIONS, OPPOSITES, loops, measures_of

WORDINGS_EACH = 3
"""Of how often two answers are compared, at most."""
LONGEST_WORD = 25
"""Letters; a longer one is none ("Mmmm...")."""
FAR = 3.0
"""Standard deviations beyond which two answers do not differ more."""
_MARK = r"[ \t]*(?:[-*•+]|\d{1,2}[.)])"
_EMPTY_ITEM = re.compile(rf"^{_MARK}(?:[ \t]*$|{_MARK}[ \t])", re.MULTILINE)


def compare(
    answers: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    num: int,
    max_answer: int = 64,
    margin: float = 1.0,
    combined: float = 0.2,
    seed: int = 0,
    held_out: bool = False,
) -> list[dict[str, Any]]:
    """Comparisons of users who want one value, or two: records as ``pad-vllm train`` reads them.

    Two answers are compared twice: by a user who wants what the one has more of, and by a user who wants the opposite.
    So nothing but the preference says which was chosen. No answer goes in circles. Of each the first tokens are
    compared, which training reads; one that is shorter has ended there.

    Args:
        answers: ``prompt``, ``text``, and whether it has ``finished``.
        num: of comparisons, about, and at most.
        max_answer: tokens.
        margin: by how many standard deviations of the answers' measure two of a comparison differ.
        combined: share of comparisons in which a user wants two values.
        held_out: preferences in words, and of two values together, that training does not use.
    """
    rng = random.Random(f"{seed} {held_out}")
    by_prompt: dict[str, list[tuple[str, dict[str, float]]]] = defaultdict(list)
    for answer in answers:
        ids = tokenizer.encode(answer["text"], add_special_tokens=False)
        if ids and is_sound(answer) and (answer["finished"] or len(ids) > max_answer):
            text = tokenizer.decode(ids[:max_answer])
            by_prompt[answer["prompt"]].append((text, measures_of(text)))
    found = [m for own in by_prompt.values() for _, m in own]
    spread = {name: statistics.pstdev(m[name] for m in found) or 1.0 for name in DIMENSIONS}

    def couples(values: tuple[str, ...]) -> Iterator[list[dict[str, Any]]]:
        """Of each prompt answers that differ in what these values say, and as little as can be otherwise: the best two
        of every prompt, then others, and all of it again in other words, where it is little."""
        asked = dict(DIRECTIONS[value] for value in values)
        ranked = []
        for prompt, own in by_prompt.items():
            pairs = []
            for (more, m), (less, n) in itertools.permutations(own, 2):
                apart = {name: (m[name] - n[name]) / spread[name] for name in DIMENSIONS}
                wanted = min(sign * apart[name] for name, sign in asked.items())
                unasked = statistics.mean(min(abs(apart[name]), FAR) for name in DIMENSIONS if name not in asked)
                if wanted >= margin:
                    pairs.append((min(wanted, FAR) - unasked, more, less))
            ranked.append([(prompt, more, less) for more, less in _disjoint(sorted(pairs, reverse=True))])
        rng.shuffle(ranked)
        opposite = tuple(OPPOSITES[value] for value in values)
        in_turn = list(filter(None, itertools.chain(*itertools.zip_longest(*ranked))))
        for prompt, more, less in in_turn * WORDINGS_EACH:
            yield [
                {
                    "prompt": prompt,
                    "preference": wishes.preference(users, rng, held_out),
                    "chosen": chosen,
                    "rejected": rejected,
                    "labels": dict(DIRECTIONS[value] for value in users),
                }
                for users, chosen, rejected in ((values, more, less), (opposite, less, more))
            ]

    found_couples: list[list[dict[str, Any]]] = []
    for wants, share in (
        ([(dimension.more,) for dimension in DIMENSIONS.values()], 1 - combined),
        (wishes.combinations(held_out, with_opposites=True), combined),
    ):
        for values in wants:
            found_couples += itertools.islice(couples(values), max(1, round(num * share / len(wants) / 2)))
    rng.shuffle(found_couples)
    return [record for couple in found_couples for record in couple]


def is_sound(answer: Mapping[str, Any]) -> bool:
    """Whether an answer may be someone's choice: it does not go in circles or repeat the question, and is made of
    words and of filled items."""
    text = answer["text"]
    long = any(len(word) > LONGEST_WORD for word in text.split())
    return not (loops(text) or long or _EMPTY_ITEM.search(text) or text.strip() in answer["prompt"])


def _disjoint(pairs: Iterable[tuple[float, str, str]]) -> Iterator[tuple[str, str]]:
    """Of pairs of answers, best first, those whose answers are in none before."""
    taken: set[str] = set()
    for _, one, other in pairs:
        if taken.isdisjoint((one, other)):
            taken |= {one, other}
            yield one, other
