"""Traces of the real engine are the sums that the oracle computes for the same requests, on both runners."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pad_vllm.params import MAX_CONTEXTS
from tests import oracle
from tests.engine.test_drafts import drafts, near  # noqa: F401 (a fixture)
from tests.engine.test_engine import PROMPTS
from tests.support import operations, variants
from tests.support.engine import A_CORE_EACH, PLUGIN, Engine, greedy, pad_config, running_guidance
from tests.support.fixtures import MIX
from tests.support.pairs import Kind, TokenPair

PERSONAS = {"terse": {"preference": "concise, formal", "beta": 1.5}}
LENGTHS = (12, 7, 20, 1, 5, 16)
ASKED: tuple[dict[str, Any], ...] = (
    {"preference": "formal"},
    {"preference": ["formal", "kind"], "preference_weights": [1, -0.5], "reference": "neutral"},
    {"preference": ["kind", "brief", "kind"], "preference_weights": [0.5, 1, 0.25], "top_k": 20},
    {"persona": "terse"},
    {"weights": list(MIX), "beta": 0.7, "reference": "none"},
    {"preference": ["formal", "kind"], "preference_weights": [1, -1], "reference": "neutral", "top_k": 5},
)


def settle(llm: Any) -> None:
    """Let the engine see that its requests are gone, and their lines be written."""
    from vllm import SamplingParams

    llm.generate([{"prompt_token_ids": [5]}], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
    traces = running_guidance(llm).traces
    assert not traces.records
    traces.writer._queue.put(None)
    traces.writer._thread.join(10)
    traces.writer.__init__(traces.writer.files, traces.writer.make)  # and go on


def totals(llm: Any) -> dict[str, float]:
    stats = running_guidance(llm).stats
    names = ("traced_requests", "traced_tokens", "changed_tokens", "divergence_nats", "lost_traces")
    return {name: getattr(stats, name) for name in names}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def expected_effects(models, compose, prompt: list[int], num: int, asked: dict[str, Any], **more) -> list:
    """Of the oracle's tokens, and these."""
    asked = PERSONAS[asked["persona"]] | asked if "persona" in asked else asked
    texts = asked.get("preference") or []
    texts = [texts] if isinstance(texts, str) else texts
    effects: list[oracle.Effect] = []
    settings = {key: asked[key] for key in ("top_k", "beta", "reference") if key in asked}
    tokens = oracle.generate(
        models.base_model,
        prompt,
        num,
        **{"reward": models.reward_model} | more,
        reward_prompt_ids=[compose(prompt, text) for text in texts] or None,
        weights=asked.get("preference_weights"),
        head=models.heads["mixed"] if "weights" in asked else None,
        effects=effects,
        **{"top_k": 10, "beta": 1.0, "reference": "base"} | settings,
    )
    return [tokens, effects]


def assert_line(line: dict[str, Any], effects: list[oracle.Effect]) -> None:
    num = len(effects)
    assert line["tokens"] == num
    assert line["changed"] == pytest.approx(sum(effect.changed for effect in effects) / num, abs=1e-6)
    assert line["divergence"] == pytest.approx(sum(effect.divergence for effect in effects) / num, rel=2e-3, abs=1e-4)
    rewards = [sum(one) / num for one in zip(*(effect.rewards for effect in effects), strict=True)]
    assert line["rewards"] == pytest.approx(rewards, rel=2e-3, abs=1e-3)
    assert line["failed"] is False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def engine(models, runner, folder):
    engine = Engine(
        runner,
        models.base,
        logits_processors=PLUGIN,
        max_num_seqs=4,
        **pad_config(models.named, personas=PERSONAS, trace=str(folder / runner)),
    )
    yield engine
    engine.close()


