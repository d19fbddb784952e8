"""The demo's models: a tokenizer, a base model and a personalized reward model, trained on the demo's world.

The base model learns answers of all styles alike and takes no side. The reward model learns what the preference in its
prompt asks for, from preference pairs, with the PAD objective.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pad_vllm.demo import world
from pad_vllm.reward import template
from pad_vllm.reward.template import DEFAULT_PROMPT_TEMPLATE, PromptTemplate
from pad_vllm.training import objective, trainer
from pad_vllm.training.trainer import Example, PairExample

PAD, BOS, EOS, USER, ASSISTANT = SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAD_CONFIG = {"insert_after": USER}
"""What the server's ``pad`` configuration must say for these models, beside ``reward_model``."""


@dataclass(frozen=True)
class Recipe:
    """Sizes and training lengths. All learning rates are peaks."""

    vocab_size: int = 1792
    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    head_dim: int = 32
    batch_size: int = 16
    base_steps: int = 650
    base_lr: float = 5e-3
    sft_steps: int = 600
    sft_lr: float = 5e-3
    pad_steps: int = 80
    pad_batch_size: int = 12
    pad_lr: float = 5e-4
    pad_beta: float = 0.1
    pad_nll_weight: float = 1.0
    num_test_pairs: int = 256


FULL = Recipe()
TINY = Recipe(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    batch_size=4,
    base_steps=3,
    sft_steps=3,
    pad_steps=3,
    pad_batch_size=4,
    num_test_pairs=8,
)
"""Seconds instead of minutes, and models that have learned nothing: for tests."""


class DemoModels(NamedTuple):
    """Directories in transformers' format, each with the tokenizer, and what was measured in training: on unseen
    pairs, how often the chosen answer has the higher reward, and by how many nats on average."""

    base: Path
    reward: Path
    metrics: dict[str, float]


def build(cache_dir: str | os.PathLike | None = None, seed: int = 0, recipe: Recipe = FULL) -> DemoModels:
    """The demo's models, trained now unless the cache has them.

    Args:
        cache_dir: root of the cache; ``$PAD_VLLM_CACHE``, else ``~/.cache/pad-vllm``.
        seed: of the weights and of the data.
        recipe: sizes and training lengths.

    Returns:
        The models in a folder named by a hash of all that determines them. The folder appears in one rename after
        everything is in it: a build that was killed leaves nothing that a later one would use.
    """
    root = Path(cache_dir or os.environ.get("PAD_VLLM_CACHE") or Path.home() / ".cache" / "pad-vllm")
    folder = root / f"demo-{_fingerprint(seed, recipe)}"
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=root))
        try:
            _train(unfinished, seed, recipe)
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():  # else another process has finished the same build
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return DemoModels(folder / "base", folder / "reward", json.loads((folder / "metrics.json").read_text()))


def train_tokenizer(vocab_size: int, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the world's texts, with chat tokens and a chat template."""
    rng = random.Random(seed)
    pairs = [world.sample_pair(rng, world.QUESTIONS) for _ in range(6000)]
    texts = [text for pair in pairs for text in (pair.question, pair.chosen, pair.rejected)]
    texts += [DEFAULT_PROMPT_TEMPLATE.format(preference=pair.preference, prompt="") for pair in pairs]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def chat_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """The ids of a chat prompt with one user turn: what the base model is given."""
    turn = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """The ids of an answer and its EOS."""
    return [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]


def encode_pair(pair: world.Pair, tokenizer: PreTrainedTokenizerBase, prompt_template: PromptTemplate) -> PairExample:
    """A preference pair as ids: the reward model's prompt composed as in serving, the reference's the plain prompt."""
    prompt = chat_ids(tokenizer, pair.question)
    return PairExample(
        prompt_template.compose(prompt, pair.preference),
        prompt,
        answer_ids(tokenizer, pair.chosen),
        answer_ids(tokenizer, pair.rejected),
    )


def _train(folder: Path, seed: int, recipe: Recipe) -> None:
    """Tokenizer, base model, reward model and metrics, written into ``folder``."""
    rng = random.Random(seed)
    tokenizer = train_tokenizer(recipe.vocab_size, seed)
    prompt_template = PromptTemplate(tokenizer, **PAD_CONFIG)

    def chat_example() -> Example:
        topic, style = rng.choice(world.TOPICS), rng.choice(world.STYLES)
        question = rng.choice(world.QUESTIONS).format(topic.task)
        return Example(chat_ids(tokenizer, question), answer_ids(tokenizer, world.answer(topic, style, rng)))

    def pair_example(questions: tuple[str, ...]) -> PairExample:
        return encode_pair(world.sample_pair(rng, questions), tokenizer, prompt_template)

    base = _init_model(tokenizer, seed, recipe)
    examples = [chat_example() for _ in range(recipe.base_steps * recipe.batch_size)]
    trainer.train_sft(base, examples, batch_size=recipe.batch_size, lr=recipe.base_lr, seed=seed, desc="base model")
    base.requires_grad_(False)

    # From scratch, not from the base: whose attention has settled on what it was shown, and learns to read a
    # preference several times slower.
    reward = _init_model(tokenizer, seed + 1, recipe)
    test_pairs = [pair_example(world.HELD_OUT_QUESTIONS) for _ in range(recipe.num_test_pairs)]
    pairs = [pair_example(world.TRAIN_QUESTIONS) for _ in range(recipe.sft_steps * recipe.batch_size)]
    examples = [Example(pair.prompt, pair.chosen) for pair in pairs]
    trainer.train_sft(
        reward, examples, batch_size=recipe.batch_size, lr=recipe.sft_lr, seed=seed, desc="reward model, SFT"
    )
    metrics: dict[str, float] = {}

    def test(stage: str) -> None:
        margins = trainer.reward_margins(reward, base, test_pairs)
        metrics[f"accuracy_{stage}"] = (margins > 0).float().mean().item()
        metrics[f"margin_{stage}"] = margins.mean().item()

    test("after_sft")
    pairs = [pair_example(world.TRAIN_QUESTIONS) for _ in range(recipe.pad_steps * recipe.pad_batch_size)]
    # pi_ref is the base model on the plain prompt: serving scores with exactly that log-ratio.
    trainer.train_pad(
        reward,
        base,
        pairs,
        batch_size=recipe.pad_batch_size,
        lr=recipe.pad_lr,
        beta=recipe.pad_beta,
        nll_weight=recipe.pad_nll_weight,
        seed=seed,
        desc="reward model, PAD",
    )
    test("after_pad")

    for model, name in ((base, "base"), (reward, "reward")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))


def _init_model(tokenizer: PreTrainedTokenizerBase, seed: int, recipe: Recipe) -> LlamaForCausalLM:
    num_heads = recipe.hidden_size // recipe.head_dim
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=512,
        initializer_range=0.06,  # about 1 / sqrt(hidden_size): at 0.02, so narrow a model learns at half the speed
        # Tied, the words of preferences, which no answer contains, would all be pushed to one embedding before the
        # reward model reads the first of them.
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _fingerprint(seed: int, recipe: Recipe) -> str:
    """A hash of everything that determines the models."""
    sources = [world.__file__, __file__, trainer.__file__, objective.__file__, template.__file__]
    versions = [module.__version__ for module in (torch, transformers, tokenizers)]
    digest = hashlib.sha256(repr((seed, recipe, versions)).encode())
    for source in sources:
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()[:16]
