"""What steps launch on Model Runner V2, counted in Triton's interpreter.

No request compiles a kernel: whatever is asked, in batches of whatever size, launches what the start has launched.
(In the interpreter nothing is compiled; ``tests/support/variants.py`` says what a GPU would compile.) And a step
launches little beside the reward model's forwards.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.support import operations, variants
from tests.support.engine import PLUGIN, Engine, guided, pad_config
from tests.support.fixtures import MIX
from tests.support.pairs import Kind, TokenPair

TOP_K = (1, 2, 10, 16, 17, 40, 64)
"""Of which an engine whose kernels are slow here takes those up to its most."""
ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"preference": "formal"},
    {"preference": ["formal", "kind"], "preference_weights": [1, -0.5]},
    {"preference": ["formal", "kind", "brief"], "reference": "none"},
    {"preference": "kind", "reference": "neutral"},
    {"preference": ["formal", "kind"], "reference": "neutral", "max_divergence": 0.1},
    {"weights": list(MIX)},
    {"weights": list(MIX), "preference": ["formal", "kind"]},
)
CONTROLS: tuple[dict[str, Any], ...] = ({}, {"logit_bias": {7: 2.0}}, {"repetition_penalty": 1.2})
BATCHES = (2, 3, 18)
"""Kernels may be compiled apart for few rows, and for many."""
NUM_DRAFTS = 4


def requests(rng: random.Random, num: int, most: int, controls: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """Of every kind, some of them unguided, some sampled."""
    params, top_k = [], [k for k in TOP_K if k <= most]
    for i in range(num):
        asked = guided(top_k=rng.choice(top_k), **rng.choice(ASKED)) if rng.random() < 0.9 else {}
        asked |= rng.choice(controls) | {"temperature": rng.choice([0.0, 0.8]), "seed": i}
        params.append({"max_tokens": rng.choice([2, 3, 4]), "ignore_eos": True} | asked)
    return params


def held(engine: Engine, prompt: list[int], most: int, batches: tuple[int, ...], drafts: bool) -> None:
    """Requests of each kind alone, at the least and the most k, and batches of all kinds launch nothing new."""
    at_start, rng = engine.call(variants.take), random.Random(0)
    controls = tuple(one for one in CONTROLS if not drafts or "logit_bias" not in one)  # vLLM refuses it there
    for asked in ASKED:
        for top_k in (1, most):
            alone = {"max_tokens": 2, "ignore_eos": True, "temperature": 0.8} | rng.choice(controls)
            engine.generate([prompt], alone | guided(top_k=top_k, **asked))
    for num in batches:
        engine.generate([prompt] * num, requests(rng, num, most, controls))
    in_requests = engine.call(variants.take)
    assert len(in_requests) > 10
    assert [variant for variant in in_requests if variant not in at_start] == []


@pytest.fixture(scope="module", params=[0, NUM_DRAFTS], ids=["", "drafts"])
def engine(models, request):
    speculative = {"method": "draft_model", "model": str(models.named), "num_speculative_tokens": request.param}
    engine = Engine(
        "v2",
        models.base,
        kernels="triton",
        before=variants.record,
        max_num_seqs=max(BATCHES),
        logits_processors=PLUGIN,
        **({"speculative_config": speculative} if request.param else {}),
        **pad_config(models.named, dtype="bfloat16"),
    )
    engine.drafts = request.param > 0
    yield engine
    engine.close()


@pytest.mark.one_release
def test_requests_launch_what_the_start_compiled(encode, engine):
    held(engine, encode("say why"), 64, BATCHES, engine.drafts)


@pytest.mark.one_release
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_step_launches_little(encode, engine, temperature):
    """Beside forwards; between two steps in which contexts get blocks. With drafts both verification and drafting."""
    asked = {"max_tokens": 60, "ignore_eos": True, "temperature": temperature} | guided(preference="formal")
    steps = engine.call(operations.count, asked, [encode("say why")] * 2, 7)
    usual = sorted(steps, key=len)[len(steps) // 2]
    assert len(usual) <= (40 if engine.drafts else 6), usual
    assert {"select_kernel", "score_kernel"} <= set(usual)


@pytest.mark.weekly
@pytest.mark.one_release
def test_requests_launch_what_the_start_compiled_for_another_tokenizer(tmp_path):
    pair = TokenPair(tmp_path, Kind("byte-level", 2000), Kind("byte-level", 600))
    speculative = {"method": "draft_model", "model": str(pair.reward), "num_speculative_tokens": NUM_DRAFTS}
    engine = Engine(
        "v2",
        pair.base,
        kernels="triton",
        before=variants.record,
        max_num_seqs=2,
        logits_processors=PLUGIN,
        speculative_config=speculative | {"use_heterogeneous_vocab": True},
        **pad_config(pair.reward, dtype="bfloat16", max_top_k=17),
    )
    try:
        held(engine, pair.prompt("say why"), 17, BATCHES[:1], drafts=True)
    finally:
        engine.close()
