"""Requests of several preferences, and the neutral reference: the real engine against the oracle, on both runners."""

from __future__ import annotations

import itertools

import pytest

from tests.engine.test_engine import GREEDY, PREFERENCES, PROMPTS
from tests.support.engine import PLUGIN, Engine, guided, pad_config
from tests.support.fixtures import MAX_TOKENS, MIX, Models

TEXTS = ["concise, formal", "Please be playful.", "kind", "in rhymes and with an example", "as a list"]
WEIGHTS: list[tuple[float, ...] | None] = [
    (1.0,),
    None,
    (0.5, 0.5),
    (1.0, -0.5),
    (0.6, 0.2, 0.2, 0.5, -0.3),
    (1.0, -1.0),
    (2.0,),
]
"""None: two preferences without weights."""
REFERENCES = ["base", "neutral", "none"]


@pytest.fixture(scope="module")
def engine(models: Models, runner: str):
    """The server's reference is the neutral one."""
    personas = {"mix": {"preference": TEXTS[:2], "preference_weights": [1.0, -0.5], "reference": "none"}}
    pad = {"reference": "neutral", "personas": personas}
    engine = Engine(runner, models.base, logits_processors=PLUGIN, **pad_config(models.named, **pad))
    yield engine
    engine.close()


def cases(encode, expect, max_tokens: int) -> tuple[list, list, list]:
    """Prompts, parameters and the oracle's answers: lists of 1, 2 and 5 preferences against every reference, with heads
    and without, and among them requests of one context, and of none."""
    prompts, params, expected = [], [], []
    for i, (weights, reference) in enumerate(itertools.product(WEIGHTS, REFERENCES)):
        prompt = encode(PROMPTS[i % len(PROMPTS)])
        texts = TEXTS[: len(weights or (0, 0))]
        head = "mixed" if i % 4 == 3 else None
        rule = {"top_k": 10, "beta": (0.5, 1.0, 1.5)[i % 3], "reference": reference}
        asked = rule | {"preference": texts, **({"preference_weights": list(weights)} if weights else {})}
        asked |= {"weights": list(MIX)} if head else {}
        prompts.append(prompt)
        params.append(GREEDY | {"max_tokens": max_tokens} | guided(**asked))
        answer = expect(prompt, preference=texts, preference_weights=weights, head=head, **rule)
        expected.append(answer[:max_tokens])
        if i % 5 == 0:
            prompts += [prompt] * 3
            plain = {"reference": "base"}
            params += [
                GREEDY | {"max_tokens": max_tokens},
                GREEDY | {"max_tokens": max_tokens} | guided(preference=PREFERENCES[0], **plain),
                GREEDY | {"max_tokens": max_tokens} | guided(weights=list(MIX), **plain),
            ]
            expected += [
                expect(prompt, guided=False)[:max_tokens],
                expect(prompt, preference=PREFERENCES[0])[:max_tokens],
                expect(prompt, head="mixed")[:max_tokens],
            ]
    return prompts, params, expected


def test_lists_and_references_equal_the_oracle_in_one_batch(encode, expect, engine, runner):
    prompts, params, expected = cases(encode, expect, 20 if runner == "v2" else MAX_TOKENS)
    assert engine.generate(prompts, params) == expected
