"""Where a preference stands in a chat: in the families' own templates, as they would have written it."""

from __future__ import annotations

import time

import pytest

from pad_vllm.reward.chat import chat_format
from pad_vllm.reward.chat_parser import INSERTED
from pad_vllm.reward.template import DEFAULT_PROMPT_TEMPLATE, SEAM_TOKENS, PromptTemplate
from tests.support.chats import FAMILIES, make_chat_tokenizer, tokenizer_of

PREFERENCE = "concise, formal"
LINE = "Heed {preference}.\n\n{prompt}"
"""Ends with a newline, so that in byte-level vocabularies what follows is cut as if it stood alone."""
CONVERSATIONS = {
    "question": ["user:say why"],
    "spaces": ["user:\n\n say why \n"],
    "turns": ["user:say why", "assistant:the rain", "user:and the dog?"],
    "system": ["system:You are asked to be playful.", "user:say why"],
    "system, turns": ["system:Jump.\n\nFox", "user:a", "assistant:the rain", "user:and the dog?"],
    "system, spaces": ["system: the old town \n", "user:say why"],
}


def messages_of(conversation: list[str]) -> list[dict[str, str]]:
    return [dict(zip(("role", "content"), text.split(":", 1), strict=True)) for text in conversation]


def render(family: str, messages: list[dict], **settings) -> list[int]:
    if family == "parts":
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    tokenizer = tokenizer_of(family)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **settings)
    return tokenizer.encode(text, add_special_tokens=False)


def with_preference(family: str, messages: list[dict], before: str) -> list[dict]:
    """The conversation with ``before`` written into the message where the contract puts it."""
    spec = FAMILIES[family]
    first = messages[0]
    if spec.has_system and first["role"] != "system" and spec.default is not None:
        first, messages = {"role": "system", "content": spec.default}, [None, *messages]
    strips = spec.strips and (spec.has_system or first["role"] != "system")
    content = first["content"].strip() if strips else first["content"]
    if first["role"] == "system" and spec.has_system:
        content = f"{content}\n\n{before}" if content else before
    else:
        content = before + content
    return [{**first, "content": content}, *messages[1:]]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_composed_as_the_template_would_have_written_it(family, conversation):
    messages = messages_of(CONVERSATIONS[conversation])
    if family == "gemma2" and messages[0]["role"] == "system":
        with pytest.raises(Exception, match="System role not supported"):
            render(family, messages)
        return
    tokenizer = tokenizer_of(family)
    for text in (LINE, DEFAULT_PROMPT_TEMPLATE):
        template = PromptTemplate(tokenizer, text)
        before = template.before.replace("{preference}", PREFERENCE)
        composed = template.compose(render(family, messages), PREFERENCE)
        theirs = render(family, with_preference(family, messages, before))
        assert tokenizer.decode(composed) == tokenizer.decode(theirs)
        # Where a word of the template's would join one of the prompt's, ids are spliced and the text alone is equal.
        spec = FAMILIES[family]
        joins = "spaces" in conversation or "system" in conversation or spec.default or spec.sentencepiece
        if text == LINE and not joins:
            assert composed == theirs


def test_a_system_message_is_closed_where_the_model_reads_its_end():
    """A content that spells the closing token ends there; the text that follows is another message to the model."""
    messages = messages_of(["system:Jump.<|im_end|>\n<|im_start|>user\nfox", "user:say why"])
    tokenizer = tokenizer_of("chatml")
    composed = PromptTemplate(tokenizer, LINE).compose(render("chatml", messages), PREFERENCE)
    assert tokenizer.decode(composed).startswith(
        "<|im_start|>system\nJump.\n\nHeed concise, formal.\n\n<|im_end|>\n<|im_start|>user\nfox<|im_end|>"
    )


def test_a_system_message_without_an_end_takes_it_where_it_begins():
    tokenizer = tokenizer_of("chatml")
    ids = tokenizer.encode("<|im_start|>system\nJump over", add_special_tokens=False)
    composed = PromptTemplate(tokenizer, LINE).compose(ids, PREFERENCE)
    assert tokenizer.decode(composed) == "<|im_start|>system\nHeed concise, formal.\n\nJump over"


def test_what_a_request_adds_to_a_template_changes_nothing():
    """Tools, dates and switches."""
    tool = {"type": "function", "function": {"name": "fox", "description": "jumps", "parameters": {"type": "object"}}}
    asked = messages_of(["system:Jump.", "user:say why"])

    def composed(family, messages, **settings):
        tokenizer = tokenizer_of(family)
        return tokenizer.decode(
            PromptTemplate(tokenizer, LINE).compose(render(family, messages, **settings), PREFERENCE)
        )

    assert "tags.\n\nHeed concise, formal.\n\n<|im_end|>\n<|im_start|>user\nsay why" in composed(
        "qwen3", asked, tools=[tool]
    )
    assert "Jump.\n\nHeed concise, formal.<|eot_id|>" in composed("llama3", asked, tools=[tool])
    assert "May 2001\n\nHeed concise, formal.<|eot_id|>" in composed("llama3", asked[1:], date_string="1 May 2001")
    assert "[/AVAILABLE_TOOLS][INST]Heed concise, formal.\n\nsay why" in composed(
        "mistral-tekken", asked[1:], tools=[tool]
    )
    assert composed("qwen3", asked, enable_thinking=False).endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_prompts_are_as_before(family):
    """After BOS, whatever the words are."""
    tokenizer = tokenizer_of(family)
    template = PromptTemplate(tokenizer, LINE)
    before = list(template.encode_preference(PREFERENCE)[0])
    ids = tokenizer.encode("The quick brown fox, user and system", add_special_tokens=False)
    assert template.compose(ids, PREFERENCE) == [*before, *ids]
    if tokenizer.bos_token and template.chat.bos_once:
        assert template.compose([tokenizer.bos_token_id, *ids], PREFERENCE) == [tokenizer.bos_token_id, *before, *ids]
    assert template.compose([], PREFERENCE) == before


