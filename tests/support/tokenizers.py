"""Small tokenizers of the kinds that real models have, trained here, so that base and reward model may have others."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pad_vllm.synthetic.tokenizer import with_byte_tokens
from tests.support.models import CORPUS

MORE = ["Ein Gruß aus Österreich: naïve café, 東京の天気は晴れ, Привет мир, 😀 and 1,024 numbers."]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (  # no system turn; spaces around contents go
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPACE = "▁"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def corpus() -> list[str]:
    """Long enough for two thousand tokens, and the same for ever."""
    rng = random.Random(0)
    words = ["".join(rng.choices(("ka", "lo", "mi", "ren", "tas", "vu", "qui", "ber"), k=3)) for _ in range(300)]
    return CORPUS * 4 + MORE * 2 + [(Path(__file__).parents[2] / "LICENSE").read_text("utf-8"), " ".join(words * 3)]


@cache
def trained(kind: str, vocab_size: int) -> Tokenizer:
    """``byte-level``, ``metaspace`` (SentencePiece's BPE as Llama 2 has it), ``replace`` (as Gemma has it) or
    ``unigram``; the last three with a token for each byte."""
    if kind == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[*SPECIAL.values(), "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus(), trainer)
        return tokenizer
    tokenizer = Tokenizer(models.Unigram() if kind == "unigram" else models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    size = vocab_size - 256 - len(SPECIAL) - 3
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(vocab_size=size, unk_token="<unk>", special_tokens=["<unk>"])
    else:
        # Among characters that are equally common the trainer chooses others in each process.
        counts = Counter(character for text in corpus() for character in text.replace(" ", SPACE))
        common = sorted(counts, key=lambda character: (-counts[character], character))[:60]
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=common, limit_alphabet=len(common), show_progress=False
        )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer = with_byte_tokens(tokenizer, [*SPECIAL.values(), "<unk>", "<start_of_turn>", "<end_of_turn>"])
    if kind == "replace":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "metaspace":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    return tokenizer


def make(kind: str, vocab_size: int, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained(kind, vocab_size).to_str()),
        **SPECIAL,
        chat_template=chat_template,
        model_max_length=1024,
    )


def outside(special: list[str], added: list[str], behind: Sequence[str] = (), **roles) -> PreTrainedTokenizerFast:
    """Byte-level, with no token but those of texts in the model's own vocabulary, as Qwen's and DeepSeek's: behind
    it special ones, added ones that are not, and special ones again."""
    settings = json.loads(trained("byte-level", 600).to_str())
    settings["added_tokens"] = []
    words = sorted(settings["model"]["vocab"], key=settings["model"]["vocab"].get)[5:]
    settings["model"]["vocab"] = {token: i for i, token in enumerate(words)}
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    tokenizer.add_special_tokens(list(behind))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=1024, **roles)


def like_qwen(**roles) -> PreTrainedTokenizerFast:
    """Tags that are added and not special; also runs of spaces, as Phi has."""
    return outside(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<|fim_pad|>", "    ", "  ", "<think>", "</think>"],
        ["<|vision|>"],
        **{"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML} | roles,
    )


def like_gemma(chat_template: str | None = TURNS) -> PreTrainedTokenizerFast:
    """All of it in the model's own vocabulary: runs of spaces that its merges lead to, runs of newlines and tags of
    HTML that they do not, and tokens for nothing."""
    settings = json.loads(trained("replace", 900).to_str())
    vocabulary, runs = settings["model"]["vocab"], [SPACE * n for n in (2, 4)]
    settings["model"]["merges"] = [[SPACE] * 2, [runs[0]] * 2, *settings["model"]["merges"]]
    for content in ("<unused0>", "\n\n", "[multimodal]", *runs, "<table>", "</table>", "<unused1>"):
        token_id = vocabulary.setdefault(content, 1 + max(vocabulary.values()))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        settings["added_tokens"].append({"id": token_id, "content": content} | flags)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(settings)),
        **SPECIAL,
        chat_template=chat_template,
        model_max_length=1024,
    )
