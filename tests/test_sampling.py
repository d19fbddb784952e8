"""vLLM's sampling features beside guidance, on both runners.

What vLLM does to the base logits (bias, penalties, bad words, grammar) is in z; what it does to choose a token (min-p,
top-p, seeds, stop) sees the guided logits.
"""

from __future__ import annotations

import json

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests import oracle
from tests.engine import PLUGIN, Engine, engine_stats, guided, pad_config

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
    """The oracle's answer to a request for PREFERENCE, with z adjusted."""

    def ask(prompt, adjust=None, **settings):
        return oracle.generate(
            models.base_model,
            prompt,
            MAX_TOKENS,
            reward=models.reward_model,
            reward_prompt_ids=compose(prompt, PREFERENCE),
            adjust=adjust,
            **settings,
        )

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


def penalize(prompt: list[int], presence: float, frequency: float, repetition: float):
    """The penalties of the OpenAI API and of CTRL, one token at a time."""

    def adjust(z: torch.Tensor, output: list[int]) -> torch.Tensor:
        z = z.clone()
        for token in set(prompt) | set(output):
            z[token] = z[token] / repetition if z[token] > 0 else z[token] * repetition
        for token in set(output):
            z[token] -= frequency * output.count(token) + presence
        return z

    return adjust


def test_penalties_are_in_z(models, encode, answer, engine):
    """V1 applies them after custom processors, V2 before; guided output must not depend on it."""
    penalties = [(0.7, 0.4, 1.3), (0.0, 0.0, 1.0), (-0.5, 0.2, 0.8), (0.0, 0.0, 1.5)]
    prompts = [encode(text) for text in PROMPTS]
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty")
    params = [
        GREEDY | guided(preference=PREFERENCE, beta=0.7) | dict(zip(names, values, strict=True)) for values in penalties
    ]
    unguided = GREEDY | dict(zip(names, penalties[0], strict=True))
    *out, other = engine.generate([*prompts, prompts[0]], [*params, unguided])
    assert out == [
        answer(p, penalize(p, *values), beta=0.7, top_k=10) for p, values in zip(prompts, penalties, strict=True)
    ]
    assert other == oracle.generate(
        models.base_model, prompts[0], MAX_TOKENS, adjust=penalize(prompts[0], *penalties[0])
    )


def test_bias_bad_words_and_allowed_tokens_are_in_z(models, encode, answer, engine):
    prompt = encode(PROMPTS[0])
    free = answer(prompt)
    banned, forced = free[0], free[3]
    allowed = sorted(set(range(20, 120)))

    def mask(tokens, keep: bool):
        def adjust(z, output):
            hit = torch.zeros(len(z), dtype=torch.bool)
            hit[list(tokens)] = True
            return z.masked_fill(~hit if keep else hit, float("-inf"))

        return adjust

    def bias(z, output):
        return z + torch.nn.functional.one_hot(torch.tensor(forced), len(z)) * 5.0

    asked = GREEDY | guided(preference=PREFERENCE)
    word = models.tokenizer.decode([banned])
    assert models.tokenizer.encode(word, add_special_tokens=False) == [banned]
    out = engine.generate(
        [prompt] * 3,
        [
            asked | {"bad_words": [word]},
            asked | {"allowed_token_ids": allowed},
            asked | {"logit_bias": {forced: 5.0}},
        ],
    )
    assert banned not in out[0]
    with_space = models.tokenizer.encode(" " + word, add_special_tokens=False)
    bad = {banned, *(with_space if len(with_space) == 1 else [])}
    assert out[0] == answer(prompt, mask(bad, keep=False))
    assert out[1] == answer(prompt, mask(allowed, keep=True))
    assert out[2] == answer(prompt, bias)


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


def test_min_p_and_top_p_cut_the_guided_distribution(models, encode, compose, engine, runner):
    """Both leave the tokens of the guided distribution that they should, and no other."""
    prompt, temperature, min_p, top_p = encode(PROMPTS[3]), 1.0, 0.2, 0.6
    with torch.no_grad():
        z = models.base_model(torch.tensor([prompt])).logits[0, -1]
        r = oracle.reward_logits(models.reward_model, compose(prompt, PREFERENCE))
    p = oracle.guided_logits(z, r, top_k=10, beta=0.2).softmax(0)
    by_min_p = set(torch.nonzero(p >= min_p * p.max()).flatten().tolist())
    order = p.argsort(descending=True)
    by_top_p = set(order[: int((p[order].cumsum(0) < top_p).sum()) + 1].tolist())
    assert 1 < len(by_min_p) < 10
    assert 1 < len(by_top_p) < 10
    asked = {"temperature": temperature, "max_tokens": 1, **guided(preference=PREFERENCE, beta=0.2)}
    cuts = [({"min_p": min_p}, by_min_p), ({"top_p": top_p}, by_top_p)]
    if runner == "v2":  # vLLM's top-p kernel uses what the Triton interpreter lacks
        cuts = cuts[:1]
    for cut, tokens in cuts:
        out = engine.generate([prompt] * 60, [asked | cut | {"seed": seed} for seed in range(60)])
        chosen = {tokens_out[0] for tokens_out in out}
        assert len(chosen) > 1
        assert chosen <= tokens


def test_stop_token_and_min_tokens(encode, answer, engine):
    prompt = encode(PROMPTS[2])
    free = answer(prompt)
    stop = free[5]
    asked = GREEDY | guided(preference=PREFERENCE)
    (stopped,) = engine.generate([prompt], asked | {"stop_token_ids": [stop]})
    assert stopped == free[: free.index(stop) + 1]

    def not_yet(z, output):
        return z.index_fill(0, torch.tensor([1, stop]), float("-inf")) if len(output) < 12 else z

    (later,) = engine.generate([prompt], asked | {"stop_token_ids": [stop], "min_tokens": 12})
    expected = answer(prompt, not_yet)
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
    out = engine.call(generate_json, [encode(f"answer {i}") for i in range(8)], schema, guided(preference=PREFERENCE))
    for tokens in out:
        answer = json.loads(models.tokenizer.decode(tokens, skip_special_tokens=True))
        assert set(answer) == {"a", "b"}
        assert isinstance(answer["a"], int)
        assert answer["b"] in ("x", "y")


def generate_json(llm, prompts: list[list[int]], schema: dict, extra: dict) -> list[list[int]]:
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
        for seed in range(len(prompts))
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
