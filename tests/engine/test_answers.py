"""Tokens of which the reward model has no opinion, and an answer's first token: the real engine against the oracle."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import oracle
from tests.engine.test_no_sync import watch_steps
from tests.support.engine import PLUGIN, Engine, guided, metric, pad_config
from tests.support.models import CHAT_TEMPLATE, make_model, make_tokenizer
from tests.support.pairs import Kind, TokenPair
from tests.support.tokenizers import CHATML

pytestmark = pytest.mark.every_release

TAGS = ("<think>", "</think>")
KNOWS_TAGS = "{# <think> </think> #}"
BARE = (  # an answer begins behind a special token: tokenizers as Llama 2's put a space there
    "{% for m in messages %}{{ '<end_of_turn>' if m.role == 'assistant' else '<start_of_turn>' }}{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<end_of_turn>{% endif %}"
)
INST = (  # or the template writes the space
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% else %}"
    "<|im_start|>{{ m.content }}<|im_end|>Say:{% endif %}{% endfor %}"
)
IM_END = 4
"""ChatML's, of byte-level tokenizers."""
PAIRS = {
    "drop": (Kind("metaspace", 700), Kind("byte-level", 900), (BARE + KNOWS_TAGS, CHATML), ([], [IM_END])),
    "add": (Kind("byte-level", 900), Kind("byte-level", 600), (CHATML + KNOWS_TAGS, INST), ([IM_END], [])),
}
MAX_TOKENS = 24
GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
QUESTIONS = ["Why does the rain fall?", "say why", "1,024 numbers 😀 and", "Ein Gruß aus Österreich"]
REASONING = {"reasoning_config": {"reasoning_start_str": TAGS[0], "reasoning_end_str": TAGS[1]}}
BUDGET = 5
MODES = [
    {"preference": "formal", "beta": 1.5},
    {"beta": 0.5, "top_k": 50},
    {"preference": ("kind", "b"), "reference": "neutral"},
    {"preference": "kind", "reference": "none", "top_k": 50},
]


def ends_reasoning(token: int):
    """What vLLM does where reasoning has begun in the prompt."""
    return lambda output: token if len(output) == BUDGET and token not in output else None


def lists(asked: dict) -> dict:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asked.items()}


@pytest.fixture(scope="module", params=[pytest.param("drop", marks=pytest.mark.one_release), "add"])
def case(request, tmp_path_factory):
    """A pair; prompts, their parameters and what is expected: answers that begin, some with a bias that makes
    ``</think>`` likely, answers that reason on a budget, and a prompt that is no chat."""
    base, reward, templates, ends = PAIRS[request.param]
    root = tmp_path_factory.mktemp("answers")
    pair = TokenPair(root, base, reward, templates=templates, tags=TAGS, first_space=request.param, more_ends=ends)
    start, end = pair.tags.values()
    prompts, params, expected = [], [], []
    for i, asked in enumerate(MODES):
        bias = {end: 8.0} if i % 2 else {}
        prompts.append(pair.chat(QUESTIONS[i]))
        params.append(GREEDY | ({"logit_bias": bias} if bias else {}) | guided(**lists(asked)))
        asked = asked | {"begins_answer": True, "logit_bias": tuple(bias.items())}
        expected.append(pair.answer(prompts[-1], pair.chat(QUESTIONS[i], own=True), MAX_TOKENS, **asked))
    for asked in MODES:
        prompts.append([*pair.prompt(QUESTIONS[0]), start])
        params.append(GREEDY | {"thinking_token_budget": BUDGET} | guided(**lists(asked)))
        read = pair.read(QUESTIONS[0] + TAGS[0])
        expected.append(pair.answer(prompts[-1], read, MAX_TOKENS, force=ends_reasoning(end), **asked))
    prompts.append(pair.prompt("a"))
    params.append(GREEDY | guided(beta=0.5))
    expected.append(pair.expect("a", MAX_TOKENS, beta=0.5))
    assert end in [token for output in expected[: len(MODES)] for token in output]
    assert all(output.index(end) <= BUDGET for output in expected[len(MODES) : -1])
    without = [pair.answer(prompts[i], pair.chat(QUESTIONS[i], own=True), 3, **MODES[i]) for i in (0, 2)]
    assert without != [expected[i][:3] for i in (0, 2)], "the first token's tables say something"
    return pair, prompts, params, expected


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_answers_of_another_tokenizer(case, runner):
    """With blocks of either model taken away and computed again."""
    pair, prompts, params, expected = case
    engine = Engine(
        runner,
        pair.base,
        logits_processors=PLUGIN,
        num_gpu_blocks_override=12,
        block_size=32,
        disable_log_stats=False,
        **REASONING,
        **pad_config(pair.reward),
    )
    try:
        assert engine.generate(prompts, params) == expected
        assert engine.call(metric, "vllm:num_preemptions") > 0
        if runner == "v2":
            first, decoding, lost = engine.call(watch_steps, prompts[:4], params[:4])
            assert (decoding, bool(first), bool(lost)) == ([], True, True)
    finally:
        engine.close()


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_reasoning_ends_where_the_reward_model_does_not_reason(runner, models, tmp_path):
    """The same ordinary tokens; the reward model has no rows for the tags, and the base has tokens before them that are
    no candidates."""
    num_rows = models.reward_model.get_input_embeddings().weight.shape[0]
    base = make_model(tmp_path / "base", seed=0, vocab_size=num_rows + 8)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(num_rows - len(tokenizer))] + list(TAGS) + ["<more>"])
    tokenizer.chat_template = CHAT_TEMPLATE + KNOWS_TAGS
    tokenizer.save_pretrained(base)
    start, end = tokenizer.convert_tokens_to_ids(list(TAGS))
    assert (start, end) == (num_rows, num_rows + 1)
    line_break = models.tokenizer.encode("\n")[-1]
    reads = {start: line_break, end: line_break}
    known = [*range(len(models.tokenizer)), start, end]

    def mask(y, output):
        return torch.full_like(y, float("-inf")).index_copy_(0, torch.tensor(known), y[known])

    base_model = AutoModelForCausalLM.from_pretrained(base)
    prompts, params, expected = [], [], []
    for i in range(6):
        asked = [{"beta": 1.5, "top_k": 50}, {"beta": 0.5}, {"reference": "none"}][i % 3]
        prompts.append(tokenizer.encode(QUESTIONS[i % 4]) + [start] * (i >= 3))
        budget = {"thinking_token_budget": BUDGET} if i >= 3 else {"logit_bias": {end: 5.0}}
        params.append(GREEDY | budget | guided(**asked))
        expected.append(
            oracle.generate(
                base_model,
                prompts[-1],
                MAX_TOKENS,
                reward=models.reward_model,
                no_opinion=reads,
                mask=mask,
                reward_prompt_ids=[reads.get(token, token) for token in prompts[-1]],
                force=ends_reasoning(end) if i >= 3 else None,
                logit_bias=() if i >= 3 else {end: 5.0},
                **asked,
            )
        )
    engine = Engine(
        runner, base, logits_processors=PLUGIN, **REASONING, **pad_config(models.reward),
            )  # fmt: skip
    try:
        assert engine.generate(prompts, params) == expected
    finally:
        engine.close()
    assert sum(end in output for output in expected[:3])
    assert all(output.index(end) <= BUDGET for output in expected[3:])
