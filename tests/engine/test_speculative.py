"""Speculative decoding on Model Runner V2: every draft is verified by guided logits of its own context."""

from __future__ import annotations

import pytest
from vllm.exceptions import VLLMValidationError

from tests.support.engine import ONE_CONTEXT, PLUGIN, Engine, engine_stats, greedy, metric, pad_config

pytestmark = pytest.mark.every_release

PROMPTS = [
    "You are asked to be concise",
    "The quick brown fox",
    "a",
    "say why " * 20,
    "answer",
    "[Instruction] say why",
]
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
PREFERENCES = ["concise, formal", "Please be playful, and give an example."]


def test_output_is_that_without_drafts(models, encode, expect):
    """Guided and unguided mixed. The drafter is the base model, so guided drafts are accepted and refused by turns; a
    reward pool of one and a quarter contexts makes every step run in groups, and recompute. (With room for all:
    test_no_sync.py.)"""
    engine = Engine(
        "v2",
        models.base,
        logits_processors=PLUGIN,
        disable_log_stats=False,
        speculative_config={
            "method": "draft_model",
            "model": str(models.base),
            "num_speculative_tokens": 5,
        },
        **pad_config(models.named, kv_cache_memory_bytes=ONE_CONTEXT * 5 // 4),
    )
    prompts = [encode(text) for text in PROMPTS]
    more = " more" * 100
    asked = [
        {"preference": f"{i} {PREFERENCES[i % 2]}{more}", "beta": 0.5} if i % 3 else {} for i in range(len(prompts))
    ]
    several = {"preference": [asked[4]["preference"], f"kind{more}"], "preference_weights": [1.0, -0.5], "beta": 0.7}
    asked[4] = several | {"reference": "neutral"}
    params = [greedy(16, **pad) for pad in asked]
    # A row of a draft counts the drafts before it, too. (vLLM refuses logit_bias where there are drafts.)
    penalties = (0.5, 0.6, 1.2)
    controlled = dict(zip(PENALTIES, penalties, strict=True))
    try:
        out = engine.generate(prompts, [greedy(24, **pad) for pad in asked])
        mixed = engine.generate(prompts, [p | controlled if i % 2 else p for i, p in enumerate(params)])
        alone = engine.generate(prompts[1:2], params[1:2])  # every row of the batch guided
        accepted, stats = engine.call(metric, "vllm:spec_decode_num_accepted_tokens"), engine.call(engine_stats)
    finally:
        engine.close()
    assert out == [
        expect(prompt, guided=bool(pad), max_tokens=24, **pad) for prompt, pad in zip(prompts, asked, strict=True)
    ]
    assert mixed == [
        expect(prompt, guided=bool(pad), max_tokens=16, **pad, **({"penalties": penalties} if i % 2 else {}))
        for i, (prompt, pad) in enumerate(zip(prompts, asked, strict=True))
    ]
    assert alone == [out[1][:16]]
    assert accepted > 0
    assert stats["evicted"] > 0
    assert stats["blocks"] == stats["free_blocks"] + stats["held_blocks"]


@pytest.mark.one_release
@pytest.mark.parametrize("default_persona", [None, "house"])
def test_v1_never_drops_guidance_in_silence(models, encode, default_persona):
    """V1 with drafts builds no logits processor that is only registered: guidance is refused at admission."""
    pad = {"personas": {"house": {"preference": "concise"}}, "default_persona": default_persona}
    draft = {"model": str(models.base), "num_speculative_tokens": 3, "method": "draft_model"}
    engine = Engine("v1", models.base, speculative_config=draft, **pad_config(models.reward, **pad))
    try:
        with pytest.raises(VLLMValidationError, match="no engine has announced PAD guidance"):
            engine.generate([encode("a")], greedy(4, preference="formal"))
        if default_persona:
            with pytest.raises(VLLMValidationError, match=r"this server must guide every request .* V1 runner drops"):
                engine.generate([encode("a")], greedy(4))
        else:
            assert len(engine.generate([encode("a")], greedy(4))[0]) == 4
    finally:
        engine.close()
