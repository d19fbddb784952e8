"""A reward model with another tokenizer: the real engine against the oracle, on both runners."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import oracle
from tests.engine.test_no_sync import watch_steps
from tests.support.engine import (
    A_CORE_EACH,
    ONE_CONTEXT,
    PLUGIN,
    Engine,
    engine_stats,
    guided,
    metric,
    pad_config,
    running_guidance,
)
from tests.support.fixtures import MIX
from tests.support.pairs import Kind, TokenPair

pytestmark = pytest.mark.every_release

MAX_TOKENS = 64
GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
TEXTS = [
    "You are asked to be concise",
    "Ein Gruß aus Österreich: naïve café,",
    "東京の天気は",
    "a",
    "while the rain keeps falling on the old town. " * 3,
    "1,024 numbers 😀 and",
    "[Instruction] say why",
    "Привет, jumps over",
]
PAIRS = {
    "large under small": (Kind("byte-level", 2000), Kind("byte-level", 600), {}, {}),
    # Blocks of either model are taken away and computed again; prompts go in by chunks.
    "small under large": (
        Kind("byte-level", 600),
        Kind("byte-level", 2000),
        {"kv_cache_memory_bytes": ONE_CONTEXT * 5 // 8, "max_num_batched_tokens": 40},
        {"num_gpu_blocks_override": 28, "block_size": 32, "max_num_batched_tokens": 64, "disable_log_stats": False},
    ),
    "SentencePiece under byte-level": (Kind("metaspace", 700), Kind("byte-level", 900), {}, {}),
}
QWEN, GEMMA = Kind("like Qwen's", 606), Kind("like Gemma's", 907)
ADDED = ("<tool_call>", "<think>", "</think>", "    ", "  ", "▁▁", "▁▁▁▁", "\n\n", "<table>", "</table>")
MODES = [
    {},
    {"preference": "concise, formal"},
    {"weights": MIX},
    {"preference": "Please be playful, é.", "weights": MIX},
    {"preference": ("kind", "formal"), "preference_weights": (1.0, -0.5)},
    {"preference": ("kind", "formal", "b"), "reference": "neutral"},
    {"preference": "brief", "reference": "none"},
    {"preference": ("kind", "formal"), "reference": "neutral", "max_divergence": 0.1},
]


CASES = [pytest.param(name, marks=[] if name == "small under large" else pytest.mark.one_release) for name in PAIRS]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    base, reward, pad, engine = PAIRS[request.param]
    return TokenPair(tmp_path_factory.mktemp("pair"), base, reward), pad, engine


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_greedy_equals_oracle(case, runner):
    """Every k with every beta, by preference, prompt, heads, several preferences and references; multi-byte texts;
    unguided requests mixed in."""
    pair, pad, settings = case
    prompts, params, expected = [], [], []
    for i, (top_k, beta) in enumerate(itertools.product([1, 10, 50], [0.0, 0.5, 1.5])):
        text, asked = TEXTS[i % len(TEXTS)], {"top_k": top_k, "beta": beta, **MODES[i % len(MODES)]}
        prompts.append(pair.prompt(text))
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()}
        params.append(GREEDY | guided(**lists))
        expected.append(pair.expect(text, MAX_TOKENS, **asked))
        if i % 6 == 0:
            prompts.append(prompts[-1])
            params.append(GREEDY)
            expected.append(oracle.generate(pair.base_model, prompts[-1], MAX_TOKENS))
    for text in TEXTS[:2]:  # that end, by a token which a bias makes likely, and under penalties
        controls = {"logit_bias": {1: 9.0, 40: -5.0}, "repetition_penalty": 1.2, "frequency_penalty": 0.3}
        prompts.append(pair.prompt(text))
        params.append({"temperature": 0.0, "max_tokens": MAX_TOKENS, **controls, **guided(preference="formal")})
        asked = {"logit_bias": tuple(controls["logit_bias"].items()), "penalties": (0.0, 0.3, 1.2)}
        expected.append(pair.expect(text, MAX_TOKENS, preference="formal", eos_token_id=1, **asked))
    engine = Engine(runner, pair.base, logits_processors=PLUGIN, **settings, **pad_config(pair.reward, **pad))
    try:
        assert engine.generate(prompts, params) == expected
        stats = engine.call(engine_stats)
        assert not pad or engine.call(metric, "vllm:num_preemptions") > 0
        if runner == "v2" and not pad:
            first, decoding, lost = engine.call(
                watch_steps, prompts[:6], [{**asked, "max_tokens": 24} for asked in params[:6]]
            )
            assert decoding == []
            assert first, "a new request's tokens are read once, or nothing was watched"
            assert lost
    finally:
        engine.close()
    assert min(map(len, expected)) < MAX_TOKENS
    assert (stats["evicted"] > 0) == bool(pad)
    assert stats["blocks"] == stats["free_blocks"] + stats["held_blocks"]


@pytest.mark.one_release
@pytest.mark.parametrize(("runner", "base", "reward"), [("v1", QWEN, GEMMA), ("v2", GEMMA, QWEN)])
def test_tokens_that_were_added(runner, base, reward, tmp_path):
    """Special and other tokens beside a model's own vocabulary, and runs of spaces that were added: of texts that have
    them, with a bias that makes them candidates."""
    pair = TokenPair(tmp_path, base, reward)
    vocabulary = pair.base_tokenizer.get_vocab()
    added = [token for token in ADDED if vocabulary.get(token, -1) >= 0 and pair.groups.key[vocabulary[token]] >= 0]
    bias = tuple((vocabulary[token], 4.0) for token in added)
    texts = ["def f(x):\n    if x:\n        return x\n\n", "<table>  東京</table>\n\n", "say why"]
    asked = [
        {"preference": "brief  and    formal", "top_k": 50},
        {"preference": "kind", "reference": "neutral"},
        {"beta": 0.5},
    ]
    engine = Engine(runner, pair.base, logits_processors=PLUGIN, **pad_config(pair.reward, reference="base"))
    try:
        out = engine.generate(
            [pair.prompt(text) for text in texts],
            [GREEDY | {"max_tokens": 24, "logit_bias": dict(bias)} | guided(**each) for each in asked],
        )
    finally:
        engine.close()
    expected = [pair.expect(text, 24, logit_bias=bias, **each) for text, each in zip(texts, asked, strict=True)]
    assert out == expected
    written = {i for ids in expected for i in ids}
    assert len([token for token in added if vocabulary[token] in written]) >= 3


@pytest.mark.one_release
@pytest.mark.parametrize("case", ["small under large"], indirect=True)
def test_the_reward_model_drafts(case):
    """Greedy output is that without drafts, whatever is guided, and drafts are accepted where they are the rule's."""
    pair, pad, settings = case
    prompts, params, expected = [], [], []
    for i, asked in enumerate(MODES):
        asked = {"beta": (1.0, 0.5)[i % 2], "top_k": (500, 10)[i % 2], **asked}
        prompts.append(pair.prompt(TEXTS[i]))
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()}
        params.append(GREEDY | {"max_tokens": 20} | guided(**lists))
        expected.append(pair.expect(TEXTS[i], 20, **asked))
    prompts.append(pair.prompt(TEXTS[0]))
    params.append(GREEDY | {"max_tokens": 20})
    expected.append(oracle.generate(pair.base_model, prompts[-1], 20))
    drafts = {"method": "draft_model", "model": str(pair.reward), "num_speculative_tokens": 3}
    engine = Engine(
        "v2",
        pair.base,
        logits_processors=PLUGIN,
        speculative_config=drafts | {"use_heterogeneous_vocab": True},
        **settings | {"disable_log_stats": False},
        **pad_config(pair.reward, max_top_k=500, **pad),
    )
    try:
        assert engine.generate(prompts, params) == expected
        assert engine.call(metric, "vllm:spec_decode_num_accepted_tokens") >= 5
        stats = engine.call(engine_stats)
        if not pad:
            assert engine.call(watch_steps, prompts, params)[1] == []
    finally:
        engine.close()
    assert stats["blocks"] == stats["free_blocks"] + stats["held_blocks"]


