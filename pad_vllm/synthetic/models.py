"""The synthetic models: a tokenizer, base models and a personalized reward model, trained on the synthetic world.

A base model learns answers of all styles alike and takes no side; of users who say what they want, it has seen answers
that heed it, and then more that seldom do: it knows the words, and makes little of them. The reward model begins as a
base model and learns from preference pairs what ``pad-vllm train`` teaches: to read a preference, and one head per
dimension.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from pad_vllm.cache import cached
from pad_vllm.reward import chat, template
from pad_vllm.synthetic import tokenizer as own_tokenizers
from pad_vllm.synthetic import world
from pad_vllm.synthetic.tokenizer import train_sentencepiece, train_tokenizer
from pad_vllm.training import data, heads, objective, train, trainer
from pad_vllm.training.data import Example, answer_ids, prompt_ids
from pad_vllm.training.records import write_records
from pad_vllm.training.train import Stage, TrainingConfig

PROMPT_TEMPLATE = "{preference} {prompt}"
"""A preference stands before the question, where the base models have met one; the reward model's ``pad.json`` says so
to the server."""

NUM_POSITIONS = 512
ARCHITECTURES = ("llama", "qwen", "neox", "mistral")
"""Of base models. The last has a tokenizer and a chat template of its own; the others have the reward model's."""


@dataclass(frozen=True)
class Lesson:
    """Some of a base model's training. ``prompted`` of its questions say what is wanted, of which answers do ``heeded``
    and leave the rest to chance."""

    steps: int
    lr: float
    prompted: float
    heeded: float


@dataclass(frozen=True)
class Recipe:
    """Sizes and training lengths. All learning rates are peaks."""

    vocab_size: int = 1792
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    head_dim: int = 32
    batch_size: int = 16
    base: tuple[Lesson, ...] = (
        Lesson(steps=850, lr=5e-3, prompted=0.8, heeded=1.0),
        Lesson(steps=250, lr=2e-3, prompted=0.5, heeded=0.35),
    )
    num_pairs: int = 2880
    num_test_pairs: int = 256
    # Three times the likelihood's weight: the PAD loss alone unlearns what both answers have in common.
    backbone: Stage = field(default_factory=lambda: Stage(lr=6e-4, batch_size=12, beta=0.3, nll_weight=3.0))
    heads: Stage = field(default_factory=lambda: Stage(lr=2e-3, batch_size=12, epochs=0.5, nll_weight=3.0))


FULL = Recipe()
TINY = Recipe(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    batch_size=4,
    base=(Lesson(steps=3, lr=5e-3, prompted=0.5, heeded=0.5),),
    num_pairs=24,
    num_test_pairs=8,
    backbone=Stage(lr=2e-3, batch_size=4),
    heads=Stage(lr=2e-3, batch_size=4),
)
"""Seconds instead of minutes, and models that have learned nothing: for tests."""


class SyntheticModels(NamedTuple):
    """Folders in transformers' format, each with the tokenizer, and what was measured in training: how often the reward
    model rewards the chosen answer above the rejected one, on pairs of which everything was held out."""

    base: Path
    reward: Path
    metrics: dict[str, dict[str, float]]


def build(cache_dir: str | os.PathLike | None = None, seed: int = 0, recipe: Recipe = FULL) -> SyntheticModels:
    """The synthetic models, trained now unless the cache has them.

    Args:
        cache_dir: root of the cache; ``$PAD_VLLM_CACHE``, else ``~/.cache/pad-vllm``.
        seed: of the weights and of the data.
        recipe: sizes and training lengths.

    Returns:
        The models, each in a folder named by a hash of all that determines it. A folder appears in one rename after
        everything is in it: a build that was killed leaves nothing that a later one would use.
    """
    base = build_base("llama", cache_dir, seed, recipe)
    reward = _cached(cache_dir, "reward", seed, recipe, lambda folder: _train_reward(folder, base, seed, recipe))
    return SyntheticModels(base, reward, json.loads((reward / "training.json").read_text())["metrics"])


def build_base(
    architecture: str, cache_dir: str | os.PathLike | None = None, seed: int = 0, recipe: Recipe = FULL
) -> Path:
    """A base model of one of :data:`ARCHITECTURES`."""
    return _cached(
        cache_dir, architecture, seed, recipe, lambda folder: _train_base(folder, architecture, seed, recipe)
    )


def _cached(
    cache_dir: str | os.PathLike | None, name: str, seed: int, recipe: Recipe, make: Callable[[Path], None]
) -> Path:
    return cached(cache_dir, f"{name}-{fingerprint(seed, recipe)}", make)


