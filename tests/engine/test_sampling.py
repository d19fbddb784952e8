"""vLLM's sampling features beside guidance, on both runners.

What vLLM masks (allowed tokens, bad words, grammar, min_tokens) is no candidate; bias and penalties are in z, and not
in what the reward is compared with; what chooses a token (min-p, top-p, seeds, stop) sees the guided logits.
"""

from __future__ import annotations

import json

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests import oracle
from tests.support.engine import PLUGIN, Engine, engine_stats, guided, pad_config

MAX_TOKENS = 32
GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
PREFERENCE = "concise, formal"
PROMPTS = ["You are asked to be concise", "a", "the rain keeps falling", "[Instruction] say why"]


@pytest.fixture(scope="module")
def engine(models, runner):
    engine = Engine(
        runner,
        models.base,
        logits_processors=PLUGIN,
        logprobs_mode="processed_logprobs",
        structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
        **pad_config(models.named),
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def answer(models, compose):
    """The oracle's answer to a request for PREFERENCE; the runners are held against the same."""
    known: dict[str, list[int]] = {}

    def ask(prompt, max_tokens=MAX_TOKENS, **settings):
        key = repr((prompt, max_tokens, settings))
        if key not in known or "mask" in settings:
            known[key] = oracle.generate(
                models.base_model,
                prompt,
                max_tokens,
                reward=models.reward_model,
                reward_prompt_ids=compose(prompt, PREFERENCE),
                **settings,
            )
        return known[key]

    return ask


def generate_all(llm, prompt: list[int], params: dict) -> list[list[int]]:
    """Every completion of one prompt."""
    from vllm import SamplingParams

    (output,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(**params), use_tqdm=False)
    return [list(completion.token_ids) for completion in output.outputs]


def generate_logprobs(llm, prompt: list[int], params: dict) -> list[dict[int, float]]:
    """The processed log-probabilities at each step."""
    from vllm import SamplingParams

    (output,) = llm.generate([{"prompt_token_ids": prompt}], SamplingParams(**params), use_tqdm=False)
    return [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]


BETAS = (0.5, 1.0, 1.2, 1.5)
NEUTRAL = (0.0, 0.0, 1.0)
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


def controls(free: list[int]) -> list[tuple[dict[int, float], tuple[float, float, float]]]:
    """``logit_bias``, and presence, frequency and repetition penalty: alone and together. ``free``: what would be
    generated without them."""
    first = free[:4]
    return [
        ({7: 100.0}, NEUTRAL),
        (dict.fromkeys([*free[6:9], 40, 41, 42], 2.0), NEUTRAL),
        (dict.fromkeys(first, -2.0), NEUTRAL),
        (dict.fromkeys(first, -100.0), NEUTRAL),
        ({}, (1.5, 0.0, 1.0)),
        ({}, (0.0, 0.9, 1.0)),
        ({}, (0.0, 0.0, 1.4)),
        ({}, (-0.8, -0.2, 0.8)),
        (dict.fromkeys([*free[2:5], 50], 3.0), (0.7, 0.4, 1.3)),
    ]


def test_bias_and_penalties_mean_the_same_at_every_beta(encode, answer, engine, runner):
    """The oracle's answer, greedy, at every strength: a bias of 100 chooses its token, as without guidance."""
    prompts = [encode(text) for text in PROMPTS]
    cases = [
        (prompt, beta, logit_bias, penalties)
        for prompt, beta in zip(prompts, BETAS, strict=True)
        for logit_bias, penalties in controls(answer(prompt, beta=beta))
    ][:: 2 if runner == "v2" else 1]  # on V2, in the interpreter, each at every other beta
    params = [
        GREEDY
        | {"max_tokens": 12, "logit_bias": logit_bias or None}
        | dict(zip(PENALTIES, penalties, strict=True))
        | guided(preference=PREFERENCE, beta=beta)
        for _, beta, logit_bias, penalties in cases
    ]
    out = engine.generate([prompt for prompt, *_ in cases], params)
    for got, (prompt, beta, logit_bias, penalties) in zip(out, cases, strict=True):
        expected = answer(prompt, 12, beta=beta, logit_bias=logit_bias, penalties=penalties)
        assert got == expected, (beta, logit_bias, penalties)
        if 100.0 in logit_bias.values():
            assert got == [7] * 12
        if -100.0 in logit_bias.values():
            assert not set(got) & set(logit_bias)


def test_controls_of_some_requests_do_not_touch_others(models, encode, answer, engine):
    """Guided and unguided, with and without controls in one batch; then slots are used again by requests without."""
    prompts = [encode(text) for text in PROMPTS]
    controlled = GREEDY | {"logit_bias": {9: 4.0}} | dict(zip(PENALTIES, (0.6, 0.3, 1.2), strict=True))
    asked = guided(preference=PREFERENCE)
    out = engine.generate(prompts, [controlled | asked, GREEDY | asked, controlled, GREEDY])
    settings = {"logit_bias": {9: 4.0}, "penalties": (0.6, 0.3, 1.2)}
    assert out == [
        answer(prompts[0], **settings),
        answer(prompts[1]),
        oracle.generate(models.base_model, prompts[2], MAX_TOKENS, **settings),
        oracle.generate(models.base_model, prompts[3], MAX_TOKENS),
    ]
    assert engine.generate(prompts[:2], GREEDY | asked) == [answer(prompt) for prompt in prompts[:2]]


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_bad_words_and_allowed_tokens_are_no_candidates(models, encode, answer, engine, beta):
    prompt = encode(PROMPTS[0])
    words = {token: models.tokenizer.decode([token]) for token in answer(prompt, beta=beta)}
    banned, word = next(
        (token, word)
        for token, word in words.items()
        if word == word.strip() and models.tokenizer.encode(word, add_special_tokens=False) == [token]
    )
    allowed = range(20, 120)
    asked = GREEDY | guided(preference=PREFERENCE, beta=beta)
    out = engine.generate([prompt] * 2, [asked | {"bad_words": [word]}, asked | {"allowed_token_ids": list(allowed)}])
    with_space = models.tokenizer.encode(" " + word, add_special_tokens=False)
    bad = {banned, *(with_space if len(with_space) == 1 else [])}
    assert out == [
        answer(prompt, beta=beta, mask=without(bad)),
        answer(prompt, beta=beta, mask=without(set(range(512)) - set(allowed))),
    ]
    assert banned not in out[0]


def without(tokens: set[int]):
    return lambda y, output: y.index_fill(0, torch.tensor(sorted(tokens)), float("-inf"))


def test_several_completions_are_those_of_several_requests(encode, engine):
    """n = 4 with a seed, at temperature 1: vLLM seeds them one after the other."""
    prompt = encode(PROMPTS[1])
    asked = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, **guided(preference=PREFERENCE, beta=0.4)}
    together = engine.call(generate_all, prompt, asked | {"n": 4, "seed": 7})
    alone = [engine.generate([prompt], asked | {"seed": 7 + i})[0] for i in range(4)]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) > 1