def permuted(model: Path, folder: Path) -> Path:
    """The same model, but that its ordinary tokens have other ids."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    first = 1 + max(token["id"] for token in settings["added_tokens"])
    moved = {i: len(vocabulary) - 1 - (i - first) if i >= first else i for i in vocabulary.values()}
    settings["model"]["vocab"] = {token: moved[i] for token, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    tensors = load_file(folder / "model.safetensors")
    to = torch.tensor([moved.get(i, i) for i in range(512)])
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.empty_like(tensors[name]).index_copy_(0, to, tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.one_release
def test_with_equal_tokenizers_it_is_the_ordinary_rule(models, encode, expect, tmp_path):
    """A reward model that is the tests' own but for its tokens' numbers says what that says by the ordinary rule."""
    reward = permuted(models.reward, tmp_path / "permuted")
    ordinary = [i for i in models.tokenizer.get_vocab().values() if i == 1 or i > 4]

    def mask(y, output):
        """Special tokens, and rows of none, are no candidates of two tokenizers."""
        return torch.full_like(y, float("-inf")).index_copy_(0, torch.tensor(ordinary), y[ordinary])

    texts = ["You are asked to be concise", "The quick brown fox", "a"]
    asked = [
        {"preference": "formal", "beta": 1.5, "top_k": 50},
        {"beta": 0.5},
        {"preference": "kind", "reference": "neutral"},
    ]
    engine = Engine("v1", models.base, logits_processors=PLUGIN, **pad_config(reward))
    try:
        out = engine.generate([encode(text) for text in texts], [GREEDY | guided(**each) for each in asked])
    finally:
        engine.close()
    assert out == [
        expect(encode(text), mask=mask, max_tokens=MAX_TOKENS, **each) for text, each in zip(texts, asked, strict=True)
    ]


@pytest.mark.one_release
def test_tensor_parallelism(tmp_path, monkeypatch):
    """Two ranks, each with its part of the reward vocabulary: a group's members may stand on both."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", A_CORE_EACH)
    pair = TokenPair(tmp_path, Kind("metaspace", 700), Kind("byte-level", 900))
    asked = [{"preference": "formal", "beta": 1.5}, {"top_k": 50}, {"weights": MIX, "reference": "neutral"}]
    engine = Engine(
        "v1",
        pair.base,
        multiprocess=True,
        tensor_parallel_size=2,
        logits_processors=PLUGIN,
        **pad_config(pair.reward),
    )
    try:
        out = engine.generate(
            [pair.prompt(text) for text in TEXTS[:3]], [GREEDY | {"max_tokens": 16} | guided(**each) for each in asked]
        )
    finally:
        engine.close()
    assert out == [pair.expect(text, 16, **each) for text, each in zip(TEXTS[:3], asked, strict=True)]


