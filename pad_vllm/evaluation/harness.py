"""Run several methods side by side: which engine each needs, what it generates there, and which answer it takes.

A table (:mod:`pad_vllm.evaluation.evaluate`, ``benchmarks/language.py``) says which cells each of its methods
(:mod:`pad_vllm.evaluation.methods`) answers, and :func:`answers` generates the answers.
"""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pad_vllm.config import PADConfig
from pad_vllm.evaluation.engine import Answers, Request, generate_batches
from pad_vllm.reward.byte_tokens import same_ordinary_tokens
from pad_vllm.reward.heads import HEAD_FILES
from pad_vllm.reward.source import Source
from pad_vllm.reward.template import PromptTemplate
from pad_vllm.training.data import answer_ids, end_token, prompt_ids
from pad_vllm.training.loading import has_tokenizer, load_merged

Prompt = str | Sequence[Mapping[str, str]]
"""Text, or a chat's messages."""


class Cell(Protocol):
    """A user and a prompt."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def preference(self) -> str | None: ...


@dataclass(frozen=True)
class Models:
    """The models of a table, and how they read what a user asks.

    Attributes:
        base: path or hub id of the base model.
        pad: the ``pad`` section of an engine's ``additional_config``.
        source: of the reward model's weights.
        template: of the reward model.
        chat_tokenizer: the one whose chat template the reward model reads.
        reference: what rewards are held against where a request does not say; see :class:`~pad_vllm.config.PADConfig`.
    """

    base: str
    pad: Mapping[str, Any]
    source: Source
    tokenizer: PreTrainedTokenizerBase
    reward_tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate
    chat_tokenizer: PreTrainedTokenizerBase
    reference: str

    @classmethod
    def load(cls, base: str, pad: Mapping[str, Any]) -> Models:
        """With the tokenizers that the models bring.

        Raises:
            ValueError: ``pad`` is malformed.
        """
        config = PADConfig.from_pad(pad)
        source = Source(base, base, None) if config.source.is_served else config.source
        tokenizer, own = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(source.tokenizer[0])
        chat = tokenizer if same_ordinary_tokens(tokenizer, own) else own
        template = PromptTemplate(own, config.prompt_template, config.insert_after, chat)
        return cls(base, pad, source, tokenizer, own, template, chat, config.reference)

    def plain(self, prompt: Prompt) -> list[int]:
        """A prompt as the base model reads it."""
        return prompt_ids(prompt, self.tokenizer)

    def context(self, cell: Cell) -> list[int]:
        """What the reward model reads of a cell, in its own chat template where it has another tokenizer."""
        return self.template.compose(prompt_ids(cell.prompt, self.chat_tokenizer), preference_of(cell))

    def reference_context(self, cell: Cell) -> list[int]:
        """What the reference reads of a cell: its prompt, without the preference."""
        return self.plain(cell.prompt) if self.reference == "base" else prompt_ids(cell.prompt, self.chat_tokenizer)


def preference_of(cell: Cell) -> str:
    """What a user says. Raises ValueError for one who says nothing."""
    if cell.preference is None:
        raise ValueError(f"{cell}: a user without a preference")
    return cell.preference


class Answering(Protocol):
    """What answers batches of requests. Equal ones can do it together."""

    def generate(
        self, batches: Mapping[str, Sequence[Request]], *, temperature: float, max_tokens: int, seed: int, **more: Any
    ) -> dict[str, Answers]: ...


class Engine(NamedTuple):
    """A model in vLLM, and the ``pad`` section of its engine. None: without the plugin. ``adapter``: that is merged
    into the model."""

    model: str
    pad: Mapping[str, Any] | None = None
    adapter: str | None = None

    def generate(self, batches: Mapping[str, Sequence[Request]], **settings: Any) -> dict[str, Answers]:
        """Answers to each batch; see :func:`pad_vllm.evaluation.engine.generate_batches`."""
        plugin: dict[str, Any] = {}
        if self.pad is not None:
            plugin = {"logits_processors": ["pad_vllm:PADLogitsProcessor"], "additional_config": {"pad": self.pad}}
        with _merged(self) as merged, _without_heads(merged) as model:
            return generate_batches(model, batches, **settings, **plugin)


@contextlib.contextmanager
def _merged(engine: Engine) -> Iterator[str]:
    """A folder of the engine's model with the adapter in it."""
    if engine.adapter is None:
        yield engine.model
        return
    with tempfile.TemporaryDirectory() as folder:
        load_merged("reward_model", engine.adapter, engine.model).save_pretrained(folder)
        tokenizer = engine.adapter if has_tokenizer(engine.adapter) else engine.model
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
        yield folder


