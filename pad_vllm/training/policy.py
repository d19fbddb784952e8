"""A reward model learns from the answers that it guided.

What a user is served is a policy: at each token the guided distribution over the base's top-k candidates. It is a
formula of the reward model's logits, so its gradient is exact.

- :class:`PolicyTrainer` learns from how well each answer turned out. The objective is the answers' advantage (clipped,
  as in PPO, arXiv 1707.06347; without a length bias, arXiv 2503.20783), less the divergence of the policy from the
  base, which is known at every token.
- :class:`StrengthTrainer` learns to guide more or less strongly where that is asked for, as the model did before at
  another beta: a distillation, at every token (arXiv 1503.02531).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from pad_vllm.training.trainer import FixedOrderTrainer, pad_examples

BATCH_SIZE = 16


class Rollout(NamedTuple):
    """A guided answer, as ids.

    Attributes:
        plain: the prompt, which the base reads.
        prompt: what the reward model reads.
        advantage: by how much it turned out better than others.
        strength: by how much more strongly its preference is to guide.
    """

    plain: Sequence[int]
    prompt: Sequence[int]
    answer: Sequence[int]
    advantage: float = 0.0
    strength: float = 1.0


class Steps(NamedTuple):
    """The tokens of an answer.

    Attributes:
        candidates: (num_tokens, top_k) int32, the base's likeliest tokens.
        base: (num_tokens, top_k) float32, their logits by the base.
        scores: (num_tokens, top_k) float32, their logits by the reward model.
        chosen: (num_tokens,) int64, which of them came; -1: none, as another engine rounds otherwise.
        before: (num_tokens,) float32, its log-probability when it was sampled.
    """

    candidates: torch.Tensor
    base: torch.Tensor
    scores: torch.Tensor
    chosen: torch.Tensor
    before: torch.Tensor


class GuidedPolicy(NamedTuple):
    """How answers are guided."""

    beta: float | torch.Tensor
    top_k: int
    temperature: float

    def logprobs(self, scores: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """(num_tokens, top_k) float32, of logits of the candidates by the reward model and by the base."""
        return ((base + self.beta * (scores - base)) / self.temperature).log_softmax(-1)


@torch.no_grad()
def policy_steps(
    base: PreTrainedModel,
    reward: PreTrainedModel,
    rollouts: Sequence[Rollout],
    guided: GuidedPolicy,
    dtype: torch.dtype = torch.float32,
) -> list[Steps]:
    """What there was to choose from at every token, and how likely what came was.

    Args:
        base, reward: causal language models whose logits are a linear map of the last hidden state.
        dtype: that the models multiply in.
    """
    found: list[Steps] = [None] * len(rollouts)  # type: ignore[list-item]
    # The longest first, or no logits would fit where those before them were: what is kept lies between.
    order = sorted(range(len(rollouts)), key=lambda i: -len(rollouts[i].prompt) - len(rollouts[i].answer))
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        own = [rollouts[i] for i in rows]
        by_base = _states(base, [(one.plain, one.answer) for one in own], dtype)
        by_reward = _states(reward, [(one.prompt, one.answer) for one in own], dtype)
        for i, one, plain, read in zip(rows, own, by_base, by_reward, strict=True):
            logits, candidates = (plain @ _head(base).float().T).topk(guided.top_k)
            is_chosen = candidates == torch.tensor(one.answer)[:, None]
            chosen = torch.where(is_chosen.any(-1), is_chosen.int().argmax(-1), -1)
            scores = candidate_logits(read, _head(reward), candidates)
            before = guided.logprobs(scores, logits).gather(1, chosen.clamp(min=0)[:, None])[:, 0]
            found[i] = Steps(candidates.int(), logits, scores, chosen, before)
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


class RolloutTrainer(FixedOrderTrainer, ABC):
    """Learns from ``rollouts``.

    Args:
        model: the reward model, or its LoRA.
        steps: of each rollout.
    """

    def __init__(
        self,
        model: nn.Module,
        rollouts: Sequence[Rollout],
        steps: Sequence[Steps],
        args: TrainingArguments,
        guided: GuidedPolicy,
    ) -> None:
        self.guided = guided
        self._mean_length = sum(len(one.answer) for one in rollouts) / len(rollouts)
        sizes = [len(one.prompt) + len(one.answer) for one in rollouts]
        super().__init__(model, list(zip(rollouts, steps, strict=True)), _collate, args, sizes)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], *_: object, **__: object):
        states = _answer_states(model, inputs["ids"], inputs["is_answer"])
        with torch.autocast(states.device.type, enabled=False):
            scores = candidate_logits(states.float(), _head(model), inputs["candidates"])
            terms = self.terms(scores, inputs)
        # Not means over the batch's tokens: batches are of one length, and short answers would count more.
        num_tokens = len(inputs["ids"]) * self._mean_length
        means = {name: term.sum() / num_tokens for name, term in terms.items()}
        self.note(**means)
        return self.loss(**means)

    @abstractmethod
    def terms(self, scores: torch.Tensor, tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of each token, (num_tokens,) float32, by name.

        Args:
            scores: (num_tokens, top_k) float32, logits of the candidates by the reward model.
            tokens: the fields of :class:`Steps`, and of each token's rollout ``advantage`` and ``strength``.
        """

    @abstractmethod
    def loss(self, **means: torch.Tensor) -> torch.Tensor:
        """Of the terms' means over an answer of the mean length."""


