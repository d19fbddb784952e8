"""What vLLM does to a request while it runs, all of it on one engine that has too little of everything.

Chunked prefill of base and reward model, preemption, a reward pool of one and a half contexts for eight requests,
prefix caching, aborts, reused slots: guided output stays the oracle's.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_traces import assert_line, expected_effects, lines_of, settle
from tests.support.engine import ONE_CONTEXT, PLUGIN, Engine, engine_stats, greedy, metric, pad_config

pytestmark = pytest.mark.every_release

MAX_MODEL_LEN = 448
PREFERENCES = ["concise, formal", "Please be playful, and give an example."]
LONG = "the quick brown fox jumps over the lazy dog while the rain keeps falling on the old town. " * 20


@pytest.fixture(scope="module", params=["v1", "v2", pytest.param("v2 with drafts", marks=pytest.mark.one_release)])
def runner(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def poor_engine(models, runner, traced):
    """32 tokens a step, a base KV cache for 1,280 of them, a reward KV cache for 1.5 contexts (of 1,024)."""
    drafts = {"method": "draft_model", "model": str(models.named), "num_speculative_tokens": 3}
    engine = Engine(
        runner.split()[0],
        models.base,
        logits_processors=PLUGIN,
        speculative_config=drafts if runner == "v2 with drafts" else None,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=32,
        max_num_seqs=8,
        block_size=32,
        num_gpu_blocks_override=1280 // 32 + 1,
        disable_log_stats=False,
        **pad_config(models.named, kv_cache_memory_bytes=ONE_CONTEXT * 3 // 2, trace=str(traced / runner)),
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def long_prompt(encode):
    return encode(LONG)[:300]


def run_steps(llm, requests: dict[str, tuple], aborts: dict[int, list[str]]) -> dict[str, list[int]]:
    """Run the engine by hand: ``aborts`` at those steps; the output of each request that ran to its end."""
    from vllm import SamplingParams

    for request_id, (prompt, params) in requests.items():
        llm.llm_engine.add_request(request_id, {"prompt_token_ids": prompt}, SamplingParams(**params))
    outputs, step = {}, 0
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                outputs[output.request_id.partition("-")[0]] = list(output.outputs[0].token_ids)
        step += 1
        llm.llm_engine.abort_request(aborts.get(step, []))
    return outputs


def test_long_prompts_in_small_chunks_with_preemption_and_a_short_reward_pool(
    models, expect, compose, poor_engine, long_prompt, traced, runner
):
    """Eight guided requests, 300 tokens the longest prompt; together more than either KV cache holds."""
    prompts = [long_prompt[i:][:length] for i, length in enumerate((300, 150, 290, 200, 180, 100, 220, 250))]
    asked = [{"preference": PREFERENCES[i % 2] + " more" * (50 + i), "beta": 0.5 + i % 3 / 2} for i in range(8)]
    asked[3] = {"preference": [PREFERENCES[0], PREFERENCES[1] + " more" * 50, "kind"], "reference": "neutral"}
    asked[6] = {"preference": [PREFERENCES[0], "kind"], "preference_weights": [1.0, -0.5], "reference": "none"}
    before = poor_engine.call(metric, "vllm:num_preemptions")
    params = [greedy(48, **pad, trace=f"poor {i}") for i, pad in enumerate(asked)]
    out = poor_engine.generate(prompts, params)
    assert out == [expect(prompt, max_tokens=48, **pad) for prompt, pad in zip(prompts, asked, strict=True)]
    assert poor_engine.call(metric, "vllm:num_preemptions") > before
    assert poor_engine.call(engine_stats)["evicted"] > 0
    poor_engine.call(settle)
    lines = {line["trace"]: line for line in lines_of(traced / runner)}
    assert [lines[f"poor {i}"]["tokens"] for i in range(8)] == [48] * 8  # whatever was computed again
    for i in (0, 3):
        assert_line(lines[f"poor {i}"], expected_effects(models, compose, prompts[i], 48, asked[i])[1])


def test_two_preferences_over_one_shared_prompt(expect, poor_engine, long_prompt):
    """The base shares the prompt's blocks between them, the reward model must not: its prompts differ in front."""
    prompt = long_prompt[:200]
    asked = [{"preference": PREFERENCES[i % 2]} for i in range(4)]
    for _ in range(2):
        out = poor_engine.generate([prompt] * 4, [greedy(16, **pad) for pad in asked])
        assert out == [expect(prompt, max_tokens=16, **pad) for pad in asked]


