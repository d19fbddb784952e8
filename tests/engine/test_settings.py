"""The real engine against the oracle, in other settings: other models, chunks, processes, devices."""

from __future__ import annotations

import json
import os
import time

import pytest
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests import oracle
from tests.engine.test_engine import BAD_REQUESTS, GREEDY, PREFERENCES, PROMPTS
from tests.support.engine import A_CORE_EACH, ONE_CONTEXT, PLUGIN, Engine, guided, pad_config, running_guidance
from tests.support.fixtures import MAX_TOKENS
from tests.support.models import make_model


@pytest.mark.parametrize("windowed", ["base", "reward"])
def test_a_sliding_window_stays_with_its_model(models, encode, compose, tmp_path, windowed):
    """vLLM keeps a model's window in the cache configuration: the reward model must neither inherit nor lose one."""
    mistral = make_model(tmp_path / "mistral", seed=5, model_type="mistral", sliding_window=48, head_dim=32)
    base, reward = (mistral, models.reward) if windowed == "base" else (models.base, mistral)
    engine = Engine("v1", base, **pad_config(reward, max_num_batched_tokens=64))
    prompts = [encode("the rain keeps falling on the old town. " * 5), encode("a")]
    params = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True, **guided(preference="formal", beta=1.5)}
    try:
        out = engine.generate(prompts, params)
    finally:
        engine.close()
    load = AutoModelForCausalLM.from_pretrained
    base_model, reward_model = load(base), load(reward)
    assert out == [
        oracle.generate(
            base_model, p, 24, reward=reward_model, reward_prompt_ids=compose(p, "formal"), top_k=10, beta=1.5
        )
        for p in prompts
    ]


def test_compiled_as_the_base_model_is(models, encode, expect):
    """Both models by inductor, as an engine runs that is not told otherwise; batches of one row and of several."""
    engine = Engine("v1", models.base, enforce_eager=False, **pad_config(models.reward))
    prompts = [encode(text) for text in ("The quick brown fox", "a", "jumps over the lazy dog " * 4)]
    try:
        assert engine.call(compiled_modules) == 2
        for batch in (prompts[:1], prompts):
            asked = {"preference": "formal", "beta": 1.5}
            out = engine.generate(batch, {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True} | guided(**asked))
            assert out == [expect(prompt, max_tokens=24, **asked) for prompt in batch]
    finally:
        engine.close()


def compiled_modules(llm) -> int:
    """How many of the two models run compiled."""
    worker = llm.llm_engine.model_executor.driver_worker.worker
    return sum(not model.model.do_not_compile for model in (worker.get_model(), running_guidance(llm).model.model))


def test_a_prompt_token_unknown_to_the_reward_model_ends_its_request_alone(models, encode, compose, tmp_path):
    """The base model's embeddings may have rows that stand for no token; vLLM lets a client send them."""
    padded = make_model(tmp_path / "padded", seed=0, vocab_size=576)
    engine = Engine("v1", padded, **pad_config(models.reward))
    prompts = [[0, 550, 20], encode("a")]
    params = {"temperature": 0.0, "max_tokens": 16} | guided(preference="formal")
    try:
        ended, other = engine.generate(prompts, params)
    finally:
        engine.close()
    assert ended == [models.tokenizer.eos_token_id]
    padded_model = AutoModelForCausalLM.from_pretrained(padded)
    padded_model.lm_head.weight.data = padded_model.lm_head.weight.data[:512]
    assert other == oracle.generate(
        padded_model,
        prompts[1],
        16,
        reward=models.reward_model,
        reward_prompt_ids=compose(prompts[1], "formal"),
        eos_token_id=1,
    )


def change_personas(llm, file, personas, prompt, params) -> list[list[int]]:
    """Answers to a request that runs while the personas change, and to one that comes afterwards and runs beside it."""
    engine, stats, answers = llm.llm_engine, running_guidance(llm).stats, {}
    version, params = stats.personas_version, SamplingParams(**params)
    engine.add_request("before", {"prompt_token_ids": prompt}, params)
    while not engine.step():  # its prompt
        pass
    part = file.with_suffix(".part")
    part.write_text(json.dumps(personas))
    os.replace(part, file)
    deadline = time.monotonic() + 30
    while stats.personas_version == version and time.monotonic() < deadline:
        time.sleep(0.1)
    engine.add_request("after", {"prompt_token_ids": prompt}, params)  # the same parameters
    while engine.has_unfinished_requests():
        answers |= {one.request_id.partition("-")[0]: list(one.outputs[0].token_ids) for one in engine.step()}
    return [answers["before"], answers["after"]]


