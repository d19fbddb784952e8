"""A reward model with fewer positions than the engine's longest request: two flags are enough, whatever they name."""

from __future__ import annotations

import json
import shutil

import pytest
from vllm.exceptions import VLLMValidationError

from tests.support.engine import PLUGIN, Engine, greedy, pad_config

POSITIONS = 96
LONG, END = 120, 1
"""Tokens asked for; what ends a request."""
FULL = [
    {"preference": "formal", "beta": 0.5},
    {"preference": ["kind", "a playful and detailed answer"], "preference_weights": [1, -0.5]},
    {"preference": "concise", "reference": "neutral"},
    {"beta": 1.5},
]


@pytest.fixture(scope="module")
def short(models, tmp_path_factory):
    """The tests' reward model, with fewer positions: what it says at these is the same."""
    path = tmp_path_factory.mktemp("short") / "reward"
    shutil.copytree(models.reward, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    return path


@pytest.fixture(scope="module", params=["v1", "v2", "v2 drafts"])
def engine(request, models, short):
    runner, *drafts = request.param.split()
    settings = {}
    if drafts:
        settings["speculative_config"] = {"method": "draft_model", "model": str(short), "num_speculative_tokens": 3}
    engine = Engine(runner, models.base, logits_processors=PLUGIN, **settings, **pad_config(short))
    yield engine
    engine.close()


def room(compose, prompt: list[int], preference=(), **_) -> int:
    """Tokens that a request may generate by its longest context; the last one has no place in it, and needs none."""
    texts = [preference] if isinstance(preference, str) else preference
    return POSITIONS - max([len(compose(prompt, text)) for text in texts] or [len(prompt)]) + 1


def test_a_full_context_ends_its_request_and_no_other(engine, encode, expect, compose):
    """With one context, with several, and with none but the base's own; beside requests that have room, or are not
    guided. What goes on all the same is its end token."""
    prompt = encode("You are asked to be")
    expected = []
    for asked in FULL:
        n = room(compose, prompt, **asked)
        assert n < LONG
        expected.append([*expect(prompt, max_tokens=n, **asked), *[END] * (LONG - n)])
    beside = {"preference": "formal", "beta": 0.5}
    expected += [expect(prompt, max_tokens=20, **beside), expect(prompt, max_tokens=LONG, guided=False)]
    params = [greedy(LONG, **asked) for asked in FULL] + [greedy(20, **beside), greedy(LONG)]
    assert engine.generate([prompt] * len(params), params) == expected
    ending = greedy(LONG, **FULL[0]) | {"ignore_eos": False}
    n = room(compose, prompt, **FULL[0])
    assert engine.generate([prompt], ending) == [[*expect(prompt, max_tokens=n, **FULL[0]), END]]


def test_a_prompt_that_cannot_fit_is_refused(engine, encode, expect, compose):
    """By how much; one that just fits gets its one token."""
    preference = "formal"
    prompt = encode("a" * 200)
    prompt = prompt[: POSITIONS - (len(compose(prompt, preference)) - len(prompt))]
    out = engine.generate([prompt], greedy(2, preference=preference))
    assert out == [[*expect(prompt, preference=preference, max_tokens=1), END]]
    with pytest.raises(VLLMValidationError, match=f"1 more than the reward model's {POSITIONS} positions"):
        engine.generate([[*prompt, 9]], greedy(2, preference=preference))