def test_aborted_requests_leave_the_others_alone(encode, expect, poor_engine):
    prompts = [encode("say why " * (1 + 2 * i)) for i in range(12)]
    requests = {
        str(i): (prompt, greedy(24, preference=PREFERENCES[i % 2], beta=0.5 + i % 3 / 2))
        for i, prompt in enumerate(prompts)
    }
    out = poor_engine.call(run_steps, requests, {2: ["3", "11"], 9: ["0", "5"], 15: ["2"], 16: ["6"]})
    assert set(out) == {"1", "4", "7", "8", "9", "10"}
    for i, tokens in out.items():
        i = int(i)
        assert tokens == expect(prompts[i], max_tokens=24, preference=PREFERENCES[i % 2], beta=0.5 + i % 3 / 2)


def test_slots_are_reused_by_requests_that_ask_for_something_else(encode, expect, poor_engine):
    """Three times as many requests as there are slots, one after the other into those that come free."""
    prompts = [encode("answer " + "and " * (i % 5)) for i in range(24)]
    asked = [
        ({"preference": "formal"}, {}, {"preference": "playful", "beta": 1.5, "top_k": 3})[i % 3] for i in range(24)
    ]
    out = poor_engine.generate(prompts, [greedy(3 + i % 7, **pad) for i, pad in enumerate(asked)])
    assert out == [
        expect(prompt, guided=bool(pad), max_tokens=3 + i % 7, **pad)
        for i, (prompt, pad) in enumerate(zip(prompts, asked, strict=True))
    ]


def test_generation_up_to_max_model_len(expect, poor_engine, long_prompt):
    out = poor_engine.generate([long_prompt], greedy(MAX_MODEL_LEN, preference=PREFERENCES[0]))
    assert out == [expect(long_prompt, max_tokens=MAX_MODEL_LEN - 300, preference=PREFERENCES[0])]


def test_nothing_leaks(poor_engine, encode, runner):
    """After all that, every block is free (cached or not), or held by a context that still stands in a V2 slot."""
    poor_engine.generate([encode("a")], greedy(1))  # V1 hears of requests that left with the next step
    stats = poor_engine.call(engine_stats)
    assert stats["blocks"] == stats["free_blocks"] + stats["held_blocks"]
    if runner == "v1":
        assert stats["contexts"] == 0 == stats["held_blocks"]


@pytest.mark.one_release
def test_users_of_one_persona_compute_its_prompt_once(models, encode, expect, compose):
    """To the token, also where it ends within a block, and by users who come at once."""
    persona, texts = "Be brief, and say why. " * 12, [f"{i} you are asked" for i in range(6)]
    engine = Engine("v1", models.base, logits_processors=PLUGIN, max_num_seqs=8, **pad_config(models.reward))
    prompts = [encode(text) for text in texts]
    composed = [compose(prompt, persona) for prompt in prompts]
    shared = next(i for i, ids in enumerate(zip(*composed, strict=False)) if len(set(ids)) > 1)
    assert shared % 32 not in (0, 1)
    own = sum(len(ids) - shared for ids in composed)
    try:
        before = engine.call(engine_stats)["tokens"]
        out = engine.generate(prompts, greedy(8, preference=persona))
        computed = engine.call(engine_stats)["tokens"] - before
    finally:
        engine.close()
    assert out == [expect(prompt, max_tokens=8, preference=persona) for prompt in prompts]
    assert computed <= 1.05 * (shared + own + 6 * 7)