@contextlib.contextmanager
def _without_heads(model: str) -> Iterator[str]:
    """A folder of the model that vLLM loads as a base: its loader takes heads for the model's own weights."""
    if not any(Path(model, name).exists() for name in HEAD_FILES):
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(model).iterdir():
            if path.name not in HEAD_FILES:
                Path(folder, path.name).symlink_to(path.resolve())
        yield folder


class Plan(NamedTuple):
    """What is to be generated by one engine. ``seed`` is added to the table's."""

    engine: Answering
    requests: list[Request]
    seed: int = 0

    def like(self, other: Plan) -> bool:
        """Whether the same run of an engine can answer both."""
        return (self.engine, self.seed) == (other.engine, other.seed)


@dataclass(frozen=True)
class Method(ABC):
    """A way to personalize answers. ``name``: what a table shows, and nothing else."""

    name: str

    @property
    def is_personal(self) -> bool:
        """Whether its answers depend on who asks."""
        return True

    @property
    def is_by_vllm(self) -> bool:
        """Whether vLLM answers: the times of others say nothing of it."""
        return True

    @property
    def reads_the_prompt(self) -> bool:
        """Whether the base model answers, having read the prompt alone: the likelihoods that it gave are its own."""
        return True

    @property
    def needs_reward_model(self) -> bool:
        """Whether the table's reward model has a part in its answers: by another one they are others."""
        return False

    def tokenizer(self, models: Models) -> PreTrainedTokenizerBase:
        """The one of its answers."""
        return models.tokenizer

    @abstractmethod
    def plan(self, models: Models, cells: Sequence[Any]) -> list[Plan]:
        """What it asks for these cells, each plan of another engine. Here it does what it needs beforehand."""

    def pick(self, models: Models, cells: Sequence[Any], outputs: Answers) -> Answers:
        """Of all outputs, in the order of the plans' requests, the answer to each cell."""
        return outputs


class Asked(NamedTuple):
    """A method, and which of a table's cells it is to answer (one may come more than once); ``kept``: how many answers
    it gave before, whose seeds are spent."""

    method: Method
    indices: Sequence[int]
    kept: int = 0


def answers(
    models: Models,
    cells: Sequence[Any],
    asked: Sequence[Asked],
    *,
    seed: int,
    together: int | None = None,
    **settings: Any,
) -> Iterator[tuple[Asked, Answers]]:
    """Each method's answers to its cells, as they come; those that one engine can answer share it.

    Args:
        together: most methods that an engine answers before theirs are given; None: all that it can.
        settings: see :func:`pad_vllm.evaluation.engine.generate_batches`.
    """
    theirs = [[cells[i] for i in one.indices] for one in asked]
    plans = [(n, plan) for n, one in enumerate(asked) for plan in one.method.plan(models, theirs[n])]
    parts: dict[int, list[Answers]] = defaultdict(list)
    while plans:
        first = plans[0][1]
        now = dict([(n, plan) for n, plan in plans if plan.like(first)][:together])
        plans = [(n, plan) for n, plan in plans if now.get(n) is not plan]
        found = first.engine.generate(
            {str(n): plan.requests for n, plan in now.items()},
            seed=seed + first.seed + max(asked[n].kept for n in now),
            **settings,
        )
        for n in now:
            parts[n].append(found[str(n)])
            if not any(n == other for other, _ in plans):
                yield asked[n], asked[n].method.pick(models, theirs[n], _joined(parts.pop(n)))


def _joined(parts: Sequence[Answers]) -> Answers:
    nll = [part.nll for part in parts if part.nll is not None]
    return Answers(
        [text for part in parts for text in part.texts],
        [tokens for part in parts for tokens in part.tokens],
        sum(part.seconds for part in parts),
        [value for own in nll for value in own] if nll else None,
    )


def taken(outputs: Answers, indices: Sequence[int], seconds: float) -> Answers:
    """Some of what was generated, as the answers of a method."""
    return Answers(
        [outputs.texts[i] for i in indices],
        [outputs.tokens[i] for i in indices],
        seconds,
        None if outputs.nll is None else [outputs.nll[i] for i in indices],
    )


def in_tokens_of(
    reads: PreTrainedTokenizerBase, answers: Answers, tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Answers in ``tokenizer``'s tokens, in those of a tokenizer that is to read them; an end token stays one."""
    if reads is tokenizer or same_ordinary_tokens(reads, tokenizer):
        return answers.tokens
    ended = [tokens[-1:] == [end_token(tokenizer)] for tokens in answers.tokens]
    return [answer_ids(text, reads)[: None if end else -1] for text, end in zip(answers.texts, ended, strict=True)]
