"""How an explanation's numbers and tokens are shown, on a screen and on a page."""

from __future__ import annotations

import json
import math

from pad_vllm.explain.explaining import ExplainedAnswer, ExplainedToken

NO_TEXT = "◌"
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def readable(text: str) -> str:
    """A model's text without control characters, which a terminal would obey: with their pictures in their place."""
    return text.translate(_PICTURES)


def quoted(text: str) -> str:
    """A token between quotes, its line breaks spelled out; a part of a character has no text."""
    return json.dumps(readable(text) or NO_TEXT, ensure_ascii=False)


def columns(answer: ExplainedAnswer) -> list[str]:
    """Of a table of its tokens."""
    return [
        "said",
        "base's",
        "base's first",
        "its",
        *(["nats", *map(readable, answer.contexts)] if answer.effects else []),
    ]


def cells_of_token(token: ExplainedToken) -> list[str]:
    """What was said and how likely the base model found it; the same of its first choice; what guidance did."""
    effect = [] if token.effect is None else [f"{token.effect.divergence:.3f}", *map(signed, token.effect.rewards)]
    base = percent(token.probability), quoted(token.first_text), percent(token.first_probability)
    return [quoted(token.text), *base, *effect]


def percent(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.001 else f"{probability:.0e}"


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def shade(token: ExplainedToken) -> float:
    """How strongly a token is shaded, in [0, 1]: alike on all answers, by its divergence."""
    return 0.0 if token.effect is None else 1.0 - math.exp(-max(token.effect.divergence, 0.0))


def summary(answer: ExplainedAnswer) -> str:
    """An answer in a line or two."""
    num = len(answer.tokens)
    words = f"{num} token{'' if num == 1 else 's'}"
    others = f"{answer.num_others / max(num, 1):.0%} not the base model's first choice"
    if answer.divergence is None:
        return f"{words}, {others}" if answer.num_others else words
    rewards = "; ".join(
        f"{readable(name)} {signed(value)}" for name, value in zip(answer.contexts, answer.rewards, strict=True)
    )
    return f"{words}, {others}; divergence {answer.divergence:.3f} nats a token. Reward a token: {rewards}"