@pytest.mark.every_release
def test_lines_are_the_oracles_sums(models, encode, compose, engine, folder, runner):
    """More requests than are in the batch at once, some of them unguided, one ended by a token, one by its id alone
    not guided."""
    prompts = [encode(PROMPTS[i % 3]) for i in range(len(ASKED))]
    params = [greedy(num, **asked, trace=f"no. {i}") for i, (num, asked) in enumerate(zip(LENGTHS, ASKED, strict=True))]
    expected = [
        expected_effects(models, compose, prompt, num, asked)
        for prompt, num, asked in zip(prompts, LENGTHS, ASKED, strict=True)
    ]
    ends = expected[0][0][5]
    expected.append([part[: expected[0][0].index(ends) + 1] for part in expected[0]])
    prompts.append(prompts[0])
    params.append(greedy(12, **ASKED[0], trace="ended") | {"stop_token_ids": [ends]})
    prompts += [encode("a")] * 2
    params += [greedy(4), greedy(4, trace="not guided")]
    out = engine.generate(prompts, params)
    assert out[: len(expected)] == [tokens for tokens, _ in expected]
    engine.call(settle)
    lines = {line["trace"]: line for line in lines_of(folder / runner)}
    assert sorted(lines) == sorted([*(f"no. {i}" for i in range(len(ASKED))), "ended"])
    for i, (_, effects) in enumerate(expected[: len(ASKED)]):
        assert_line(lines[f"no. {i}"], effects)
    assert_line(lines["ended"], expected[-1][1])
    assert lines["no. 3"]["persona"] == "terse"
    assert lines["no. 3"]["beta"] == 1.5
    assert lines["no. 5"]["reference"] == "none"
    texts = "".join(path.read_text() for path in (folder / runner).iterdir())
    assert not any(text in texts for text in ("formal", "kind", *PROMPTS[1].split()))
    every = [effect for _, effects in expected for effect in effects]
    counted = engine.call(totals)
    assert counted["traced_tokens"] == len(every)
    assert counted["changed_tokens"] == sum(effect.changed for effect in every)
    assert counted["divergence_nats"] == pytest.approx(sum(effect.divergence for effect in every), rel=1e-3)
    assert counted["traced_requests"] == len(expected)
    assert counted["lost_traces"] == 0
    assert len(expected[1][1][0].rewards) < MAX_CONTEXTS


@pytest.mark.every_release
def test_drafts_count_once_and_only_those_kept(models, encode, compose, near, tmp_path):  # noqa: F811
    """Accepted and refused by turns; requests that end within their drafts, by a token or by their length."""
    engine = Engine(
        "v2",
        models.base,
        logits_processors=PLUGIN,
        max_num_seqs=4,
        disable_log_stats=False,
        speculative_config=drafts(near[0]),
        **pad_config(near[0], trace=str(tmp_path), trace_text=True),
    )
    asked: list[dict[str, Any]] = [{"beta": 1.0}, {"beta": 0.5, "top_k": 20}, {"preference": ["formal", "kind"]}]
    prompts, lengths = [encode(text) for text in PROMPTS[:3]], [23, 40, 18]
    expected = [
        expected_effects(models, compose, *one, reward=near[1]) for one in zip(prompts, lengths, asked, strict=True)
    ]
    params = [greedy(num, **one, trace=str(i)) for i, (num, one) in enumerate(zip(lengths, asked, strict=True))]
    tokens, effects = expected[1]
    for end in range(9, 14):  # at each place of a step's drafts
        kept = tokens.index(tokens[end]) + 1
        expected.append([tokens[:kept], effects[:kept]])
        params.append(greedy(40, **asked[1], trace=str(len(params))) | {"stop_token_ids": [tokens[end]]})
        prompts.append(prompts[1])
    params.append(greedy(8))
    prompts.append(prompts[0])
    try:
        out = engine.generate(prompts, params)
        assert out[:-1] == [tokens for tokens, _ in expected]
        engine.call(settle)
        drafted = engine.call(drafted_tokens)
    finally:
        engine.close()
    assert drafted > 0
    lines = {line["trace"]: line for line in lines_of(tmp_path)}
    assert len(lines) == len(expected)
    for i, (tokens, effects) in enumerate(expected):
        assert_line(lines[str(i)], effects)
        assert lines[str(i)]["answer"] == models.tokenizer.decode(tokens)
        assert lines[str(i)]["prompt"] == models.tokenizer.decode(prompts[i])
    assert lines["2"]["preferences"] == ["formal", "kind"]


def drafted_tokens(llm: Any) -> float:
    return running_guidance(llm).stats.drafted_tokens


