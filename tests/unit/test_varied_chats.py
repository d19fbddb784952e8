"""What a template writes on another day, for other requests: where a preference stands then, and what is translated."""

from __future__ import annotations

import copy
import random
import re

import pytest

from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.chat import MAX_KINDS
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.reward.translation import PromptTranslator
from tests.support.chats import CHATML, VARYING, tokenizer_of
from tests.support.varied_chats import TOOLS, Style, wrapped

TEMPLATE = "PREF{preference}{prompt}"
SYSTEM, USER, ANSWER = "Be kind.\nAlways.", "say why", "the rain"
SEEDS = range(20)
TALKS = (["why?"], [USER, ANSWER, "and\nthe dog?"])
SYSTEMS = (None, "Be kind, always.", " Jump.\n\nFox \n")
DOCUMENTS = [{"title": "a", "text": "a text"}]
TOOL = TOOLS[:1]


@pytest.fixture(scope="module")
def reward():
    tokenizer = copy.deepcopy(tokenizer_of("qwen2.5"))
    tokenizer.chat_template = CHATML
    return tokenizer


def messages_of(system: str | None, talk: list[str]) -> list[dict[str, str]]:
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]
    return [{"role": "system", "content": system}] * (system is not None) + talk


def encode(tokenizer, messages: list[dict[str, str]], **variables) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
    return tokenizer.encode(text, add_special_tokens=False)


def variables_of(rng: random.Random) -> tuple[str, dict]:
    """A day, and what a request says; neither was seen when the template was read."""
    day, named = "5 May 2031", rng.random() < 0.5
    variables = {"date_string": day} if named else {"strftime_now": lambda form: day}
    for name, values in (("tools", [TOOLS, TOOLS[1:]]), ("effort", ["high"]), ("thinking", [True, False])):
        if rng.random() < 0.6:
            variables[name] = rng.choice(values)
    return day, variables


def as_lines(text: str) -> str:
    """Blank lines between what stands in one message are not counted."""
    return re.sub(r"\n{2,}", "\n\n", text)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_template_on_any_day(seed, reward):
    """The preference stands where the template itself writes it: at the end of the leading system message. Translated,
    the conversation is what the reward model's template writes of it."""
    style, rng = Style.random(seed), random.Random(seed)
    tokenizer, theirs = copy.deepcopy(wrapped(style.wrap)), copy.deepcopy(wrapped(style.wrap))
    tokenizer.chat_template = style.template()
    theirs.chat_template = style.template(system="\n\nPREFx", user="PREFx")
    template = PromptTemplate(tokenizer, TEMPLATE)
    ends = {tokenizer.eos_token_id: reward.eos_token_id}
    translator = PromptTranslator(ByteTokens(tokenizer, "base"), ByteTokens(reward, "reward"), ends)
    for system in SYSTEMS:
        for talk in TALKS:
            day, variables = variables_of(rng)
            messages = messages_of(system, talk)
            ids = encode(tokenizer, messages, **variables)
            composed, expected = template.compose_shared(ids, "x"), encode(theirs, messages, **variables)
            assert as_lines(tokenizer.decode(composed.ids)) == as_lines(tokenizer.decode(expected)), variables
            assert not composed.is_misread
            said = messages_of(style.system_text(system, day, variables), talk)
            translated = translator.read(ids)
            assert as_lines(reward.decode(translated.ids)) == as_lines(reward.decode(encode(reward, said))), variables
            assert not translated.is_misread


