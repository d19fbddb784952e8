"""Reward models whose output head is not called ``lm_head``, soft caps and scales: each against the oracle."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from tests import oracle
from tests.support.engine import PLUGIN, Engine, greedy, pad_config
from tests.support.models import make_model

TIED = {"tie_word_embeddings": True, "head_dim": 32}
GEMMA = TIED | {"pad_token_id": 2, "query_pre_attn_scalar": 32, "final_logit_softcapping": 6.0}
ARCHITECTURES = {
    "gemma2": GEMMA | {"attn_logit_softcapping": 50.0, "sliding_window": 64},
    "gemma3n_text": GEMMA
    | {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 64,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 512,
        "laurel_rank": 8,
    },
    "cohere": TIED | {"logit_scale": 0.3, "pad_token_id": 2},
    "cohere2": TIED | {"logit_scale": 0.3, "pad_token_id": 2, "sliding_window": 64, "sliding_window_pattern": 2},
}


SEVERAL = {"preference": ["formal", "kind"], "preference_weights": [1.0, -0.5], "reference": "neutral"}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_tied_head_is_a_head(models, compose, encode, tmp_path, model_type):
    path = make_model(tmp_path / model_type, seed=5, model_type=model_type, **ARCHITECTURES[model_type])
    reward = AutoModelForCausalLM.from_pretrained(path)
    prompts = [encode(text) for text in ("You are asked to be concise", "why", "the rain " * 60)]
    engine = Engine("v1", models.base, logits_processors=PLUGIN, **pad_config(path))
    try:
        out = engine.generate(prompts, greedy(16, preference="formal", beta=1.2))
        mixed = engine.generate(
            prompts, [greedy(16, **asked) for asked in (SEVERAL, {"preference": "formal"}, SEVERAL)]
        )
    finally:
        engine.close()

    def expected(prompt: list[int], texts: list[str], **settings) -> list[int]:
        composed = [compose(prompt, text) for text in texts]
        return oracle.generate(models.base_model, prompt, 16, reward=reward, reward_prompt_ids=composed, **settings)

    assert out == [expected(p, ["formal"], beta=1.2) for p in prompts]
    several = {"weights": (1.0, -0.5), "reference": "neutral"}  # by a head that is not linear where there is a soft cap
    assert mixed == [
        expected(prompts[0], ["formal", "kind"], **several),
        expected(prompts[1], ["formal"]),
        expected(prompts[2], ["formal", "kind"], **several),
    ]