def test_chunked_prefill_of_the_base_and_a_default_persona_that_changes(models, encode, expect, runner, tmp_path):
    """Prompts longer than the base's token budget: rows of unfinished prompts are passed over. And a request that
    asks for nothing gets the default persona, as it is when the request comes."""
    file = tmp_path / "personas.json"
    file.write_text(json.dumps({"house": {"preference": "concise"}, "guest": {"beta": 1.0}}))
    pad = {"top_k": 5, "beta": 1.5, "personas": str(file), "default_persona": "house"}
    engine = Engine(runner, models.base, max_num_batched_tokens=32, max_num_seqs=8, **pad_config(models.reward, **pad))
    prompts = [encode("the old town keeps falling " * 7), encode("a"), encode("say why " * 30)]
    params = [GREEDY | {"max_tokens": 16} | asked for asked in (guided(preference="formal"), guided(beta=1.0), {})]
    settings = {"top_k": 5, "max_tokens": 16}
    expected = [
        expect(prompts[0], preference="formal", beta=1.5, **settings),
        expect(prompts[1], preference="concise", beta=1.0, **settings),
        expect(prompts[2], preference="concise", beta=1.5, **settings),
    ]
    house = {"preference": "playful", "beta": 0.5, "top_k": 3}
    try:
        assert engine.generate(prompts, params) == expected
        answers = engine.call(change_personas, file, {"house": house}, prompts[2], GREEDY | {"max_tokens": 16})
        assert answers == [expected[2], expect(prompts[2], max_tokens=16, **house)]
        with pytest.raises(VLLMValidationError, match="pad_persona='guest': no such persona"):
            engine.generate(prompts[:1], GREEDY | guided(persona="guest"))
    finally:
        engine.close()


def test_frontend_and_engine_in_different_processes(models, encode, expect):
    """As it is served: the frontend refuses with what the engine's process announced, and the class is loaded there."""
    personas = {"terse": {"pad_preference": PREFERENCES[0]}}
    engine = Engine(
        "v1", models.base, multiprocess=True, logits_processors=PLUGIN, **pad_config(models.named, personas=personas)
    )
    prompt = encode(PROMPTS[1])
    try:
        for extra_args, message in BAD_REQUESTS:
            with pytest.raises(VLLMValidationError, match=message):
                engine.generate([prompt], GREEDY | {"extra_args": extra_args})
        out = engine.generate([prompt] * 2, [GREEDY | guided(persona="terse"), GREEDY])
    finally:
        engine.close()
    assert out[0] == expect(prompt, preference=PREFERENCES[0])
    assert out[1] == oracle.generate(models.base_model, prompt, MAX_TOKENS)


def test_tensor_parallelism(models, encode, expect, monkeypatch):
    """Two ranks: the reward model is sharded like the base, and the candidates' scores are summed over the ranks.

    Prompts return, requests leave together, and the pool is short: the ranks share, evict and recompute alike, or
    their forwards would not fit together.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", A_CORE_EACH)
    engine = Engine(
        "v1",
        models.base,
        multiprocess=True,
        tensor_parallel_size=2,
        logits_processors=PLUGIN,
        **pad_config(models.released, kv_cache_memory_bytes=ONE_CONTEXT * 5 // 4),
    )
    prompts = [encode(text) for text in PROMPTS]
    preferences = [f"{word} {word} " * 30 for word in ("formal", "concise", "playful", "detailed", "why")]
    try:
        for i in range(3):
            asked = [{"preference": preferences[(i + j) % 5], "beta": 1.5} for j in range(len(prompts))]
            several = {"preference": [preferences[i], preferences[i + 1]], "preference_weights": [1.0, -0.5]}
            asked[i :: i + 3] = [several | {"reference": "neutral"} for _ in asked[i :: i + 3]]
            out = engine.generate(prompts, [GREEDY | {"max_tokens": 16} | guided(**pad) for pad in asked])
            assert out == [
                expect(p, head="released", max_tokens=16, **pad) for p, pad in zip(prompts, asked, strict=True)
            ]
    finally:
        engine.close()