class PolicyTrainer(RolloutTrainer):
    """Follows the policy gradient.

    Args:
        clip: how far a token's probability can move from what it was before its advantage no longer counts.
        divergence: what a nat a token counts, in units of the advantage of an answer of the mean length.
    """

    def __init__(self, *args: Any, clip: float = 0.2, divergence: float) -> None:
        self._clip, self._divergence = clip, divergence
        super().__init__(*args)

    def terms(self, scores: torch.Tensor, tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gain, divergence = policy_terms(scores, tokens, self.guided, self._clip)
        return {"gain": gain, "divergence": divergence}

    def loss(self, **means: torch.Tensor) -> torch.Tensor:
        return self._divergence * means["divergence"] - means["gain"]


class StrengthTrainer(RolloutTrainer):
    """Learns to guide by ``strength`` times the beta, as the model did before."""

    def terms(self, scores: torch.Tensor, tokens: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        strength = tokens["strength"][:, None]
        wanted = self.guided._replace(beta=self.guided.beta * strength).logprobs(tokens["scores"], tokens["base"])
        return {"distance": _divergence(wanted, self.guided.logprobs(scores, tokens["base"]))}

    def loss(self, **means: torch.Tensor) -> torch.Tensor:
        return means["distance"]


def policy_terms(
    scores: torch.Tensor, tokens: Mapping[str, torch.Tensor], guided: GuidedPolicy, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token, (num_tokens,) float32: its clipped advantage, and the divergence from the base, in nats.

    Args:
        scores: (num_tokens, top_k) float32, logits of the candidates by the reward model.
        tokens: the fields of :class:`Steps`, and ``advantage`` (num_tokens,) float32.
    """
    own, chosen, advantage = guided.logprobs(scores, tokens["base"]), tokens["chosen"], tokens["advantage"]
    ratio = (own.gather(1, chosen.clamp(min=0)[:, None])[:, 0] - tokens["before"]).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage) * (chosen >= 0)
    base = (tokens["base"] / guided.temperature).log_softmax(-1)
    return gain, _divergence(own, base)


def _divergence(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(p, other), of (num_tokens, top_k) log-probabilities: (num_tokens,), in nats."""
    return F.kl_div(other, logprobs, log_target=True, reduction="none").sum(-1)


def _collate(items: Sequence[tuple[Rollout, Steps]]) -> dict[str, torch.Tensor]:
    rollouts, steps = zip(*items, strict=True)
    batch = pad_examples([(one.prompt, one.answer) for one in rollouts])
    batch |= dict(zip(Steps._fields, map(torch.cat, zip(*steps, strict=True)), strict=True))
    lengths = torch.tensor([len(one.answer) for one in rollouts])
    for name in ("advantage", "strength"):
        batch[name] = torch.tensor([getattr(one, name) for one in rollouts]).repeat_interleave(lengths)
    return batch


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