WRITTEN = {
    # Family, variable -> with and without a system message: what stands around the preference, @
    ("gpt-oss", "strftime_now"): (f"# Instructions\n\n{SYSTEM}\n\n@\n\n<|end|>", "analysis, final.\n\n@<|end|>"),
    ("gpt-oss", "tools"): ('{"type": "object"}\n\n}\n\n@<|end|>', "commentary channel: functions.\n\n@<|end|>"),
    ("gpt-oss", "reasoning_effort"): (f"{SYSTEM}\n\n@\n\n<|end|>", "analysis, final.\n\n@<|end|>"),
    ("kimi", "tools"): (f"{SYSTEM}\n\n@<|im_end|>", "of the old town.\n\n@<|im_end|>"),
    ("mistral-small", "strftime_now"): (f"{SYSTEM}\n\n@[/SYSTEM_PROMPT]", "5 May.\n\n@[/SYSTEM_PROMPT]"),
    ("mistral-small", "tools"): (f"{SYSTEM}\n\n@[/SYSTEM_PROMPT][AVAILABLE_TOOLS]", ".\n\n@[/SYSTEM_PROMPT]"),
    ("llama3.1", "date_string"): (f"5 May\n\n{SYSTEM}\n\n@<|eot_id|>", "5 May\n\n@<|eot_id|>"),
    ("llama3.1", "tools"): (f"2024\n\n{SYSTEM}\n\n@<|eot_id|>", "2024\n\n@<|eot_id|>"),
    ("granite", "strftime_now"): (f"{SYSTEM}\n\n@<|end_of_text|>", "5 May.\n\n@<|end_of_text|>"),
    ("granite", "thinking"): (f"{SYSTEM}\n\n@<|end_of_text|>", "detailed way.\n\n@<|end_of_text|>"),
    ("granite", "documents"): (f"{SYSTEM}\n\n@<|end_of_text|>", ".\n\n@<|end_of_text|>"),
    ("gemma4", "enable_thinking"): (f"<|think|>{SYSTEM}\n\n@<turn|>", "<|turn>system\n<|think|>@<turn|>"),
    ("gemma4", "tools"): (f'{SYSTEM}<|tool>declaration:fox{{"type": "object"}}<tool|>\n\n@', "<tool|>\n\n@<turn|>"),
    ("llama3", "date_string"): (f"5 May\n\n{SYSTEM}\n\n@<|eot_id|>", "5 May\n\n@<|eot_id|>"),
    ("qwen3", "tools"): ("tags.\n\n@<|im_end|>", "tags.\n\n@<|im_end|>"),
}
VALUES = {
    "strftime_now": lambda form: "5 May",
    "date_string": "5 May",
    "tools": TOOL,
    "documents": DOCUMENTS,
    "reasoning_effort": "high",
}


@pytest.mark.parametrize(("family", "variable"), WRITTEN)
def test_a_preference_stands_behind_the_users_system_prompt(family, variable):
    """And behind the tools that stand in the same message. Where the user has none, behind what the template writes."""
    tokenizer = tokenizer_of(family)
    template = PromptTemplate(tokenizer, TEMPLATE)
    for system, expected in zip((SYSTEM, None), WRITTEN[family, variable], strict=True):
        ids = encode(tokenizer, messages_of(system, [USER]), **{variable: VALUES.get(variable, True)})
        assert expected in tokenizer.decode(template.compose(ids, "x")).replace("PREFx", "@")


@pytest.mark.parametrize("family", VARYING)
def test_a_translated_chat_keeps_its_messages(family, reward):
    """The user's turn, the answer that is to come, and the system prompt, under all variables."""
    tokenizer = tokenizer_of(family)
    ends = {tokenizer.eos_token_id: reward.eos_token_id}
    translator = PromptTranslator(ByteTokens(tokenizer, "base"), ByteTokens(reward, "reward"), ends)
    for name in ("strftime_now", "tools", "documents", "date_string", "enable_thinking", "reasoning_effort"):
        if name not in tokenizer.chat_template:
            continue
        for value in (VALUES.get(name, True), VALUES.get(name, False)):
            for system in (SYSTEM, None):
                ids = encode(tokenizer, messages_of(system, [USER, ANSWER, "and?"]), **{name: value})
                read = reward.decode(translator.translate(ids))
                tail = encode(reward, messages_of(None, [USER, ANSWER, "and?"]))
                # Llama 3.1 describes tools in the first user's turn.
                tail = reward.decode(tail).removeprefix("<|im_start|>user\n")
                assert read.endswith(tail), (name, read)
                assert read.count("<|im_start|>") == 4 + ("<|im_start|>system" in read)
                assert system is None or SYSTEM in read.split("<|im_end|>")[0]


def test_what_is_not_understood_is_told_of_by_its_kind(log, reward):
    """Once for each kind, up to a number; and known to who composes it."""
    tokenizer = tokenizer_of("kimi")
    template = PromptTemplate(tokenizer, TEMPLATE)
    heads = ["<|im_system|>critic<|mid|>", "<|im_end|>", "<|im_middle|><|im_end|>", "<|im_end|>"]
    for head in heads:
        ids = tokenizer.encode(head + "say why", add_special_tokens=False)
        composed = template.compose_shared(ids, "x")
        assert composed.is_misread
        assert tokenizer.decode(composed.ids) == "PREFx" + head + "say why"
    assert log.text.count("begins with no message that the chat template writes") == 3
    assert not template.compose_shared(tokenizer.encode("say why"), "x").is_misread
    ends = {tokenizer.eos_token_id: reward.eos_token_id}
    translator = PromptTranslator(ByteTokens(tokenizer, "base"), ByteTokens(reward, "reward"), ends)
    for head in heads:
        assert translator.read(tokenizer.encode(head + "say why", add_special_tokens=False)).is_misread
    assert log.text.count("begins as a chat, but not as the base model's chat template writes one") == 3
    for n in range(MAX_KINDS + 10):
        template._warn(str(n), "Something else")
    assert log.text.count("Something else") == MAX_KINDS - 3
