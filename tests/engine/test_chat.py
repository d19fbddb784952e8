"""A long system prompt beside preferences: computed once, in the engine."""

from __future__ import annotations

import pytest
from vllm.exceptions import VLLMValidationError

from pad_vllm.frontend import admission
from pad_vllm.reward.template import PromptTemplate
from tests.support.chats import tokenizer_of
from tests.support.engine import Engine, engine_stats, greedy, pad_config, running_guidance
from tests.support.models import make_model


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = make_model(tmp_path_factory.mktemp("chat") / "model", seed=0, vocab_size=1024)
    tokenizer_of("chatml").save_pretrained(folder)
    return folder


def test_a_system_prompt_is_computed_once_for_users_of_different_preferences(chat_model):
    """500 tokens, 16 users, 16 preferences, in one batch: counted."""
    tokenizer = tokenizer_of("chatml")
    template = PromptTemplate(tokenizer, "{preference} {prompt}")
    words = [5 + i % 90 for i in range(497)]
    (start, end) = (
        tokenizer.encode(t, add_special_tokens=False)
        for t in ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    )
    assert len(start) == 3
    prompt = [*start, *words, *end]
    preferences = [f"{name}, {mood}" for name in ("concise", "formal", "playful", "detailed") for mood in "abcd"]
    composed = [template.compose_shared(prompt, preference) for preference in preferences]
    assert {c.shared[0] for c in composed} == {500}
    pad = pad_config(chat_model, prompt_template="{preference} {prompt}")
    engine = Engine("v1", chat_model, max_model_len=600, max_num_seqs=16, **pad)
    try:
        engine.generate([prompt] * 16, [greedy(1, preference=text) for text in preferences])
        stats = engine.call(engine_stats)
        own = sum(len(c.ids) - 500 for c in composed)
        assert stats["tokens"] == 500 + own
        assert stats["prefix_hits"] == 15 * 500
    finally:
        engine.close()


def plain_and_failed(llm) -> tuple[float, float]:
    stats = running_guidance(llm).stats
    return stats.plain_prompts, stats.failed_requests


def refuse_no_prompt(llm) -> None:
    """As a frontend that has not read its model's tokenizer."""
    admission.check_prompt = lambda *args: None


def test_a_prompt_that_is_none_of_the_template_is_refused_where_that_is_asked_for(chat_model):
    """Before it gets to the engine. What the frontend lets through is ended at once, alone, and counted; a plain text
    is no such prompt."""
    tokenizer = tokenizer_of("chatml")
    heads = ("<|im_start|>critic\n", "<|im_start|>user\n", "say why ")
    prompts = [tokenizer.encode(f"{head}say why", add_special_tokens=False) for head in heads]
    engine = Engine("v1", chat_model, max_model_len=128, max_num_seqs=4, **pad_config(chat_model, chat="strict"))
    try:
        with pytest.raises(VLLMValidationError, match=r"the prompt begins as a chat.*pad\.chat='strict'"):
            engine.generate(prompts, [greedy(8, preference="formal")] * 3)
        assert all(len(answer) == 8 for answer in engine.generate(prompts, greedy(8)))
        assert engine.call(plain_and_failed) == (0, 0)
        engine.call(refuse_no_prompt)
        refused, *answered = engine.generate(prompts, [greedy(8, preference="formal")] * 3)
        assert refused == [tokenizer.eos_token_id] * 8
        assert all(len(answer) == 8 for answer in answered)
        assert engine.call(plain_and_failed) == (1, 1)
    finally:
        engine.close()
