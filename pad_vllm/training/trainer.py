"""Plain PyTorch loops for learning a personalized reward model: supervised fine-tuning, then PAD.

Everything here works on token ids. A preference is already in them, put there by
:class:`~pad_vllm.reward.template.PromptTemplate` as in serving.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pad_vllm.training.objective import pad_loss, sequence_sums, token_logprobs

NUM_BATCHES_SORTED = 16


class Example(NamedTuple):
    """A prompt and the answer to learn, token ids; the answer ends with EOS."""

    prompt: list[int]
    answer: list[int]


class PairExample(NamedTuple):
    """A preference pair as token ids; the answers end with EOS.

    ``prompt`` has the preference in it and is what the reward model reads. ``ref_prompt`` is the plain prompt, what
    the reference reads.
    """

    prompt: list[int]
    ref_prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def answer_logprobs(model: PreTrainedModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the answers' tokens under ``model``.

    Rows are padded on the right, where causal attention never looks, so no mask is needed; the lm_head runs on the
    positions that predict an answer token only.

    Returns:
        log-probabilities (num_answer_tokens,) float32, and the index of the example of each (num_answer_tokens,) int64.
    """
    lengths = [len(prompt) + len(answer) for prompt, answer in examples]
    ids = torch.zeros(len(examples), max(lengths), dtype=torch.long)
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        ids[row, :length] = torch.tensor(example.prompt + example.answer)
        is_answer[row, len(example.prompt) : length] = True
    ids, is_answer = ids.to(model.device), is_answer.to(model.device)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.lm_head(hidden[is_answer[:, 1:]])
    return token_logprobs(logits, ids[is_answer]), is_answer.nonzero()[:, 0]


def answer_logprob_sums(model: PreTrainedModel, examples: Sequence[Example]) -> torch.Tensor:
    """Log-probability of each answer, summed over its tokens: (num_examples,) float32."""
    logprobs, rows = answer_logprobs(model, examples)
    return sequence_sums(logprobs, rows, len(examples))


def train_sft(
    model: PreTrainedModel, examples: Sequence[Example], *, batch_size: int, lr: float, seed: int, desc: str
) -> None:
    """Maximum likelihood of the answers, one pass over ``examples``; trains ``model`` in place."""

    mean_length = sum(len(example.answer) for example in examples) / len(examples)

    def loss(batch: list[Example]) -> tuple[torch.Tensor, dict[str, float]]:
        # Not the mean over the batch's tokens: batches are of one length, and it would favor short answers.
        loss = -answer_logprobs(model, batch)[0].sum() / (len(batch) * mean_length)
        return loss, {"loss": loss.item()}

    _train(model, loss, examples, batch_size, lr, seed, desc)


def train_pad(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    pairs: Sequence[PairExample],
    *,
    batch_size: int,
    lr: float,
    beta: float,
    nll_weight: float,
    seed: int,
    desc: str,
) -> None:
    """The PAD objective, one pass over ``pairs``; trains ``model`` in place.

    Args:
        model: pi_theta, reads the preference.
        reference: pi_ref, frozen, reads the plain prompt. It should be the model that will be served as the base:
            serving scores a token by its log-ratio to the base's logits, the very quantity that is learned here.
        beta: scale of the reward in :func:`~pad_vllm.training.objective.pad_loss`.
        nll_weight: weight of the chosen answers' negative log-likelihood per token. The PAD loss sees differences
            only, and is as content when both answers become unlikely; their text then falls apart.
    """
    mean_length = sum(len(pair.chosen) for pair in pairs) / len(pairs)

    def loss(batch: list[PairExample]) -> tuple[torch.Tensor, dict[str, float]]:
        logprobs = _pair_logprobs(model, reference, batch)
        loss, margins = pad_loss(*logprobs, beta)
        nll = -logprobs[0].mean() / mean_length
        stats = {"pad": loss.item(), "nll": nll.item(), "accuracy": (margins > 0).float().mean().item()}
        return loss + nll_weight * nll, stats

    _train(model, loss, pairs, batch_size, lr, seed, desc)


@torch.no_grad()
def reward_margins(
    model: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[PairExample], batch_size: int = 32
) -> torch.Tensor:
    """By how much each pair's chosen answer is rewarded above its rejected one: (num_pairs,) float32, in nats."""
    margins = []
    for start in range(0, len(pairs), batch_size):
        margins.append(pad_loss(*_pair_logprobs(model, reference, pairs[start : start + batch_size]), beta=1.0)[1])
    return torch.cat(margins)


def _pair_logprobs(
    model: PreTrainedModel, reference: PreTrainedModel, pairs: Sequence[PairExample]
) -> tuple[torch.Tensor, ...]:
    """The arguments of ``pad_loss``: chosen, rejected, ref_chosen, ref_rejected, each (num_pairs,) float32."""
    chosen = [(pair.prompt, pair.ref_prompt, pair.chosen) for pair in pairs]
    rejected = [(pair.prompt, pair.ref_prompt, pair.rejected) for pair in pairs]
    both = chosen + rejected
    sums = answer_logprob_sums(model, [Example(prompt, answer) for prompt, _, answer in both])
    with torch.no_grad():
        ref_sums = answer_logprob_sums(reference, [Example(ref_prompt, answer) for _, ref_prompt, answer in both])
    return *sums.split(len(pairs)), *ref_sums.split(len(pairs))


def _train(
    model: PreTrainedModel,
    loss_of: Callable[[list[Any]], tuple[torch.Tensor, dict[str, float]]],
    examples: Sequence[Any],
    batch_size: int,
    lr: float,
    seed: int,
    desc: str,
) -> None:
    """One pass of AdamW over length-bucketed batches, linear warmup over a twentieth of it, then cosine to zero."""
    batches = list(_batches(examples, batch_size, random.Random(seed)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches), pct_start=0.05)
    model.train()
    for batch in (progress := tqdm(batches, desc=desc)):
        loss, stats = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix({name: f"{value:.3f}" for name, value in stats.items()}, refresh=False)
    model.eval()


def _batches(examples: Sequence[Any], batch_size: int, rng: random.Random) -> Iterator[list[Any]]:
    """Shuffled batches of examples of similar length, so that little is padding."""
    chunk = batch_size * NUM_BATCHES_SORTED
    examples = list(examples)
    rng.shuffle(examples)
    for start in range(0, len(examples), chunk):
        bucket = sorted(examples[start : start + chunk], key=lambda example: sum(map(len, example)))
        batches = [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
        rng.shuffle(batches)
        yield from batches
