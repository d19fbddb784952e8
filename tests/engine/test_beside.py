"""Other people's logits processors, before and behind PAD, on both runners: the place in the list counts.

What stands before PAD has changed z, and what it masked is no candidate; what stands behind it sees the guided rows.
"""

from __future__ import annotations

import functools

import pytest

from tests.support.engine import Engine, engine_stats, greedy, pad_config
from tests.support.processors import change

pytestmark = pytest.mark.every_release

MAX_TOKENS = 16
PREFERENCE = "concise, formal"
PROCESSORS = ["tests.support.processors:Before", "pad_vllm:PADLogitsProcessor", "tests.support.processors:Behind"]


@pytest.fixture(scope="module")
def engine(models, runner):
    """PAD is registered as an entry point too, which vLLM builds before those that are listed."""
    engine = Engine(runner, models.base, logits_processors=PROCESSORS, **pad_config(models.named))
    yield engine
    engine.close()


def wishes(free: list[int]) -> list[dict]:
    """What others do to rows; ``free``: what is generated without them."""
    elsewhere = next(token for token in range(100, 200) if token not in free)
    return [
        {"mask": sorted(set(free))},
        {"mask": list(range(40, 512))},
        {"bias": dict.fromkeys(free[:6], -6.0) | {elsewhere: 4.0}},
        {"bias": {elsewhere: 50.0}},
        {"force": elsewhere},
    ]


def test_the_place_in_the_list_counts(encode, expect, engine):
    prompt = encode("[Instruction] say why")
    free = expect(prompt, preference=PREFERENCE, max_tokens=MAX_TOKENS)
    asked = [{"preference": PREFERENCE, "beta": beta} for beta in (0.6, 1.0, 1.4)]
    cases = [({}, asked[1])]
    for i, wish in enumerate(wishes(free)):
        cases += [({"Before": wish}, asked[i % 3]), ({"Behind": wish}, asked[(i + 1) % 3])]
    cases += [
        ({"Before": {"mask": free[:3]}, "Behind": {"bias": {free[4]: 3.0}}}, asked[1]),
        ({"Before": {"bias": {9: 5.0}}}, {"preference": PREFERENCE, "reference": "neutral"}),
    ]
    params = [greedy(MAX_TOKENS, **pad) for _, pad in cases]
    for each, (wish, _) in zip(params, cases, strict=True):
        each["extra_args"] = each["extra_args"] | wish
    out = engine.generate([prompt] * len(cases), params)
    for got, (wish, pad) in zip(out, cases, strict=True):
        expected = expect(
            prompt,
            max_tokens=MAX_TOKENS,
            mask=before(repr(wish.get("Before"))),
            behind=behind(repr(wish.get("Behind"))),
            **pad,
        )
        assert got == expected, (wish, pad)
    by_wish = {(*wish, *next(iter(wish.values()))): got for got, (wish, _) in zip(out, cases[1:-2], strict=False)}
    assert len({tuple(got) for got in by_wish.values()}) > 3


@functools.cache  # so that the oracle is asked once for both runners
def before(wish: str):
    return None if wish == "None" else lambda y, output: change(y, eval(wish))


@functools.cache
def behind(wish: str):
    return None if wish == "None" else lambda z: change(z, eval(wish))


def test_beside_bias_and_penalties(encode, expect, engine):
    """A request's own bias and penalties are undone for the reward; another's bias counts as the base model's word."""
    prompt = encode("a")
    wish = {"bias": {7: 2.0, 11: -3.0}, "mask": [9, 10]}
    params = greedy(MAX_TOKENS, preference=PREFERENCE, beta=0.8)
    params |= {"logit_bias": {7: 1.5, 30: 2.0}, "presence_penalty": 0.7}
    params["extra_args"] = params["extra_args"] | {"Before": wish}
    expected = expect(
        prompt,
        preference=PREFERENCE,
        beta=0.8,
        max_tokens=MAX_TOKENS,
        mask=before(repr(wish)),
        logit_bias=((7, 1.5), (30, 2.0)),
        penalties=(0.7, 0.0, 1.0),
    )
    assert engine.generate([prompt], params) == [expected]


def test_pad_runs_once(engine):
    assert engine.call(engine_stats)["copies"] == 1