def chat_example(rng: random.Random, tokenizer: PreTrainedTokenizerBase, lesson: Lesson) -> Example:
    """A question of the world and an answer in a random style. Some questions say what is wanted, in any words and
    combination."""
    topic, style = rng.choice(world.TOPICS), rng.choice(world.STYLES)
    question = rng.choice(world.QUESTIONS).format(topic.task)
    if rng.random() < lesson.prompted:
        wanted = world.sample_wanted(rng, held_out=rng.random() < 0.5)
        question = f"{world.preference(wanted, rng, held_out=rng.random() < 0.5)} {question}"
        style = style._replace(**{d: value for d, value in wanted.items() if rng.random() < lesson.heeded})
    return Example(prompt_ids(question, tokenizer), answer_ids(world.answer(topic, style, rng), tokenizer))


def preference_record(rng: random.Random, held_out: bool = False) -> dict[str, Any]:
    """A comparison as ``pad-vllm train`` reads it. Some have no preference: what is rejected then is off the topic."""
    pair = world.sample_pair(rng, held_out)
    record = {"prompt": pair.question, "preference": pair.preference, "chosen": pair.chosen, "rejected": pair.rejected}
    if not held_out and rng.random() < 0.15:
        other = rng.choice([topic for topic in world.TRAIN_TOPICS if topic != pair.topic])
        return record | {"preference": None, "rejected": world.answer(other, rng.choice(world.STYLES), rng)}
    return record | {"labels": pair.labels}


def _train_base(folder: Path, architecture: str, seed: int, recipe: Recipe) -> None:
    rng = random.Random(seed)
    make = train_sentencepiece if architecture == "mistral" else train_tokenizer
    tokenizer = make(recipe.vocab_size, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_config(architecture, tokenizer, recipe))
        print(f"Training a base model ({architecture}, {model.num_parameters() / 1e6:.1f}M parameters)", flush=True)
        for lesson in recipe.base:
            examples = [chat_example(rng, tokenizer, lesson) for _ in range(lesson.steps * recipe.batch_size)]
            args = trainer.training_arguments(
                folder / "log", steps=lesson.steps, batch_size=recipe.batch_size, lr=lesson.lr, seed=seed
            )
            trainer.SFTTrainer(model, examples, args).train()
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _train_reward(folder: Path, base: Path, seed: int, recipe: Recipe) -> None:
    rng = random.Random(seed + 1)
    with tempfile.TemporaryDirectory() as texts:
        pairs = write_records(Path(texts, "train.jsonl"), (preference_record(rng) for _ in range(recipe.num_pairs)))
        test = write_records(
            Path(texts, "test.jsonl"), (preference_record(rng, held_out=True) for _ in range(recipe.num_test_pairs))
        )
        config = TrainingConfig(
            str(pairs),
            str(base),
            str(folder),
            eval_data=str(test),
            save_steps=10**6,
            seed=seed,
            backbone=recipe.backbone,
            heads=recipe.heads,
            prompt_template=PROMPT_TEMPLATE,
        )
        print("Training the reward model", flush=True)
        with torch.random.fork_rng(devices=[]):
            train.train(config)


def _config(architecture: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> PreTrainedConfig:
    """Four families, of three widths and depths."""
    sizes = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": NUM_POSITIONS,
        "initializer_range": 0.06,  # about 1 / sqrt(hidden_size): at 0.02, so narrow a model learns at half the speed
        # Tied, the words of preferences, which no answer contains, would all be pushed to one embedding before a
        # reward model reads the first of them.
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }

    def family(width: int, depth: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": 3 * width if recipe.intermediate_size > width else width,
            "num_hidden_layers": depth,
            "num_attention_heads": width // recipe.head_dim,
        }

    width, depth = recipe.hidden_size, recipe.num_layers
    if architecture == "llama":
        return LlamaConfig(**sizes, **family(width, depth))
    if architecture == "mistral":
        own = family(width, depth)
        return MistralConfig(**sizes, **own, num_key_value_heads=own["num_attention_heads"], sliding_window=None)
    if architecture == "qwen":
        smaller = family(width, max(depth - 1, 1))
        return Qwen3Config(
            **sizes, **smaller, num_key_value_heads=width // recipe.head_dim // 2, head_dim=recipe.head_dim
        )
    return GPTNeoXConfig(**sizes, **family(width + 2 * recipe.head_dim, depth), rotary_pct=1.0)


def fingerprint(seed: int, recipe: Recipe) -> str:
    """A hash of everything that determines the models."""
    modules = (world, own_tokenizers, chat, template, data, heads, objective, train, trainer)
    versions = [module.__version__ for module in (torch, transformers, tokenizers)]
    digest = hashlib.sha256(repr((seed, dataclasses.astuple(recipe), versions)).encode())
    for source in (__file__, *map(inspect.getfile, modules)):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:16]