@pytest.mark.one_release
def test_a_full_context_ends_its_request_and_no_other(tmp_path):
    """A text longer in the reward model's tokens than it has positions for, beside one that has room."""
    pair = TokenPair(tmp_path, Kind("byte-level", 2000), Kind("byte-level", 600), positions=180)
    prompt, params = pair.prompt(TEXTS[0]), {"temperature": 0.0, "max_tokens": 90}
    settings = {"beta": 0.5, "preference": "formal"}
    engine = Engine("v1", pair.base, logits_processors=PLUGIN, max_model_len=100, **pad_config(pair.reward))
    nothing = {"weights": MIX, "reference": "neutral"}  # what is read with the preference and without it is the same
    try:
        full, short, cancelled = engine.generate(
            [prompt] * 3,
            [
                params | guided(**settings),
                GREEDY | {"max_tokens": 20} | guided(**settings),
                params | {"ignore_eos": True} | guided(**nothing),
            ],
        )
    finally:
        engine.close()
    expected = pair.expect(TEXTS[0], len(full), **settings)
    num_guided = next(i for i in range(90) if cancelled[i:] == [1] * (90 - i))
    assert 0 < num_guided < 90
    assert cancelled[:num_guided] == pair.expect(TEXTS[0], num_guided, **nothing)
    assert len(full) < 90
    assert full == [*expected[:-1], 1]
    read = sum(len(pair.groups.pieces[token]) for token in full[:-1])
    assert 60 < read < 180
    assert short == expected[:20]


@pytest.mark.one_release
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_a_full_context_that_lost_its_blocks_leaves_others_alone(tmp_path, runner):
    """It is laid out again within its block table, what a resumed request had generated included; with pools too short
    for two, and vLLM's own cache too."""
    pair = TokenPair(tmp_path, Kind("byte-level", 2000), Kind("byte-level", 600), positions=512)
    pieces = pair.groups.pieces
    longest = max(range(len(pieces)), key=lambda c: len(pieces[c]) if pair.groups.key[c] >= 0 else 0)
    engine = Engine(
        runner,
        pair.base,
        logits_processors=PLUGIN,
        block_size=32,
        max_num_batched_tokens=256,
        num_gpu_blocks_override=12,
        disable_log_stats=False,
        **pad_config(pair.reward, kv_cache_memory_bytes=ONE_CONTEXT // 2),
    )
    prompt, plain = pair.prompt("say why"), GREEDY | {"max_tokens": 200}
    long, other = plain | guided(preference="a") | {"allowed_token_ids": [longest]}, plain | guided(preference="kind")
    try:
        (alone,) = engine.generate([prompt], other)
        full, beside = engine.generate([prompt] * 2, [long, other])
        assert engine.call(metric, "vllm:num_preemptions") > 0
        assert engine.call(failed_requests) == 0
    finally:
        engine.close()
    assert beside == alone == pair.expect("say why", 200, preference="kind")
    num_guided = full.index(1)
    assert full == [longest] * num_guided + [1] * (200 - num_guided)
    assert 0 < num_guided < 180


def failed_requests(llm) -> float:
    return running_guidance(llm).stats.failed_requests


@pytest.mark.one_release
def test_drafts_are_verified_by_groups_with_triton(tmp_path):
    """A draft model's tokens, each of several pieces, on Model Runner V2 with the kernels that a GPU runs."""
    pair = TokenPair(tmp_path, Kind("byte-level", 2000), Kind("byte-level", 600))
    asked = [{"preference": "formal", "beta": 0.5}, {"preference": ("kind", "b"), "reference": "neutral"}]
    plain = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
    params = [
        plain | guided(preference="formal", beta=0.5),
        plain | guided(preference=["kind", "b"], reference="neutral"),
    ]
    drafts = {"method": "draft_model", "model": str(pair.base), "num_speculative_tokens": 2}
    engine = Engine(
        "v2",
        pair.base,
        kernels="triton",
        logits_processors=PLUGIN,
        speculative_config=drafts,
        max_num_seqs=3,
        **pad_config(pair.reward, max_top_k=10),
    )
    try:
        out = engine.generate([pair.prompt(text) for text in TEXTS[:3]], [*params, plain])
    finally:
        engine.close()
    assert out[:2] == [pair.expect(text, 6, **each) for text, each in zip(TEXTS[:2], asked, strict=True)]
    assert out[2] == oracle.generate(pair.base_model, pair.prompt(TEXTS[2]), 6)
