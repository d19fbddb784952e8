"""Prompts from one chat template to another: what the reward model's own template and tokenizer would have written."""

from __future__ import annotations

import time

import pytest

from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.translation import PromptTranslator
from tests.support.tokenizers import CHATML, TURNS, make

SAID = {
    "system": "Be kind.\nAlways.",
    "user": "How is the weather in 東京, <start_of_turn> and <|im_end|>?",
    "assistant": "Fine, naïve 😀!",
}
TALKS = [
    ["user"],
    ["user", "assistant", "user"],
    ["system", "user"],
    ["system", "user", "assistant", "user"],
]


def translator(base: tuple, reward: tuple) -> PromptTranslator:
    """Between tokenizers of (kind, size, chat template)."""
    return PromptTranslator(ByteTokens(make(*base), "base"), ByteTokens(make(*reward), "reward"), {1: 1})


@pytest.fixture(scope="module")
def to_turns() -> PromptTranslator:
    return translator(("byte-level", 600, CHATML), ("replace", 900, TURNS))


@pytest.fixture(scope="module")
def to_chatml() -> PromptTranslator:
    return translator(("replace", 900, TURNS), ("byte-level", 600, CHATML))


def messages(roles: list[str], content: str | None = None) -> list[dict]:
    return [{"role": role, "content": content or SAID[role]} for role in roles]


def render(tokenizer, talk: list[dict], **how) -> list[int]:
    return tokenizer.apply_chat_template(talk, return_dict=False, **how)


def as_text(translator: PromptTranslator, ids: list[int]) -> str:
    return translator.reward.tokenizer.decode(ids)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("roles", TALKS, ids=" ".join)
def test_a_chat_is_written_as_the_other_template_writes_it(roles, generate, to_turns, to_chatml):
    """A system turn, where there is none, opens the user's; what spells a marker is text."""
    talk = messages(roles)
    ids = to_turns.translate(render(to_turns.base.tokenizer, talk, add_generation_prompt=generate))
    merged = talk
    if roles[0] == "system":
        merged = [{"role": "user", "content": f"{SAID['system']}\n\n{SAID['user']}"}, *talk[2:]]
    expected = to_turns.reward.tokenizer.apply_chat_template(merged, tokenize=False, add_generation_prompt=generate)
    assert as_text(to_turns, ids) == expected
    num_special = sum(i in to_turns.reward.special_ids for i in ids)
    assert num_special == 1 + 2 * len(merged) + generate, "and those spelled in a content are not among them"
    if roles[0] != "system":
        ids = to_chatml.translate(render(to_chatml.base.tokenizer, talk, add_generation_prompt=generate))
        rendered = to_chatml.reward.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=generate)
        assert as_text(to_chatml, ids) == rendered


def test_ids_are_those_of_the_tokenizer_itself(to_turns, to_chatml):
    talk = messages(["user", "assistant", "user"], "What is a bank?")
    for both in (to_turns, to_chatml):
        base, reward = both.base.tokenizer, both.reward.tokenizer
        expected = render(reward, talk, add_generation_prompt=True)
        assert both.translate(render(base, talk, add_generation_prompt=True)) == expected


def test_an_answer_that_was_begun_goes_on(to_chatml):
    begun = render(to_chatml.base.tokenizer, messages(["user"]), add_generation_prompt=True)
    begun += to_chatml.base.encode_one(b"It is ")
    assert as_text(to_chatml, to_chatml.translate(begun)).endswith("<|im_start|>assistant\nIt is ")


def test_what_has_no_counterpart_stays_as_text(to_turns):
    """Tools that a template describes, and a role that it does not know."""
    base = to_turns.base.tokenizer
    text = "<|im_start|>system\nTools: f<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    ids = base.encode(text + "<|im_start|>assistant\n", add_special_tokens=False)
    written = as_text(to_turns, to_turns.translate(ids))
    assert written.startswith("<s><start_of_turn>user\nTools: f")
    assert written.endswith("Hi<end_of_turn>\n<start_of_turn>model\n")
    assert "tool\n42" in written


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "replace", "unigram"])
def test_plain_text(kind):
    """Its own BOS where there was one; the same text, also where it is no text: a prompt of odd tokens."""
    both = translator(("metaspace", 700, None), (kind, 900, None))
    base, reward = both.base.tokenizer, both.reward.tokenizer
    text = "The weather in 東京: naïve."
    assert both.translate(base.encode("<s>" + text)) == reward.encode("<s>" + text)
    assert both.translate(base.encode(text)) == reward.encode(text)
    odd = [*both.base.encode_one(b"a\xe6\x9d"), *base.encode("</s>", add_special_tokens=False), 10**9, -1]
    translated = both.translate(odd)
    assert both.reward.decode(translated).lstrip() == b"a\xe6\x9d"
    assert translated[-1] == 1
    assert both.translate([]) != []


SYSTEM_LAST = (  # as Mistral Nemo's: the system text opens the last user's turn
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<start_of_turn>{{ system ~ '\n\n' if system and loop.last else '' }}{{ m.content }}"
    "<end_of_turn>{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("roles", TALKS, ids=" ".join)
def test_contents_stand_where_the_reward_models_template_puts_them(roles):
    """Also in another order."""
    both = translator(("byte-level", 600, CHATML), ("replace", 900, SYSTEM_LAST))
    talk = messages(roles)
    ids = both.translate(render(both.base.tokenizer, talk, add_generation_prompt=True))
    assert as_text(both, ids) == both.reward.tokenizer.apply_chat_template(talk, tokenize=False)


def test_a_chat_is_read_in_a_time_that_grows_with_its_length(to_turns):
    """Everybody waits for it."""
    talk = messages(["user", "assistant"] * 2000 + ["user"], "a")
    ids = render(to_turns.base.tokenizer, talk, add_generation_prompt=True)
    start = time.thread_time()
    translated = to_turns.read(ids)
    assert time.thread_time() - start < 3
    assert translated.begins_answer
    rendered = to_turns.reward.tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert as_text(to_turns, translated.ids) == rendered
