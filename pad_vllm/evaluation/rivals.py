"""Methods that transformers answers: a steering vector, and Persona-judge."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pad_vllm.evaluation.decoding import JUDGE, STEERING, InTransformers, Steering
from pad_vllm.evaluation.engine import Request
from pad_vllm.evaluation.harness import Cell, Method, Models, Plan
from pad_vllm.evaluation.methods import Prompting
from pad_vllm.training.data import Example
from pad_vllm.training.trainer import pad_examples


@dataclass(frozen=True)
class ByTransformers(Method):
    """What the base model answers in transformers."""

    @property
    def is_by_vllm(self) -> bool:
        return False

    @property
    def reads_the_prompt(self) -> bool:
        return False

    def plan(self, models: Models, cells: Sequence[Cell]) -> list[Plan]:
        return [Plan(InTransformers(models.base), [self.request(models, cell) for cell in cells])]

    @abstractmethod
    def request(self, models: Models, cell: Cell) -> Request:
        """What it asks for a cell."""


@dataclass(frozen=True)
class Steered(ByTransformers):
    """The base model, with a vector added to what one of its layers hands on.

    Attributes:
        steering: a cell's.
    """

    steering: Callable[[Any], Steering]

    def request(self, models: Models, cell: Cell) -> Request:
        return Request(models.plain(cell.prompt), {STEERING: self.steering(cell)})


@dataclass(frozen=True)
class Judged(ByTransformers):
    """Persona-judge: drafts under one preference, judged under another, in turn.

    Attributes:
        preferences: a cell's two.
    """

    prompting: Prompting
    preferences: Callable[[Any], tuple[str, str]]

    def request(self, models: Models, cell: Cell) -> Request:
        drafting, judging = (self.prompting.read(models, cell.prompt, p) for p in self.preferences(cell))
        return Request(drafting, {JUDGE: judging})


@torch.inference_mode()
def mean_activations(
    model: PreTrainedModel, examples: Sequence[Example], layers: Sequence[int], batch_size: int = 16
) -> torch.Tensor:
    """What each of ``layers`` hands on, in the mean over an answer's tokens: (num_examples, num_layers, hidden_size)
    float32."""
    found = torch.zeros(len(examples), len(layers), model.config.hidden_size)
    by_length = sorted(range(len(examples)), key=lambda i: sum(map(len, examples[i])))
    for start in range(0, len(examples), batch_size):
        rows = by_length[start : start + batch_size]
        batch = pad_examples([examples[i] for i in rows])
        states = model.get_decoder()(batch["ids"], use_cache=False, output_hidden_states=True).hidden_states
        weights = batch["is_answer"].float()
        weights /= weights.sum(1, keepdim=True)
        for number, layer in enumerate(layers):  # the first are the embeddings
            found[rows, number] = torch.einsum("bt,bth->bh", weights, states[layer + 1].float())
    return found
