"""Random models of any size, with tokenizers: what they say is not measured."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

BASE_SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
REWARD_SIZES = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6}
SHARED = 7 / 8
"""Of the base's tokens, those that a reward model with another tokenizer has as well; the others are two of its own."""
NUM_WORDS = 65_536
"""Of which byte-level BPE is made, alike for every size: the smaller one's tokens are the first of the larger one's."""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models, given or made, and how an engine has them."""
    parser.add_argument("--base", help="path or hub id of a base model (default: a random one is made)")
    parser.add_argument(
        "--reward", help="path or hub id of a reward model with its tokenizer, or 'base': the base model guides itself"
    )
    parser.add_argument("--base-config", type=json.loads, default={}, metavar="JSON", help="sizes of the random base")
    parser.add_argument(
        "--reward-config", type=json.loads, default={}, metavar="JSON", help="sizes of the random reward model"
    )
    parser.add_argument("--vocab-size", type=int, default=32_000, help="of random models (default %(default)s)")
    parser.add_argument(
        "--load-format",
        default="auto",
        help="as vLLM's option; dummy writes and reads no weights (default %(default)s)",
    )
    parser.add_argument("--dtype", default="float32", help="(default %(default)s)")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument(
        "--kv-cache-memory-bytes", type=int, default=2 << 30, help="KV cache of the base model (default %(default)s)"
    )


def make_models(folder: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """A base and a reward model with one tokenizer, of words w0, w1, ..."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    vocabulary = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, args.vocab_size)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return (
        _make_model(folder / "base", BASE_SIZES | args.base_config, args.vocab_size, words, args.load_format, seed=0),
        _make_model(
            folder / "reward", REWARD_SIZES | args.reward_config, args.vocab_size, words, args.load_format, seed=1
        ),
    )


def make_models_of_two_tokenizers(folder: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """The same models with byte-level BPE of two sizes, which have most tokens in common, as those of a language do."""
    sizes = args.vocab_size, int(args.vocab_size * SHARED)
    base, reward = (_byte_level(size) for size in sizes)
    return (
        _make_model(folder / "base", BASE_SIZES | args.base_config, sizes[0], base, args.load_format, seed=0),
        _make_model(folder / "reward", REWARD_SIZES | args.reward_config, sizes[1], reward, args.load_format, seed=1),
    )


def _byte_level(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(0)
    syllables = [consonant + vowel for consonant in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.choice((2, 3, 4)))) for _ in range(NUM_WORDS)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    return tokenizer


def _make_model(
    path: Path, sizes: dict[str, int], vocab_size: int, tokenizer: Any, load_format: str, seed: int
) -> Path:
    """``load_format`` dummy: without weights on the disk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=8192, bos_token_id=0, eos_token_id=1, **sizes)
    if load_format == "dummy":
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(path)
    else:
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(path)
    return path
