"""Small tokenizers of the kinds that real models have, trained here, so that base and reward model may have others."""

from __future__ import annotations

import random
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
        trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=60, show_progress=False)
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
