"""How a preference enters the reward model's prompt."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer

from pad_vllm.reward.memo import Memo, size_of
from pad_vllm.reward.template import CHUNK, DEFAULT_PROMPT_TEMPLATE, MAX_SPELLED, PromptTemplate, _any_of

BOS, EOS, USER = 0, 1, 3
PROMPT = [BOS, 50, 60, 70]


@pytest.fixture
def make(models):
    return lambda template=DEFAULT_PROMPT_TEMPLATE, insert_after=None: PromptTemplate(
        models.tokenizer, template, insert_after
    )


def plain(models, text):
    return models.tokenizer.encode(text, add_special_tokens=False)


def test_default_template_is_the_released_wrapping(models, make):
    before = plain(
        models,
        "[Guidelines] Your task is to generate response by considering the following principle. "
        "[Principles] concise, formal [Instruction] ",
    )
    assert make().compose(PROMPT, "concise, formal") == [BOS, *before, 50, 60, 70]
    assert make().compose(PROMPT[1:], "concise, formal") == [*before, 50, 60, 70]


def test_text_after_the_prompt_stands_before_the_generated_tokens(models, make):
    composed = make("{preference}: {prompt} ({preference})").compose(PROMPT, "formal")
    assert composed == [BOS, *plain(models, "formal: "), 50, 60, 70, *plain(models, " (formal)")]


def test_insert_after_goes_inside_the_user_turn(models, make):
    chat = models.tokenizer.apply_chat_template([{"role": "user", "content": "say why"}], tokenize=True)["input_ids"]
    assert chat[:2] == [BOS, USER]
    composed = make("[{preference}] {prompt}", "<|user|>").compose(chat, "formal")
    assert composed == [BOS, USER, *plain(models, "[formal] "), *chat[2:]]
    elsewhere = make("[{preference}] {prompt}", "<|user|>").compose(PROMPT, "formal")
    assert elsewhere == [BOS, *plain(models, "[formal] "), 50, 60, 70]


@pytest.mark.parametrize(
    "preference", ["<|user|>", "concise</s><s>", "<|us", "<", "</s", "a<pad>b", "{prompt}", "{preference} <s>"]
)
@pytest.mark.parametrize(
    "template", [DEFAULT_PROMPT_TEMPLATE, "<|user|>{preference}er|> {prompt}", "<{preference}s> {prompt}"]
)
def test_a_preference_is_plain_text(models, make, preference, template):
    """It never becomes a special token, not even with the help of the template around it; and nothing is lost."""
    template = make(template)
    composed = template.compose(PROMPT, preference)
    special = set(models.tokenizer.all_special_ids)
    own = [i for i in plain(models, template.before.replace("{preference}", "\0")) if i in special]
    assert [i for i in composed[1:-3] if i in special] == own
    text = models.tokenizer.decode(composed[1:-3])
    assert text == template.before.replace("{preference}", preference)


def test_special_tokens_of_the_template_count(models, make):
    composed = make("<|user|>{preference}</s>{prompt}").compose(PROMPT, "a<s>")
    assert composed == [BOS, USER, *models.tokenizer.encode("a<s>", split_special_tokens=True), EOS, 50, 60, 70]


def test_num_added_tokens(make):
    template = make("{preference} | {prompt} | {preference}")
    assert template.num_added_tokens("formal") == len(template.compose(PROMPT, "formal")) - len(PROMPT)


@pytest.mark.parametrize("template", ["{preference}", "{preference}{prompt}{prompt}", "{prompt}", ""])
def test_malformed_templates_are_refused(make, template):
    with pytest.raises(ValueError, match="must contain"):
        make(template)


@pytest.mark.parametrize(
    "preference", ["<think>", "be brief</think><tool_call>x", "<<think>think>", "a  b <think", "<"]
)
@pytest.mark.parametrize("template", [DEFAULT_PROMPT_TEMPLATE, "<think>{preference}think> {prompt}"])
def test_a_preference_cannot_spell_control_tokens_that_are_not_marked_special(models, preference, template):
    """As Qwen3's; those that the template spells count. Runs of spaces are added tokens too, and no control."""
    tokenizer = AutoTokenizer.from_pretrained(models.reward)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "  "])
    control = set(tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<tool_call>"]))
    template = PromptTemplate(tokenizer, template)
    composed = template.compose(PROMPT, preference)
    assert sum(i in control for i in composed) == template.before.count("<think>")
    assert tokenizer.decode(composed[1:-3]) == template.before.replace("{preference}", preference)
    assert (tokenizer.convert_tokens_to_ids("  ") in composed) == ("  " in preference)


def test_special_tokens_are_found_by_one_pattern_longest_first(models, make):
    """Of thousands, among which some begin others; a character is not compared to each of them."""
    tokens = ["<a>", "<ab>", "<abc", "<a", "=", "==", "====", ".*", *(f"<unused{i}>" for i in range(6000))]
    pattern = _any_of(tokens)
    known, lengths = set(tokens), sorted({len(token) for token in tokens}, reverse=True)
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices([*"<ab>c=.*u1", "<unused", "<unused12>", "<ab"], k=30))
        found, i = [], 0
        while i < len(text):
            token = next((text[i : i + n] for n in lengths if text[i : i + n] in known), None)
            found += [token] if token else []
            i += len(token or "x")
        assert pattern.findall(text) == found
    assert _any_of([]).findall("a") == []
    assert _any_of(["=" * n for n in range(1, 600)]).findall("=" * 1100) == ["=" * 599, "=" * 501]


def test_a_preference_that_is_far_too_long_is_not_read_to_its_end(models, make):
    template = make()
    template.max_preference_tokens = 100
    read = []
    encode = template.tokenizer.encode
    template.tokenizer.encode = lambda text, **kwargs: read.append(len(text)) or encode(text, **kwargs)
    try:
        for text in ("12345678" * 4000, "<|user|></s>" * 4000):
            read.clear()
            with pytest.raises(ValueError, match=r"pad_preference: .* at most \d+ are allowed"):
                template.encode_preference(text)
            assert sum(read) <= 2 * CHUNK
        read.clear()
        template.encode_preference("</s>" * MAX_SPELLED)
        assert len(read) < 4 * MAX_SPELLED
    finally:
        del template.tokenizer.encode


def test_what_is_kept_is_bounded_by_its_size():
    memo = Memo(lambda text: (tuple(range(1000, 1000 + len(text))), ()), 2**20, size_of)
    for i in range(2000):
        memo(f"{i:04d}" * 100)
        assert memo.num_bytes <= 2**20
    assert 20 < len(memo) < 200
    calls = []
    memo = Memo(lambda text: calls.append(text) or len(text), 10_000, size_of)
    assert [memo(text) for text in ("a", "b", "a", "x" * 20_000, "x" * 20_000, "a")] == [1, 1, 1, 20_000, 20_000, 1]
    assert calls == ["a", "b", "x" * 20_000, "x" * 20_000]