def test_logprobs_are_of_the_guided_distribution(models, encode, compose, engine):
    """``logprobs_mode="processed_logprobs"``; the default mode, raw, gives the base model's own."""
    prompt = encode(PROMPTS[2])
    (first, *_) = engine.call(generate_logprobs, prompt, GREEDY | {"logprobs": 3} | guided(preference=PREFERENCE))
    with torch.no_grad():
        z = models.base_model(torch.tensor([prompt])).logits[0, -1]
        r = oracle.reward_logits(models.reward_model, compose(prompt, PREFERENCE))
    expected = oracle.guided_logits(z, r, top_k=10, beta=1.0).log_softmax(0)
    assert len(first) == 3
    for token, logprob in first.items():
        assert logprob == pytest.approx(expected[token].item(), abs=1e-4)
    assert set(first) == set(expected.topk(3).indices.tolist())


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_min_p_and_top_p_cut_the_guided_distribution(models, encode, compose, engine, runner, beta):
    """Both leave the tokens of the guided distribution that they should, and no other."""
    prompt, temperature, min_p, top_p = encode(PROMPTS[0]), 2.0, 0.2, 0.6
    with torch.no_grad():
        z = models.base_model(torch.tensor([prompt])).logits[0, -1]
        r = oracle.reward_logits(models.reward_model, compose(prompt, PREFERENCE))
    p = (oracle.guided_logits(z, r, top_k=10, beta=beta) / temperature).softmax(0)
    by_min_p = set(torch.nonzero(p >= min_p * p.max()).flatten().tolist())
    order = p.argsort(descending=True)
    by_top_p = set(order[: int((p[order].cumsum(0) < top_p).sum()) + 1].tolist())
    assert 1 < len(by_min_p) < 10
    assert 1 < len(by_top_p) < 10
    asked = {"temperature": temperature, "max_tokens": 1, **guided(preference=PREFERENCE, beta=beta)}
    cuts = [({"min_p": min_p}, by_min_p), ({"top_p": top_p}, by_top_p)]
    if runner == "v2":  # vLLM's top-p kernel uses what the Triton interpreter lacks
        cuts = cuts[:1]
    for cut, tokens in cuts:
        out = engine.generate([prompt] * 40, [asked | cut | {"seed": seed} for seed in range(40)])
        chosen = {tokens_out[0] for tokens_out in out}
        assert len(chosen) > 1
        assert chosen <= tokens


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
def test_stop_token_and_min_tokens(encode, answer, engine, beta):
    prompt = encode(PROMPTS[2])
    free = answer(prompt, beta=beta)
    stop = free[5]
    asked = GREEDY | guided(preference=PREFERENCE, beta=beta) | {"stop_token_ids": [stop]}
    stopped, later = engine.generate([prompt] * 2, [asked, asked | {"min_tokens": 12}])
    assert stopped == free[: free.index(stop) + 1]

    def not_yet(y, output):
        return y.index_fill(0, torch.tensor([1, stop]), float("-inf")) if len(output) < 12 else y

    expected = answer(prompt, beta=beta, mask=not_yet)
    end = next((i for i, token in enumerate(expected) if token == stop), len(expected))
    assert later == expected[: end + 1]
    assert len(later) >= 12


