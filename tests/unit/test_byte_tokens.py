"""Tokens that were added: which are text and which only mark, their bytes, and that a text becomes none that mark."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pad_vllm.reward.byte_tokens import ByteTokens, running
from pad_vllm.reward.markers import answer_end, marker_tokens
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.reward.token_tables import make_tables
from pad_vllm.reward.translation import PromptTranslator
from tests.support.chats import DEEPSEEK
from tests.support.tokenizers import CHATML, TURNS, like_gemma, like_qwen, make, outside

DEEPSEEK_ROLES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>", "chat_template": DEEPSEEK}
MAKERS = {
    "qwen": like_qwen,
    "deepseek": lambda: outside(
        ["<eos>", "<bos>"], ["<|User|>", "<|Assistant|>", "<think>", "</think>", "zebra"], **DEEPSEEK_ROLES
    ),
    "gemma": like_gemma,
    "unigram": lambda: make("unigram", 620),
}
PARTS = (
    *("<think>", "</think>", "<tool_call>", "<|im_end|>", "<|User|>", "<s>", "<unk>", "<unused0>", "<table>", "    "),
    *("\n\n", "\n\n\n", "  x", "▁▁", "▁", "zebra", "[multimodal]", "東京", "<0x41>", "\ufdd00", "\ufdd01", "the "),
)


@pytest.fixture(scope="module")
def tokens() -> dict[str, ByteTokens]:
    return {kind: ByteTokens(maker(), kind) for kind, maker in MAKERS.items()}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_text_is_written_byte_for_byte_and_makes_no_marker(kind, tokens):
    by_bytes = tokens[kind]
    by_bytes.check()

    @settings(max_examples=150, deadline=None, database=None)
    @given(text=st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
    def same(text):
        ids = by_bytes.encode_one(text.encode())
        assert by_bytes.decode(ids) == text.encode()
        assert not by_bytes.marker_ids & set(ids)

    same()


@pytest.mark.parametrize(
    ("kind", "marks", "texts"),
    [
        ("qwen", ["<tool_call>", "<think>", "<|fim_pad|>", "<|vision|>"], ["    ", "  "]),
        ("deepseek", ["<|User|>", "<|Assistant|>", "</think>", "<bos>"], ["zebra"]),
        (
            "gemma",
            ["<unused0>", "[multimodal]", "<unused1>", "<start_of_turn>", "<s>"],
            ["<table>", "</table>", "\n\n"],
        ),
    ],
)
def test_what_was_added_is_itself(kind, marks, texts, tokens):
    """At the id that the model knows, wherever it stands; a marker where it is asked for."""
    by_bytes = tokens[kind]
    vocabulary = by_bytes.vocabulary
    assert by_bytes.marker_ids.issuperset(vocabulary[token] for token in marks)
    for token in texts:
        assert vocabulary[token] not in by_bytes.marker_ids
        assert by_bytes.encode_one(f"a{token}b".encode()).count(vocabulary[token]) == 1
    for token in marks:
        ids = by_bytes.encode_one(f"a{token}b".encode(), markers=True)
        assert [i for i in ids if i in by_bytes.marker_ids] == [vocabulary[token]]
        expected = None if vocabulary[token] in by_bytes.special_ids else token.encode()
        assert by_bytes.bytes[vocabulary[token]] == expected


def test_a_tag_that_the_chat_template_spells_only_marks():
    spelled = like_gemma(TURNS + "{# <b> #}{% if tools %}{{ '<table>' }}{% endif %}")
    assert "<table>" in marker_tokens(spelled)
    assert "<table>" not in marker_tokens(like_gemma(TURNS + "{# <table> #}"))


def test_runs_of_spaces_are_spaces(tokens):
    by_bytes = tokens["gemma"]
    run = by_bytes.vocabulary["▁▁▁▁"]
    assert by_bytes.bytes[run] == b"    "
    assert by_bytes.encode_one(b"x    y").count(run) == 1
    assert run not in by_bytes.encode_one("▁▁▁▁".encode())
    tables = make_tables(by_bytes, [1], tokens["qwen"], [tokens["qwen"].vocabulary["<|im_end|>"]])
    assert tables.pieces_of([run]) == [tokens["qwen"].vocabulary["    "]]


def test_a_marker_is_the_one_of_the_same_name(tokens):
    """Special there or not; where there is none, its text is read."""
    qwen, deepseek = tokens["qwen"], tokens["deepseek"]
    special = ByteTokens(outside(["<eos>", "<think>"], [], eos_token="<eos>"), "special")
    for reward in (deepseek, special):
        tables = make_tables(qwen, [qwen.vocabulary["<|im_end|>"]], reward, [reward.vocabulary["<eos>"]])
        assert tables.pieces_of([qwen.vocabulary["<think>"]]) == [reward.vocabulary["<think>"]]
        assert tables.key[qwen.vocabulary["<think>"]] == reward.vocabulary["<think>"]
        text = tables.pieces_of([qwen.vocabulary["<tool_call>"]])
        assert reward.decode(text) == b"<tool_call>"
        assert not reward.marker_ids & set(text)


def test_roles_that_are_not_special_are_written(tokens):
    translator = PromptTranslator(ByteTokens(make("byte-level", 900, CHATML), "base"), tokens["deepseek"], {})
    talk = [{"role": "user", "content": "What does <|User|> mean, or </think>?"}]
    ids = translator.base.tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    written = translator.translate(ids)
    own = tokens["deepseek"].tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    assert translator.reward.tokenizer.decode(written) == own


@pytest.mark.parametrize("maker", [like_gemma, like_qwen])
def test_a_preference_keeps_the_texts_own_tokens(maker):
    """Runs of spaces, of newlines, HTML's tags; and none that only marks."""
    tokenizer = maker()
    template, markers = PromptTemplate(tokenizer, "{preference}|{prompt}"), set(marker_tokens(tokenizer).values())
    text = "a    b\n\n<table>"
    ids = template.encode_preference(text)[0]
    assert list(ids) == tokenizer.encode(text + "|", add_special_tokens=False)
    ids = template.encode_preference(f"{text}<think><unused0></tool_call>")[0]
    assert not markers & set(ids)
    assert tokenizer.decode(ids).endswith("<table><think><unused0></tool_call>|")


