"""Learning to read: what a reward model rewards for a wish in words that it knows, it learns for other words.

The teacher is the reward model as it is. It reads a user's wish in known words: one preference, or several with
weights, as a request's ``pad_preference_weights`` mix them. The student reads the user's own words, once, and learns
the guidance that the teacher gives: at each token of an answer the guided distribution over the base's top-k
candidates. Each token teaches with all candidates, where a comparison of two answers says only which of them is better
(distillation, arXiv 1503.02531; of a context, arXiv 2209.15189).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from pad_vllm.training.trainer import FixedOrderTrainer, pad_examples

BATCH_SIZE = 16


class Lesson(NamedTuple):
    """An answer, as ids, and who is to be pleased by each of its tokens.

    Attributes:
        plain: the prompt, which the base reads.
        known: what the teacher reads before the answer, and by how much each counts.
    """

    plain: Sequence[int]
    answer: Sequence[int]
    known: Sequence[tuple[Sequence[int], float]]


class Guidance(NamedTuple):
    """What guides an answer, token by token.

    Attributes:
        candidates: (num_tokens, top_k) int32, the base's likeliest tokens.
        base: (num_tokens, top_k) float32, their logits by the base.
        guided: (num_tokens, top_k) float32, their guided logits, up to a constant of each token.
    """

    candidates: torch.Tensor
    base: torch.Tensor
    guided: torch.Tensor


class Taught(NamedTuple):
    """What the student reads before an answer, and the guidance that it is to give."""

    prompt: Sequence[int]
    answer: Sequence[int]
    guidance: Guidance


@torch.no_grad()
def guidance_of(
    base: PreTrainedModel,
    teacher: PreTrainedModel,
    lessons: Sequence[Lesson],
    *,
    beta: float,
    top_k: int,
    dtype: torch.dtype = torch.float32,
) -> list[Guidance]:
    """How the teacher guides each lesson's answer: ``base + beta sum_i w_i (teacher_i - base)``, logits of the
    candidates.

    Args:
        base, teacher: causal language models whose logits are a linear map of the last hidden state.
        dtype: that the models multiply in.
    """
    found: list[Guidance] = [None] * len(lessons)  # type: ignore[list-item]
    for rows in _batches([len(one.plain) + len(one.answer) for one in lessons]):
        states = _states(base, [(lessons[i].plain, lessons[i].answer) for i in rows], dtype)
        for i, own in zip(rows, states, strict=True):
            logits, candidates = (own @ _head(base).float().T).topk(top_k)
            found[i] = Guidance(candidates.int(), logits, logits.clone())
    reads = [(i, context, weight) for i, one in enumerate(lessons) for context, weight in one.known]
    for rows in _batches([len(context) + len(lessons[i].answer) for i, context, _ in reads]):
        states = _states(teacher, [(reads[row][1], lessons[reads[row][0]].answer) for row in rows], dtype)
        for row, own in zip(rows, states, strict=True):
            i, _, weight = reads[row]
            scores = candidate_logits(own, _head(teacher), found[i].candidates)
            found[i].guided.add_(beta * weight * (scores - found[i].base))
    return found


def candidate_logits(states: torch.Tensor, head: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Logits of some tokens alone.

    Args:
        states: (num_tokens, hidden_size) float32, last hidden states.
        head: (vocab_size, hidden_size), the weight of ``lm_head``.
        candidates: (num_tokens, top_k) int.

    Returns:
        (num_tokens, top_k) float32.
    """
    return torch.einsum("nd,nkd->nk", states, head[candidates.long()].float())


def reading_loss(scores: torch.Tensor, base: torch.Tensor, guided: torch.Tensor, beta: float) -> torch.Tensor:
    """KL divergence of the student's guidance from the teacher's, in nats, mean over tokens.

    Args:
        scores, base, guided: (num_tokens, top_k) float32: logits of the candidates by the student and by the base, and
            those that the teacher guides to.
    """
    own = base + beta * (scores - base)
    return F.kl_div(own.log_softmax(-1), guided.log_softmax(-1), log_target=True, reduction="batchmean")


class ReadingTrainer(FixedOrderTrainer):
    """Learns the guidance of ``taught``.

    Args:
        model: the student, or its LoRA.
        beta: of the guidance that is learned.
    """

    def __init__(self, model: nn.Module, taught: Sequence[Taught], args: TrainingArguments, beta: float) -> None:
        self._beta = beta
        super().__init__(model, taught, _collate, args, [len(one.prompt) + len(one.answer) for one in taught])

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        states = _answer_states(model, inputs["ids"], inputs["is_answer"])
        with torch.autocast(states.device.type, enabled=False):
            scores = candidate_logits(states.float(), _head(model), inputs["candidates"])
            loss = reading_loss(scores, inputs["base"], inputs["guided"], self._beta)
        self.note(divergence=loss)
        return loss


def _collate(items: Sequence[Taught]) -> dict[str, torch.Tensor]:
    batch = pad_examples([(one.prompt, one.answer) for one in items])
    parts = zip(*(one.guidance for one in items), strict=True)
    return batch | dict(zip(Guidance._fields, map(torch.cat, parts), strict=True))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices, by length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    yield from (order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE))


def _states(
    model: PreTrainedModel, examples: Sequence[tuple[Sequence[int], Sequence[int]]], dtype: torch.dtype
) -> Sequence[torch.Tensor]:
    """Of each example the hidden states that predict its answer: (num_tokens, hidden_size) float32."""
    batch = pad_examples(examples)
    device = model.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        states = _answer_states(model, batch["ids"].to(device), batch["is_answer"].to(device))
    return states.float().split([len(answer) for _, answer in examples])


def _answer_states(model: nn.Module, ids: torch.Tensor, is_answer: torch.Tensor) -> torch.Tensor:
    """(num_tokens, hidden_size), the answers' tokens of one row after those of the row before."""
    hidden = model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    return hidden[is_answer[:, 1:]]


def _head(model: nn.Module) -> torch.Tensor:
    return model.get_output_embeddings().weight
