"""The synthetic models' tokenizers, of the two kinds that real models have."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from pad_vllm.reward.template import DEFAULT_PROMPT_TEMPLATE
from pad_vllm.synthetic import world

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, USER_TOKEN, ASSISTANT_TOKEN = SPECIAL_TOKENS = [
    "<|pad|>",
    "<|bos|>",
    "<|eos|>",
    "<|user|>",
    "<|assistant|>",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
INST_TEMPLATE = (  # of Mistral's kind: what a user says is marked, an answer is not
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST]{{ message.content }}[/INST]"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def train_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the world's texts, with chat tokens and a chat template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts(seed),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[USER_TOKEN, ASSISTANT_TOKEN],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def train_sentencepiece(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """Another tokenizer of the same texts, of SentencePiece's kind as Gemma has it (no space before the first word),
    with another chat template. Its words and parts of them are as many; then there is a token for each byte."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]"]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.train_from_iterator(texts(seed), trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False))
    tokenizer = with_byte_tokens(tokenizer, special)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["[INST]", "[/INST]"],
        chat_template=INST_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def with_byte_tokens(tokenizer: Tokenizer, special: Sequence[str]) -> Tokenizer:
    """A trained BPE's or Unigram's tokens behind special ones, ``<unk>`` among them, and one for each byte, as
    SentencePiece has them. Decodes without a space in front."""
    settings = json.loads(tokenizer.to_str())
    first = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    model = settings["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [[token, 0.0] for token in first] + [part for part in model["vocab"] if part[0] not in first]
        model |= {"unk_id": special.index("<unk>"), "byte_fallback": True}
    else:
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        model["vocab"] = {token: i for i, token in enumerate([*first, *tokens])}
        model |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    settings["added_tokens"] = [
        {
            "id": i,
            "content": token,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": True,
        }
        for i, token in enumerate(special)
    ]
    made = Tokenizer.from_str(json.dumps(settings))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def texts(seed: int) -> list[str]:
    """The world's, for a tokenizer to learn."""
    rng = random.Random(seed)
    pairs = [world.sample_pair(rng, held_out=i % 2 == 0) for i in range(8000)]
    found = [text for pair in pairs for text in (pair.question, pair.chosen, pair.rejected)]
    return found + [DEFAULT_PROMPT_TEMPLATE.format(preference=pair.preference, prompt="") for pair in pairs]
