"""The real engine against the oracle, on both runners, in every mode."""

from __future__ import annotations

import itertools

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests import oracle
from tests.support.engine import ONE_CONTEXT, PLUGIN, Engine, engine_stats, guided, pad_config, running_guidance
from tests.support.fixtures import MAX_TOKENS, MIX, Models
from tests.support.statistics import chi_squared

pytestmark = pytest.mark.every_release

GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
PROMPTS = [
    "You are asked to be concise",
    "The quick brown fox",
    "Preferences are given as text",
    "a",
    "while the rain keeps falling on the old town. " * 4,
    "answer",
    "[Instruction] say why",
    "jumps over the lazy dog",
]
PREFERENCES = ["concise, formal", "Please be playful, and give an example."]
TOP_K = [1, 10, 50]
BETA = [0.0, 0.5, 1.0, 1.5]


@pytest.fixture(scope="module")
def named_engine(models: Models, runner: str):
    """Several named heads; listed in logits_processors and registered as an entry point at once."""
    personas = {
        "terse": {"pad_preference": PREFERENCES[0], "pad_beta": 1.5},
        "mixed": {"weights": list(MIX), "top_k": 20},
    }
    engine = Engine(runner, models.base, logits_processors=PLUGIN, **pad_config(models.named, personas=personas))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def released_engine(models: Models):
    """The released layout, registered as an entry point alone, with a KV cache far too small for its batches. (On V2:
    test_lifecycle.py.)"""
    pad = {"kv_cache_memory_bytes": ONE_CONTEXT * 5 // 4, "max_num_batched_tokens": 40, "reference": "none"}
    engine = Engine("v1", models.base, **pad_config(models.released, **pad))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain_engine(models: Models):
    """The plugin installed, and not configured."""
    engine = Engine("v1", models.base)
    yield engine
    engine.close()


MODES = ["preference", "prompt", "weights", "both"]
BOUNDED = [
    {"preference": PREFERENCES[0], "beta": 2.5, "max_divergence": 0.3},
    {"preference": PREFERENCES, "reference": "neutral", "beta": 2.5, "max_divergence": 0.05, "top_k": 20},
    {"preference": PREFERENCES, "preference_weights": [1, -1], "reference": "none", "max_divergence": 0.02},
]


def every_mode(encode, expect, max_tokens: int, thin: bool = False) -> tuple[list, list, list]:
    """Prompts, parameters and the oracle's answers: every k and beta, with and without preference and head, guided
    and unguided mixed; and with a bound. ``thin``: each k with each beta, and each of them with each mode, but not all
    three."""
    prompts, params, expected = [], [], []
    cases = list(itertools.product(TOP_K, BETA, MODES))
    if thin:
        cases = [case for case in cases if (TOP_K.index(case[0]) + BETA.index(case[1]) + MODES.index(case[2])) % 3 == 0]
    for i, (top_k, beta, mode) in enumerate(cases):
        prompt = encode(PROMPTS[i % len(PROMPTS)])
        preference = PREFERENCES[i % 2] if mode in ("preference", "both") else None
        head = "mixed" if mode in ("weights", "both") else None
        arguments = {"top_k": top_k, "beta": beta}
        arguments |= {"preference": preference} if preference else {}
        arguments |= {"weights": list(MIX)} if head else {}
        prompts.append(prompt)
        params.append(GREEDY | {"max_tokens": max_tokens} | guided(**arguments))
        expected.append(expect(prompt, preference=preference, head=head, top_k=top_k, beta=beta)[:max_tokens])
        if i % 6 == 0:
            prompts.append(prompt)
            params.append(GREEDY | {"max_tokens": max_tokens})
            expected.append(expect(prompt, guided=False)[:max_tokens])
    for prompt, asked in zip(map(encode, PROMPTS), BOUNDED, strict=False):
        prompts.append(prompt)
        params.append(GREEDY | {"max_tokens": max_tokens} | guided(**asked))
        expected.append(expect(prompt, **asked)[:max_tokens])
    return prompts, params, expected


def test_greedy_equals_oracle_in_every_mode_in_one_batch(encode, expect, named_engine, runner):
    # On V2 in the interpreter, whose time is by the token: fewer of them. On V1 all combinations.
    prompts, params, expected = every_mode(encode, expect, 24 if runner == "v2" else MAX_TOKENS, thin=runner == "v2")
    assert named_engine.generate(prompts, params) == expected
    assert named_engine.call(engine_stats)["copies"] == 1


@pytest.mark.one_release
def test_triton_kernels_in_the_engine(models, encode, expect):
    """Model Runner V2 with the Triton kernels, all in the interpreter: the plugin as a GPU runs it."""
    # The interpreter takes its time: no more rows at the start than there are requests, and few tokens.
    engine = Engine(
        "v2", models.base, kernels="triton", max_num_seqs=8, logits_processors=PLUGIN, **pad_config(models.named)
    )
    prompts, params, expected = every_mode(encode, expect, max_tokens=3, thin=True)
    longer = [(encode(text), preference) for text, preference in zip(PROMPTS[:2], PREFERENCES, strict=True)]
    try:
        assert engine.call(running_kernels) == "triton"
        assert engine.generate(prompts, params) == expected
        asked = [GREEDY | {"max_tokens": 24} | guided(preference=text) for _, text in longer]
        assert engine.generate([p for p, _ in longer], asked) == [
            expect(p, preference=text, max_tokens=24) for p, text in longer
        ]
    finally:
        engine.close()


def running_kernels(llm) -> str:
    return running_guidance(llm).rule.kernels


def test_personas(encode, expect, named_engine):
    prompt = encode(PROMPTS[0])
    out = named_engine.generate(
        [prompt] * 3,
        [
            GREEDY | guided(persona="terse"),
            GREEDY | guided(persona="mixed"),
            GREEDY | guided(persona="terse", beta=0.5, top_k=3),
        ],
    )
    assert out == [
        expect(prompt, preference=PREFERENCES[0], beta=1.5),
        expect(prompt, head="mixed", top_k=20),
        expect(prompt, preference=PREFERENCES[0], beta=0.5, top_k=3),
    ]


@pytest.mark.one_release
def test_prefix_is_shared_between_requests(encode, compose, named_engine):
    """A prompt seen again costs its tail: 32-token blocks of an equal prefix are reused, and nothing changes."""
    prompt = encode(PROMPTS[4])
    params = GREEDY | guided(preference=PREFERENCES[1])
    first = named_engine.generate([prompt], params)
    before = named_engine.call(engine_stats)
    assert named_engine.generate([prompt], params) == first
    after = named_engine.call(engine_stats)
    composed = len(compose(prompt, PREFERENCES[1]))
    reused = (composed - 1) // 32 * 32
    assert after["prefix_hits"] - before["prefix_hits"] == reused >= 64
    assert after["tokens"] - before["tokens"] == composed - reused + MAX_TOKENS - 1


@pytest.mark.one_release
def test_tenants_share_no_block(encode, named_engine):
    """Neither a prompt's blocks nor a preference's end within one, also where they come at once; equal salts do."""
    prompt, hits = encode(PROMPTS[4]), []
    asked = {"preference": PREFERENCES[1], "reference": "neutral"}
    salts = ["one", "other"], ["one", "other"], ["third", "third"]
    outputs = []
    for pair in salts:
        before = named_engine.call(engine_stats)["prefix_hits"]
        params = [GREEDY | guided(**asked, cache_salt=salt) for salt in pair]
        outputs += named_engine.generate([prompt] * 2, params)
        hits.append(named_engine.call(engine_stats)["prefix_hits"] - before)
    assert outputs == outputs[:1] * 6
    assert hits[0] == 0 < hits[2] < hits[1]


@pytest.mark.one_release
def test_released_head_under_a_short_pool(encode, expect, released_engine):
    """Sixteen sequences in a pool of a few, chunked prefill, reference mode none: slower, never wrong."""
    prompts = [encode(text) for text in PROMPTS] * 2
    params, expected = [], []
    for i, prompt in enumerate(prompts):
        asked = {"preference": PREFERENCES[i % 2] + " more" * i, "beta": 0.8, "reference": "none"}
        if i == 5:
            asked |= {"preference": [*PREFERENCES, "kind", "brief"], "reference": "neutral"}
        params.append(GREEDY | guided(**asked))
        expected.append(expect(prompt, head="released", **asked))
    assert released_engine.generate(prompts, params) == expected
    stats = released_engine.call(engine_stats)
    assert stats["evicted"] > 0
    assert stats["blocks"] == stats["free_blocks"] + stats["held_blocks"]


@pytest.mark.one_release
def test_a_plugin_that_is_not_configured_changes_nothing(models, encode, plain_engine):
    """Unguided requests beside guided ones are in every_mode."""
    prompts = [encode(text) for text in PROMPTS]
    alone = plain_engine.generate(prompts, GREEDY)
    assert alone == [oracle.generate(models.base_model, p, MAX_TOKENS) for p in prompts]


@pytest.mark.one_release
def test_guided_request_stops_at_eos(encode, expect, named_engine):
    """The released loop has no EOS stop; we have. The token that ends it is made the only candidate's."""
    prompts = [encode(text) for text in PROMPTS[4:7]]
    expected = [expect(p, preference="formal", top_k=50, beta=1.5, max_tokens=32, eos_token_id=1) for p in prompts]
    assert min(map(len, expected)) < 32
    params = {"temperature": 0.0, "max_tokens": 32} | guided(preference="formal", top_k=50, beta=1.5)
    assert named_engine.generate(prompts, params) == expected


@pytest.mark.one_release
def test_not_configured_refuses_guidance(encode, plain_engine):
    with pytest.raises(VLLMValidationError, match="without a reward model"):
        plain_engine.generate([encode("a")], GREEDY | guided(preference="formal"))
    assert len(plain_engine.generate([encode("a")], GREEDY)[0]) == MAX_TOKENS


@pytest.mark.one_release
def test_sampled_distribution(models, encode, compose, named_engine, runner):
    """Temperature 0.8: next tokens of seeded requests against the oracle's softmax, by chi-squared at 0.1%."""
    prompt, preference, temperature = encode(PROMPTS[0]), "formal", 0.8
    num_samples = 1000 if runner == "v1" else 300
    z = models.base_model(torch.tensor([prompt])).logits[0, -1].detach()
    r = oracle.reward_logits(models.reward_model, compose(prompt, preference)).detach()
    expected = torch.softmax(oracle.guided_logits(z, r, top_k=10, beta=0.3) / temperature, 0)
    params = [
        {"temperature": temperature, "max_tokens": 1, "seed": seed, **guided(preference=preference, beta=0.3)}
        for seed in range(num_samples)
    ]
    sampled = [out[0] for out in named_engine.generate([prompt] * num_samples, params)]
    assert chi_squared(sampled, expected) > 1e-3


BAD_REQUESTS = [
    ({"pad_preference": 3}, "pad_preference=3: must be a string"),
    ({"pad_preference": " "}, "pad_preference=' ': must not be empty"),
    ({"pad_preference": "\ud800"}, "lone surrogate"),
    ({"pad_preference": "very " * 1200}, "tokens, at most"),
    ({"pad_persona": "tirse"}, "did you mean 'terse'"),
    ({"pad_cache_salt": 7}, "pad_cache_salt=7: must be a string"),
    ({"pad_beta": "strong"}, "pad_beta='strong': must be a number"),
    ({"pad_beta": -1}, "pad_beta=-1: must be between 0 and 100"),
    ({"pad_beta": float("nan")}, "pad_beta=nan"),
    ({"pad_max_divergence": -1}, "pad_max_divergence=-1: must be between 0 and 1000"),
    ({"pad_top_k": 65}, "pad_top_k=65: must be between 1 and 64"),
    ({"pad_top_k": 0}, "pad_top_k=0: must be at least 1"),
    ({"pad_top_k": True}, "pad_top_k=True: must be an integer"),
    ({"pad_weights": [1.0]}, "1 weights for 3 value heads .concise, formal, playful."),
    ({"pad_weights": []}, "must be a list of numbers"),
    ({"pad_weights": [1, 2, "x"]}, r"pad_weights\[2\]='x'"),
    ({"pad_prefrence": "formal"}, "did you mean 'pad_preference'"),
    ({"pad_persona": None}, "pad_persona=None"),
    ({"pad_preference": ["a"] * 9}, "pad_preference: a list of 9 texts; from 1 to 8"),
    ({"pad_preference": []}, "pad_preference: a list of 0 texts"),
    ({"pad_preference": ["a", 1]}, r"pad_preference\[1\]=1: must be a string"),
    ({"pad_preference_weights": [1.0]}, "pad_preference_weights: there is no preference to weigh"),
    ({"pad_preference": ["a", "b"], "pad_preference_weights": [1]}, "pad_preference_weights: 1 weights for 2"),
    ({"pad_preference": "a", "pad_preference_weights": [float("nan")]}, r"pad_preference_weights\[0\]=nan"),
    ({"pad_preference": "a", "pad_preference_weights": [[1]]}, r"pad_preference_weights\[0\]=\[1\]: must be a number"),
    ({"pad_reference": "neutrl"}, "pad_reference='neutrl': must be one of base, neutral, none"),
]


def test_bad_requests_are_refused_and_the_engine_goes_on(encode, expect, named_engine):
    prompt = encode("a")
    for extra_args, message in BAD_REQUESTS:
        with pytest.raises(VLLMValidationError, match=message):
            named_engine.generate([prompt], GREEDY | {"extra_args": extra_args})
    expected = expect(prompt, preference="formal")
    assert named_engine.generate([prompt], GREEDY | guided(preference="formal")) == [expected]


def set_embedding(llm, token: int, value: list[float]) -> list[float]:
    """Of the reward model; returns what was there. What was computed with it is forgotten."""
    guidance = running_guidance(llm)
    row = guidance.model.model.model.embed_tokens.weight.data[token]
    before = row.tolist()
    row.copy_(torch.tensor(value))
    guidance.engine.blocks.reset()
    return before


@pytest.mark.one_release
def test_a_reward_that_is_no_number_ends_its_request_and_no_other(models, encode, expect, named_engine):
    """The reward model's states become NaN for whoever reads one token; nobody looks at them on the host."""
    good = encode(PROMPTS[0])
    expected = expect(good, preference="formal")
    token = next(i for i in range(100, 200) if i not in {*expected, *good})
    bad = [*encode(PROMPTS[1]), token]
    sound = named_engine.call(set_embedding, token, [float("nan")] * 64)
    try:
        ended, guided_on, unguided = named_engine.generate(
            [bad, good, bad],
            [
                {"temperature": 0.0, "max_tokens": 8} | guided(preference="formal"),
                GREEDY | guided(preference="formal"),
                GREEDY,
            ],
        )
    finally:
        named_engine.call(set_embedding, token, sound)
    assert ended == [models.tokenizer.eos_token_id]
    assert guided_on == expected
    assert unguided == oracle.generate(models.base_model, bad, MAX_TOKENS)


def break_reward_model(llm) -> None:
    """Make the reward model's next forward fail, once."""
    model = running_guidance(llm).model
    forward = type(model).forward

    def fail(batch):
        model.forward = forward.__get__(model)
        raise RuntimeError("broken on purpose")

    model.forward = fail


def test_a_failure_in_a_step_ends_its_guided_requests_and_nothing_else(models, encode, expect, named_engine):
    """Fail closed: never unguided, never a dead engine."""
    prompts = [encode("a"), encode("answer")]
    named_engine.call(break_reward_model)
    params = {"temperature": 0.0, "max_tokens": 8}
    ended, unguided = named_engine.generate(prompts, [params | guided(preference="formal"), params])
    assert ended == [models.tokenizer.eos_token_id]
    assert unguided == oracle.generate(models.base_model, prompts[1], 8, eos_token_id=1)
    again = named_engine.generate([prompts[0]], GREEDY | guided(preference="formal"))
    assert again == [expect(prompts[0], preference="formal")]