@pytest.mark.one_release
def test_a_reward_model_with_another_tokenizer(runner, tmp_path):
    """Each context's groups, with a bias and penalties that the reward does not see."""
    pair = TokenPair(tmp_path / "pair", Kind("byte-level", 2000), Kind("byte-level", 600))
    asked: list[dict[str, Any]] = [
        {"preference": "formal"},
        {"preference": ["kind", "brief"], "preference_weights": [1.0, -0.5], "reference": "neutral"},
        {"reference": "none", "beta": 0.5},
    ]
    controls = {"logit_bias": {1: 9.0, 40: -5.0}, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
    as_oracle = {"logit_bias": tuple(controls["logit_bias"].items()), "penalties": (0.0, 0.3, 1.2)}
    texts = ["say why, naïve café", "東京の天気は", "a"]
    params = [greedy(10, **one, trace=str(i)) for i, one in enumerate(asked)]
    params[0] |= controls
    engine = Engine(
        runner,
        pair.base,
        logits_processors=PLUGIN,
        max_num_seqs=3,
        **pad_config(pair.reward, trace=str(tmp_path / "t")),
    )
    try:
        out = engine.generate([pair.prompt(text) for text in texts], params)
        engine.call(settle)
    finally:
        engine.close()
    lines = {line["trace"]: line for line in lines_of(tmp_path / "t")}
    for i, (text, one) in enumerate(zip(texts, asked, strict=True)):
        effects: list[oracle.Effect] = []
        more = as_oracle if i == 0 else {}
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in one.items()}
        answer = pair.answer(pair.prompt(text), pair.read(text), 10, **settings, **more, effects=effects)
        assert out[i] == answer
        assert_line(lines[str(i)], effects)


@pytest.mark.one_release
def test_tensor_parallel_ranks_sum_together_and_one_writes(models, encode, compose, tmp_path, monkeypatch):
    """In processes of their own; the lines of the last requests come without a further one."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", A_CORE_EACH)
    engine = Engine(
        "v1",
        models.base,
        multiprocess=True,
        logits_processors=PLUGIN,
        tensor_parallel_size=2,
        max_num_seqs=2,
        **pad_config(models.named, trace=str(tmp_path)),
    )
    asked = [ASKED[0], ASKED[1]]
    prompts = [encode(text) for text in PROMPTS[:2]]
    try:
        out = engine.generate(prompts, [greedy(6, **one, trace=str(i)) for i, one in enumerate(asked)])
        for _ in range(100):
            if len(lines_of(tmp_path)) == 2:
                break
            time.sleep(0.1)
    finally:
        engine.close()
    lines = {line["trace"]: line for line in lines_of(tmp_path)}
    assert len(list(tmp_path.iterdir())) == 1
    for i, one in enumerate(asked):
        tokens, effects = expected_effects(models, compose, prompts[i], 6, one)
        assert out[i] == tokens
        assert_line(lines[str(i)], effects)


def count_with_and_without(llm: Any, prompts: list[list[int]], params: dict[str, Any]) -> list[int]:
    """Launches of a usual step with traces, and without."""
    guidance = running_guidance(llm)

    def usual() -> int:
        steps = operations.count(llm, params, prompts, 7)
        return len(sorted(steps, key=len)[len(steps) // 2])

    with_traces = usual()
    with patch.object(guidance, "traces", None):
        return [with_traces, usual()]


@pytest.mark.one_release
def test_a_step_launches_little_more_and_nothing_that_the_start_has_not_compiled(models, encode, tmp_path):
    """With the Triton kernels, in the interpreter."""
    engine = Engine(
        "v2",
        models.base,
        kernels="triton",
        before=variants.record,
        max_num_seqs=2,
        logits_processors=PLUGIN,
        **pad_config(models.named, dtype="bfloat16", max_top_k=17, trace=str(tmp_path)),
    )
    several = {"preference": ["formal", "kind"], "preference_weights": [1, -0.5], "reference": "neutral"}
    asked: list[dict[str, Any]] = [
        {"preference": "formal"},
        several,
        {"weights": list(MIX), "top_k": 17},
        several | {"top_k": 17},
    ]
    try:
        at_start = engine.call(variants.take)
        for controls in ({}, {"logit_bias": {7: 2.0}}, {"repetition_penalty": 1.2}):
            params = [greedy(3, **one) | controls for one in asked]
            engine.generate([encode("say why")] * len(params), params)
        in_requests = engine.call(variants.take)
        assert any("trace_kernel" in variant for variant in in_requests)
        assert any("score_contexts_kernel" in variant for variant in in_requests)
        assert [variant for variant in in_requests if variant not in at_start] == []
        for one, most in ((asked[0], 1), (several, 2)):
            params = greedy(60, **one)
            with_traces, without = engine.call(count_with_and_without, [encode("say why")] * 2, params)
            assert 0 < with_traces - without <= most
    finally:
        engine.close()