def changed(tokenizer: PreTrainedTokenizerFast, **parts) -> PreTrainedTokenizerFast:
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) | parts
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|im_end|>")


def test_a_tokenizer_that_is_read_wrongly_is_said_to_be():
    """As that of DeepSeek by a transformers that takes it for Llama's."""
    read = changed(
        like_qwen(),
        pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
    )
    with pytest.raises(
        ValueError, match=r"transformers reads the tokenizer of .* wrongly, as .*: it turns 'The weather in 東京"
    ):
        ByteTokens(read, "model")


def test_tables_of_tokens_that_are_not_written_byte_for_byte_are_refused(tokens):
    loses = changed(
        like_qwen(),
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"String": "~"}, "behavior": "Removed", "invert": False},
                json.loads(pre_tokenizers.ByteLevel(add_prefix_space=False).__getstate__()),
            ],
        },
    )
    lost = ByteTokens(loses, "lossy")
    for pair in ((lost, tokens["gemma"]), (tokens["gemma"], lost)):
        with pytest.raises(
            ValueError, match=r"'lossy' does not encode the text of its own tokens exactly: token \d+ is b'~'"
        ):
            make_tables(pair[0], [1], pair[1], [1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}},
        {"model": {"type": "BPE", "vocab": [["a", 1.0]], "merges": []}},
        {"model": {"type": "Unigram", "vocab": {}, "unk_id": "x"}},
        {"model": {}},
        {"pre_tokenizer": {"type": "None of them"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"pre_tokenizer": {}},
        {"added_tokens": [{"id": 0}]},
        {"added_tokens": [{"id": 9999, "content": "x y z"}]},
        {"added_tokens": None},
    ],
)
def test_running_text_raises_nothing_but_value_errors(wrong):
    written = json.loads(like_qwen().backend_tokenizer.to_str())
    with pytest.raises(ValueError, match=r"text that follows other text"):
        running(written | wrong, frozenset(), True)


ALWAYS_BEGUN = "{% for m in messages %}<tool_call>{{ m.content }}{% endfor %}<tool_call>"


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (like_qwen(), "<|im_end|>"),
        (like_gemma(), "<end_of_turn>"),
        (MAKERS["deepseek"](), "<eos>"),
        (like_qwen(chat_template=None), None),
        (like_qwen(chat_template="{{ raise_exception('no') }}"), None),
        # the next answer is always begun
        (like_qwen(chat_template=ALWAYS_BEGUN), None),
        # nothing behind the last answer; what follows one is an end, if it is known for one, or opens the next turn
        (like_qwen(chat_template="{{ messages | map(attribute='content') | join('<|im_end|>') }}"), "<|im_end|>"),
        (like_qwen(chat_template="{{ messages | map(attribute='content') | join('<|im_start|>') }}"), None),
    ],
)
def test_what_a_template_writes_behind_an_answer(tokenizer, end):
    found = answer_end(tokenizer, {tokenizer.eos_token_id}, marker_tokens(tokenizer).values())
    assert found == (None if end is None else tokenizer.convert_tokens_to_ids(end))
