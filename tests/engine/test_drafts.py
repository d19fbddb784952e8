"""The reward model as drafter, on Model Runner V2: the output is that without drafts, and nothing is computed twice.

(With every cache too small, preemption, chunks and aborts: test_lifecycle.py.)
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pad_vllm.benchmarks.drafts import DraftSetup, measure_drafts
from pad_vllm.worker.patches import reward_model_drafts
from tests import oracle
from tests.engine.test_engine import GREEDY, PROMPTS, every_mode
from tests.engine.test_no_sync import watch_steps
from tests.support.engine import PLUGIN, Engine, Worker, engine_stats, guided, metric, pad_config, running_guidance
from tests.support.fixtures import MAX_TOKENS
from tests.support.models import make_near
from tests.support.statistics import chi_squared

pytestmark = pytest.mark.every_release

NUM_DRAFTS = 4
SEVERAL = {"preference": ["formal", "kind"], "preference_weights": [1, -0.5]}


def drafts(reward_model) -> dict:
    return {"method": "draft_model", "model": str(reward_model), "num_speculative_tokens": NUM_DRAFTS}


@pytest.fixture(scope="module")
def engine(models):
    engine = Engine(
        "v2",
        models.base,
        logits_processors=PLUGIN,
        disable_log_stats=False,
        speculative_config=drafts(models.named),
        **pad_config(models.named),
    )
    yield engine
    engine.close()


def test_tenants_share_no_block_that_is_drafted_from(models, encode, engine):
    """Unguided requests too have contexts, whose blocks would tell by their time what another asked."""
    prompt, hits = encode("the rain keeps falling on the old town " * 6), []
    for salts in (["one", "other"], ["one", "other"]):
        before = engine.call(engine_stats)["prefix_hits"]
        out = engine.generate([prompt] * 2, [GREEDY | guided(cache_salt=salt) for salt in salts])
        assert out == [oracle.generate(models.base_model, prompt, MAX_TOKENS)] * 2
        hits.append(engine.call(engine_stats)["prefix_hits"] - before)
    assert hits[0] == 0 < hits[1]


@pytest.fixture(scope="module")
def near(models, tmp_path_factory):
    """A reward model that is the base with some noise, so that drafts are accepted and refused by turns: where it is,
    and as the oracle reads it."""
    path = tmp_path_factory.mktemp("near")
    model = make_near(path, models.base_model)
    models.tokenizer.save_pretrained(path)
    return path, model


@pytest.fixture(scope="module")
def near_engine(models, near):
    engine = Engine(
        "v2",
        models.base,
        logits_processors=PLUGIN,
        disable_log_stats=False,
        max_num_seqs=64,
        speculative_config=drafts(near[0]),
        **pad_config(near[0]),
    )
    yield engine
    engine.close()


def stats(llm) -> tuple[float, float]:
    """Tokens that the reward model drafted, and steps in which it drafted none."""
    counted = running_guidance(llm).stats
    return counted.drafted_tokens, counted.steps_without_drafts


def accepted(engine) -> float:
    return engine.call(metric, "vllm:spec_decode_num_accepted_tokens")


def test_output_is_that_without_drafts_in_every_mode(encode, expect, engine):
    """Every k and beta, with and without preference and head, several preferences, neutral, unguided mixed."""
    prompts, params, expected = every_mode(encode, expect, 24, thin=True)
    for reference in ("base", "neutral", "none"):
        prompts.append(encode("answer"))
        params.append(GREEDY | {"max_tokens": 24} | guided(**SEVERAL, reference=reference))
        expected.append(expect(prompts[-1], **SEVERAL, reference=reference, max_tokens=24))
    assert engine.generate(prompts, params) == expected
    drafted, steps_without = engine.call(stats)
    assert drafted > 0 == steps_without


def count_passes(llm, prompts: list[list[int]], params: list[dict]) -> tuple[int, int, bool, list[list[int]]]:
    """Of base and reward model, until the requests are answered; whether vLLM loaded a draft model; and the answers."""
    from vllm import SamplingParams

    guidance = running_guidance(llm)
    for i, (prompt, asked) in enumerate(zip(prompts, params, strict=True)):
        llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, SamplingParams(**asked))
    before, steps, answers = guidance.engine.stats.num_forwards, 0, {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            answers[output.request_id[0]] = list(output.outputs[0].token_ids)
        steps += 1
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    loaded = hasattr(runner.speculator, "model")
    return steps, guidance.engine.stats.num_forwards - before, loaded, [answers[i] for i in sorted(answers)]


def test_nothing_is_computed_twice(models, encode, near, near_engine):
    """Each pass of the base model goes with n + 1 of the reward model, of which one is the verification's; and no
    other draft model is loaded. Guided and unguided requests accept most of their drafts."""
    _, reward = near
    prompts = [encode(text) for text in PROMPTS[:3]]
    params = [GREEDY | guided(beta=1.0), GREEDY | guided(beta=0.5), GREEDY]
    before = accepted(near_engine)
    steps, reward_passes, loaded, out = near_engine.call(count_passes, prompts, params)
    assert not loaded
    ask = [{"reward": reward, "beta": 1.0}, {"reward": reward, "beta": 0.5}, {}]
    assert out == [
        oracle.generate(models.base_model, prompt, MAX_TOKENS, **asked)
        for prompt, asked in zip(prompts, ask, strict=True)
    ]
    assert reward_passes <= (NUM_DRAFTS + 1) * steps
    assert accepted(near_engine) - before > MAX_TOKENS
    assert steps < MAX_TOKENS / 2


@pytest.mark.one_release
def test_sampled_tokens_have_the_distribution_without_drafts(models, encode, near, near_engine):
    """The second and third of three tokens at temperature 0.8, which are drafted, against all that the oracle could
    have said, by chi-squared at 0.1%."""
    prompt, temperature, num_samples = encode(PROMPTS[0]), 0.8, 120
    settings = {"top_k": 4, "beta": 0.6}

    def distribution(output: list[int]) -> torch.Tensor:
        z = models.base_model(torch.tensor([prompt + output])).logits[0, -1].detach()
        r = oracle.reward_logits(near[1], prompt + output).detach()
        return torch.softmax(oracle.guided_logits(z, r, **settings) / temperature, 0).double()

    expected = [torch.zeros(512).double() for _ in range(2)]
    first = distribution([])
    for one in first.nonzero().flatten().tolist():
        second = distribution([one])
        expected[0] += first[one] * second
        for two in second.nonzero().flatten().tolist():
            expected[1] += first[one] * second[two] * distribution([one, two])
    params = [
        {"temperature": temperature, "max_tokens": 3, "ignore_eos": True, "seed": seed} | guided(**settings)
        for seed in range(num_samples)
    ]
    before = accepted(near_engine)
    out = near_engine.generate([prompt] * num_samples, params)
    assert num_samples / 2 < accepted(near_engine) - before < NUM_DRAFTS * num_samples
    for place, wanted in zip((1, 2), expected, strict=True):
        p_value = chi_squared([tokens[place] for tokens in out], wanted)
        assert p_value > 1e-3


def test_drafting_reads_nothing_back(models, encode, expect, engine):
    prompts = [encode(f"answer {i}") for i in range(4)]
    asked = [GREEDY, GREEDY | guided(**SEVERAL, reference="neutral"), GREEDY | guided(beta=0.5)]
    asked.append(GREEDY | guided(preference="formal", weights=[1.0, 0.0, 0.5]))
    asked = [params | {"max_tokens": 40} for params in asked]
    first, decoding, lost = engine.call(watch_steps, prompts, asked)
    assert decoding == []
    assert first
    assert any("_output_ids" in read for read in lost)


def test_stop_strings_and_end_tokens_end_a_request_within_its_drafts(models, encode, near, near_engine):
    prompt = encode(PROMPTS[1])
    tokens = oracle.generate(models.base_model, prompt, MAX_TOKENS, reward=near[1], top_k=64)
    ends = [5, 6, 7, 8]
    params = [GREEDY | {"stop_token_ids": [tokens[end]]} | guided(top_k=64) for end in ends]
    text = models.tokenizer.decode(tokens)
    params.append(GREEDY | {"stop": [text[12:16]]} | guided(top_k=64))
    *out, stopped = near_engine.generate([prompt] * 5, params)
    assert out == [tokens[: tokens.index(tokens[end]) + 1] for end in ends]
    assert text[12:16] in models.tokenizer.decode(stopped)
    assert text[12:16] not in models.tokenizer.decode(stopped[:-1])
    assert stopped == tokens[: len(stopped)]


def break_drafting(llm, what: str) -> None:
    """For once, the third time."""
    guidance = running_guidance(llm)
    owner = guidance.drafter if what == "_proposals" else guidance.engine
    working, times = getattr(owner, what), 0

    def breaks(*args):
        nonlocal times
        times += 1
        if times == 3:
            raise RuntimeError("broken for a test")
        return working(*args)

    setattr(owner, what, breaks)


@pytest.mark.parametrize("what", ["_proposals", "_forward"])
def test_requests_outlive_drafting_that_fails(models, encode, near, near_engine, what):
    """A step without drafts, and what was begun for them is computed again."""
    prompts, asked = [encode(text) for text in PROMPTS[:2]], guided(top_k=5, beta=0.5)
    (_, before) = near_engine.call(stats)
    near_engine.call(break_drafting, what)
    out = near_engine.generate(prompts, GREEDY | asked | {"max_tokens": 12})
    (_, after) = near_engine.call(stats)
    assert after > before
    assert out == [
        oracle.generate(models.base_model, prompt, 12, reward=near[1], top_k=5, beta=0.5) for prompt in prompts
    ]


@pytest.mark.one_release
def test_the_benchmark_counts_tokens_for_a_pass(models, encode, near):
    worker = Worker("v2")
    setup = DraftSetup(str(models.base), str(near[0]), str(near[0]), 2, betas=(1.0,), temperatures=(0.0, 0.8))
    try:
        measured = worker.run(measure_drafts, setup, [encode(text) for text in PROMPTS[:2]], [None, "concise"])
    finally:
        worker.close()
    for kind in measured:
        assert all(1 <= tokens <= 3 for tokens in kind.passes)
        assert sum(kind.passes) / len(kind.passes) > 1.5
        assert kind.reward_passes < 3.5  # prompts among them


def test_another_draft_model_is_vllms_own_affair(models, encode, expect):
    """vLLM's speculator drafts, and does not know the preference: test_speculative.py."""

    def config(model, method="draft_model", pad=models.named):
        return SimpleNamespace(
            speculative_config=SimpleNamespace(method=method, model=str(model)),
            additional_config={"pad": {"reward_model": str(pad)}},
            model_config=SimpleNamespace(model="served", dtype="float32", quantization=None, revision=None),
        )

    assert reward_model_drafts(config(models.named))
    assert reward_model_drafts(config(models.named / "..", pad=models.named.parent))
    assert not reward_model_drafts(config(models.base))
    assert not reward_model_drafts(config(models.named, method="eagle"))
    assert not reward_model_drafts(config("base", pad="base"))  # which vLLM takes for a folder
    assert reward_model_drafts(config("served", pad="base"))