def test_structured_output_is_always_valid(models, encode, engine, runner):
    """A JSON schema and guidance at once: a token that the grammar forbids is never a candidate."""
    if runner == "v2":
        pytest.skip("vLLM's bitmask kernel uses what the Triton interpreter lacks: V2 has grammars on a GPU only")
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 999}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    asked = [guided(preference=PREFERENCE, beta=beta) for beta in (0.5, 1.0, 1.5)] * 3
    out = engine.call(generate_json, [encode(f"answer {i}") for i in range(9)], schema, asked)
    for tokens in out:
        answer = json.loads(models.tokenizer.decode(tokens, skip_special_tokens=True))
        assert set(answer) == {"a", "b"}
        assert isinstance(answer["a"], int)
        assert answer["b"] in ("x", "y")


def generate_json(llm, prompts: list[list[int]], schema: dict, asked: list[dict]) -> list[list[int]]:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    params = [
        SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=120,
            structured_outputs=StructuredOutputsParams(json=schema),
            **extra,
        )
        for seed, extra in enumerate(asked)
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_offline_beam_search_has_no_way_to_ask_for_guidance(encode, engine):
    """It goes on unguided, as without the plugin; over HTTP a request that asks for both is refused."""
    before = engine.call(engine_stats)["tokens"]
    assert engine.call(beam_search, encode(PROMPTS[1]))
    assert engine.call(engine_stats)["tokens"] == before
    with pytest.raises(TypeError, match="extra_args"):
        engine.call(beam_search, encode(PROMPTS[1]), guided(preference=PREFERENCE))


def beam_search(llm, prompt: list[int], extra: dict | None = None) -> list[list[int]]:
    from vllm.sampling_params import BeamSearchParams

    (output,) = llm.beam_search(
        [{"prompt_token_ids": prompt}], BeamSearchParams(beam_width=2, max_tokens=4, **extra or {})
    )
    return [sequence.tokens for sequence in output.sequences]


def test_beam_search_is_refused_where_every_request_is_guided(models, encode):
    """It scores by log-probabilities, which leave guidance out: a default persona would be ignored in silence."""
    pad = {"personas": {"house": {"preference": "concise"}}, "default_persona": "house"}
    engine = Engine("v1", models.base, **pad_config(models.reward, **pad))
    try:
        with pytest.raises(VLLMValidationError, match="beam search"):
            engine.call(beam_search, encode(PROMPTS[1]))
        assert len(engine.generate([encode("a")], {"max_tokens": 1, "logprobs": 2, "temperature": 0.0})[0]) == 1
    finally:
        engine.close()
