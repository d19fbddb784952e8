"""Random malformed guidance, of every kind that a client could send; each set must be refused."""

from __future__ import annotations

import random
import string
from typing import Any

from pad_vllm.checks import MAX_WEIGHT
from pad_vllm.params import MAX_BETA, MAX_DIVERGENCE, MAX_PREFERENCE_CHARS

GOOD = {"pad_preference": "concise", "pad_beta": 1.0, "pad_top_k": 5}
"""A good set on any server; one of its members is spoiled."""


def malformed(rng: random.Random, num_heads: int, max_top_k: int) -> dict[str, Any]:
    """Arguments of which at least one is wrong, as ``vllm_xargs`` could carry them: text, numbers, lists of them."""
    good = {key: value for key, value in GOOD.items() if rng.random() < 0.5}
    kinds = [_unknown_key, _bad_text, _bad_beta, _bad_top_k, _bad_weights, _bad_persona, _bad_mix, _bad_salt]
    kind = rng.choice([*kinds, _bad_bound])
    return good | kind(rng, num_heads, max_top_k)


def _unknown_key(rng: random.Random, *_: int) -> dict[str, Any]:
    known = ["preference", "persona", "weights", "beta", "top_k", "preference_weights", "reference", "cache_salt"]
    known += ["max_divergence", "trace"]
    key = list("pad_" + rng.choice(known))
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(4, len(key) + 1)
        key[at:at] = rng.choice(string.ascii_lowercase + "_-0 ")
    name = "".join(key)
    name = rng.choice([name, name.upper(), name.replace("_", "-", 1), "pad_", "PAD-beta", "Pad_Preference"])
    return {name: rng.choice([1, 0.5, "concise", [1.0]])}


def _bad_text(rng: random.Random, *_: int) -> dict[str, Any]:
    return {
        "pad_preference": rng.choice(
            [
                "",
                " \n\t " * rng.randint(1, 9),
                rng.randint(-9, 9),
                rng.random(),
                ["a", rng.choice(["", 1, ["b"], None])],
                ["a"] * rng.randint(9, 30),
                [],
                ["some tokens, but many of them together " * 40] * 8,
                "x" * (MAX_PREFERENCE_CHARS + rng.randint(1, 999)),
                "many more tokens than there is room for " * rng.randint(300, 700),
                "a lone \ud800 surrogate",
            ]
        )
    }


def _bad_number(rng: random.Random) -> Any:
    return rng.choice(["1", "", "nan", "high", [], [1], ["1"], float("nan"), float("inf"), -float("inf"), "1e3", "ab"])


def _bad_beta(rng: random.Random, *_: int) -> dict[str, Any]:
    numbers = [
        -rng.random() - 1e-6,
        MAX_BETA + rng.random() + 1e-3,
        -rng.randint(1, 10**9),
        10.0 ** rng.randint(3, 300),
    ]
    return {"pad_beta": rng.choice([rng.choice(numbers), _bad_number(rng)])}


def _bad_bound(rng: random.Random, *_: int) -> dict[str, Any]:
    numbers = [-rng.random() - 1e-6, MAX_DIVERGENCE + rng.random() + 1e-3, 10.0 ** rng.randint(4, 300)]
    return {"pad_max_divergence": rng.choice([rng.choice(numbers), _bad_number(rng)])}


def _bad_top_k(rng: random.Random, _: int, max_top_k: int) -> dict[str, Any]:
    numbers = [0, -rng.randint(1, 10**9), max_top_k + rng.randint(1, 10**9), rng.uniform(1, 5), 10**18]
    return {"pad_top_k": rng.choice([rng.choice(numbers), _bad_number(rng)])}


def _bad_weights(rng: random.Random, num_heads: int, _: int) -> dict[str, Any]:
    weights: Any = [rng.uniform(-2, 2) for _ in range(max(num_heads, 1))]
    if rng.random() < 0.3:
        return {"pad_weights": rng.choice([1, 0.5, "1", "[1, 2, 3]", []])}
    if rng.random() < 0.5 or not num_heads:
        return {"pad_weights": weights * rng.randint(2, 9) if num_heads else weights}
    weights[rng.randrange(len(weights))] = rng.choice(["1", "x", float("nan"), float("inf"), 1.01 * MAX_WEIGHT, -1e300])
    return {"pad_weights": weights}


def _bad_mix(rng: random.Random, *_: int) -> dict[str, Any]:
    """Of preferences, or of what they are held against."""
    wrong = [[1.0], [1, 2, 3], [], "1", "[1, 2]", 0.5, [1, "x"], [1, float("nan")], [[1], [2]], [1e5, 1], {"a": 1}]
    return rng.choice(
        [
            {"pad_preference": ["a", "b"], "pad_preference_weights": rng.choice(wrong)},
            {"pad_preference_weights": [0.5, 0.5]},
            {"pad_reference": rng.choice(["Base", "bse", "", " ", 1, 0.5, ["base"], "neutral ", "false"])},
        ]
    )


def _bad_salt(rng: random.Random, *_: int) -> dict[str, Any]:
    """Or an id for traces, of which the same is allowed."""
    value = rng.choice(["", " ", 1, 0.5, ["a"], "x" * rng.randint(129, 999), "\ud800"])
    return {rng.choice(["pad_cache_salt", "pad_trace"]): value}


def _bad_persona(rng: random.Random, *_: int) -> dict[str, Any]:
    name = "".join(rng.choices(string.printable, k=rng.randint(1, 30)))
    paths = ["../../etc/passwd", "/root", "terse ", "Terse", "ters", "https://example.com/model", "", 7, ["terse"], 0.0]
    return {"pad_persona": rng.choice([f"{name}!", rng.choice(paths)])}