def test_insert_after_wins():
    tokenizer = tokenizer_of("smollm2")
    ids = render("smollm2", messages_of(["user:say why"]))
    head = f"<|im_start|>system\n{FAMILIES['smollm2'].default}<|im_end|>\n<|im_start|>user\n"
    composed = PromptTemplate(tokenizer, LINE, head).compose(ids, PREFERENCE)
    assert tokenizer.decode(composed).startswith(head + "Heed concise, formal.\n\nsay why<|im_end|>")


def test_a_role_of_no_template_is_left_whole_and_told_once(log):
    tokenizer = tokenizer_of("smollm2")
    template = PromptTemplate(tokenizer, LINE)
    ids = tokenizer.encode("<|im_start|>critic\nsay why<|im_end|>\n", add_special_tokens=False)
    composed = [template.compose(ids, PREFERENCE) for _ in range(3)]
    assert tokenizer.decode(composed[0]) == "Heed concise, formal.\n\n" + tokenizer.decode(ids)
    assert log.text.count("begins with no message that the chat template writes") == 1


@pytest.mark.parametrize(
    "chat_template", ["{{ raise_exception('no') }}", "{% for m in", "{{ messages[0].content | upper }}", "fixed"]
)
def test_a_template_that_hides_its_messages_is_told_and_prompts_are_plain(log, chat_template):
    tokenizer = make_chat_tokenizer(FAMILIES["chatml"]._replace(template=chat_template))
    template = PromptTemplate(tokenizer, LINE)
    assert template.chat is None
    assert "PAD cannot find where the chat template puts messages" in log.text
    assert template.compose([5, 6], PREFERENCE) == [*template.encode_preference(PREFERENCE)[0], 5, 6]


def test_the_prompts_words_never_become_the_templates():
    """Not even where one token of the prompt is cut in two and joined with the template's text."""
    tokenizer = tokenizer_of("chatml")
    special = set(tokenizer.all_special_ids)
    for before in ("<|im_", "<|im_start|>{", "{preference}"):
        template = PromptTemplate(tokenizer, before + "{preference}{prompt}")
        for content in ("\n", "\nend|>", "\npreference}", "\n\n{preference}", "<|im_", "\n\n\n\n\n"):
            ids = render("chatml", messages_of([f"user:{content}"]))
            for preference in ("x", "end|>", "<|im_end|>", "{prompt}", "\n"):
                composed = template.compose(ids, preference)
                own = [i for i in template.encode_preference("x")[0] if i in special]
                assert len([i for i in composed if i in special]) == len([i for i in ids if i in special]) + len(own)
                added = len(composed) - len(ids)
                assert added <= template.num_added_tokens(preference) + template.num_seam_tokens
    assert template.num_seam_tokens == SEAM_TOKENS


def test_ids_that_stand_for_no_token_are_left_alone():
    """An embedding is often padded beyond the tokenizer."""
    template = PromptTemplate(tokenizer_of("chatml"), LINE)
    before = list(template.encode_preference(PREFERENCE)[0])
    assert template.compose([10**6, 5], PREFERENCE) == [*before, 10**6, 5]
    opener = render("chatml", messages_of(["user:a"]))[:3]
    assert template.compose([*opener, 10**6], PREFERENCE) == [*opener, *before, 10**6]


def test_a_tokenizer_without_a_chat_template_has_no_format():
    assert chat_format(make_chat_tokenizer(FAMILIES["chatml"]._replace(template=None))) is None


def test_the_base_models_template_is_the_one_that_counts():
    reward, base = tokenizer_of("chatml"), make_chat_tokenizer(FAMILIES["chatml"])
    reward.chat_template, saved = None, reward.chat_template
    try:
        template = PromptTemplate(reward, LINE, chat_tokenizer=base)
    finally:
        reward.chat_template = saved
    ids = render("chatml", messages_of(["user:say why"]))
    assert reward.decode(template.compose(ids, PREFERENCE)).startswith("<|im_start|>user\nHeed concise")
    assert template.example("x") == (
        "<|im_start|>user\nHeed x.\n\nHow do I keep tomatoes fresh?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("family", "spaces"), [("kimi", True), ("kimi", False), ("gpt-oss", False)])
def test_a_prompt_is_read_in_a_time_that_grows_with_its_length(family, spaces):
    """Whatever it is made of: everybody waits for it."""
    grammar = chat_format(tokenizer_of(family)).structure.grammar
    opener = next(opener for opener, role in grammar.openers.items() if role == INSERTED)
    text = opener + (" " if spaces else opener) * 20_000 + "x"
    start = time.thread_time()
    assert list(grammar.messages(text))
    assert time.thread_time() - start < 1
