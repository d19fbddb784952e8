"""Policy gradient: a reward model learns from the answers that it guided, and from how well each one turned out.

What a user is served is a policy: at each token the guided distribution over the base's top-k candidates. Its own
answers say how often it does what is wanted, and its gradient is exact, since guidance is a formula of the reward
model's logits. The objective is the answers' advantage (clipped, as in PPO, arXiv 1707.06347; without a length bias,
arXiv 2503.20783), less the divergence of the policy from the base, which is known at every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
    """

    plain: Sequence[int]
    prompt: Sequence[int]
    answer: Sequence[int]
    advantage: float


class Steps(NamedTuple):
    """The tokens of an answer.

    Attributes:
        candidates: (num_tokens, top_k) int32, the base's likeliest tokens.
        base: (num_tokens, top_k) float32, their logits by the base.
        chosen: (num_tokens,) int64, which of them came; -1: none, as another engine rounds otherwise.
        before: (num_tokens,) float32, its log-probability when it was sampled.
    """

    candidates: torch.Tensor
    base: torch.Tensor
    chosen: torch.Tensor
    before: torch.Tensor


class GuidedPolicy(NamedTuple):
    """How answers are guided."""

    beta: float
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
            logprobs = guided.logprobs(candidate_logits(read, _head(reward), candidates), logits)
            before = logprobs.gather(1, chosen.clamp(min=0)[:, None])[:, 0]
            found[i] = Steps(candidates.int(), logits, chosen, before)
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


class PolicyTrainer(FixedOrderTrainer):
    """Learns from ``rollouts``.

    Args:
        model: the reward model, or its LoRA.
        steps: of each rollout.
        clip: how far a token's probability can move from what it was before its advantage no longer counts.
        divergence: what a nat a token counts, in units of the advantage of an answer of the mean length.
    """

    def __init__(
        self,
        model: nn.Module,
        rollouts: Sequence[Rollout],
        steps: Sequence[Steps],
        args: TrainingArguments,
        guided: GuidedPolicy,
        *,
        clip: float = 0.2,
        divergence: float,
    ) -> None:
        self._guided, self._clip, self._divergence = guided, clip, divergence
        self._mean_length = sum(len(one.answer) for one in rollouts) / len(rollouts)
        sizes = [len(one.prompt) + len(one.answer) for one in rollouts]
        super().__init__(model, list(zip(rollouts, steps, strict=True)), _collate, args, sizes)

    def compute_loss(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], *_: object, **__: object):
        states = _answer_states(model, inputs["ids"], inputs["is_answer"])
        with torch.autocast(states.device.type, enabled=False):
            scores = candidate_logits(states.float(), _head(model), inputs["candidates"])
            gain, divergence = policy_terms(scores, inputs, self._guided, self._clip)
        # Not means over the batch's tokens: batches are of one length, and short answers would count more.
        num_tokens = len(inputs["ids"]) * self._mean_length
        gain, divergence = gain.sum() / num_tokens, divergence.sum() / num_tokens
        self.note(gain=gain, divergence=divergence)
        return self._divergence * divergence - gain


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
    return gain, F.kl_div(base, own, log_target=True, reduction="none").sum(-1)


def _collate(items: Sequence[tuple[Rollout, Steps]]) -> dict[str, torch.Tensor]:
    rollouts, steps = zip(*items, strict=True)
    batch = pad_examples([(one.prompt, one.answer) for one in rollouts])
    batch |= dict(zip(Steps._fields, map(torch.cat, zip(*steps, strict=True)), strict=True))
    lengths = torch.tensor([len(one.answer) for one in rollouts])
    advantage = torch.tensor([one.advantage for one in rollouts]).repeat_interleave(lengths)
    return batch | {"advantage": advantage}


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
