"""Answers by transformers, for methods that need a model's inside, or several contexts of it at once.

- With a steering vector: added to what a layer hands on, wherever a token of the answer is predicted.
- Judged (Persona-judge, arXiv 2504.12663): tokens are drafted in one context and accepted or not in another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from pad_vllm.evaluation.engine import Answers, Request
from pad_vllm.training.loading import load_causal_lm

STEERING, JUDGE = "steering", "judge"
"""Arguments of a request: a :class:`Steering`, and a second prompt's ids, under which drafts are judged."""
DRAFTS_PER_ROUND = 4
"""Of a round of Persona-judge, as in its authors' code."""


class Steering(NamedTuple):
    """A vector that is added to what a layer hands on; (hidden_size,)."""

    layer: int
    vector: torch.Tensor


class InTransformers(NamedTuple):
    """A model that answers in this process."""

    model: str

    def generate(
        self,
        batches: Mapping[str, Sequence[Request]],
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
        stop: Sequence[str] = (),
        nll: bool = False,
        dtype: str = "float32",
        max_num_seqs: int = 64,
        **engine: Any,
    ) -> dict[str, Answers]:
        """As :func:`pad_vllm.evaluation.engine.generate_batches`, of whose engine's arguments two have a meaning here.
        Likelihoods are not given: these models read something else than the prompt, or are not what they were.

        Raises:
            ValueError: ``stop`` is given.
        """
        if stop:
            raise ValueError(f"stop={stop!r}: in transformers answers end with an end token alone")
        model = load_causal_lm("model", self.model).to(getattr(torch, dtype)).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        answers = {}
        for name, requests in batches.items():
            start = time.perf_counter()
            tokens = []
            for first in range(0, len(requests), max_num_seqs):
                some = requests[first : first + max_num_seqs]
                dice = [torch.Generator().manual_seed(seed + first + i) for i in range(len(some))]
                answer = judged if JUDGE in some[0].guidance else sampled
                tokens += answer(model, some, dice, temperature, max_tokens)
            seconds = time.perf_counter() - start
            answers[name] = Answers([tokenizer.decode(t, skip_special_tokens=True) for t in tokens], tokens, seconds)
        return answers


class ReadRows:
    """Texts of a batch, read on together in one KV cache, of which the last that was read can be forgotten.

    Args:
        prompts: all but the last token of each is read at once; ``last`` (num_rows,) has those.
        steering: of each row, or of none.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], steering: Sequence[Steering] = ()
    ) -> None:
        self.model, self.cache = model, DynamicCache(config=model.config)
        lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])
        longest = int(lengths.max())
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) + 1 :] = torch.tensor(prompt[:-1])
        self.last = torch.tensor([prompt[-1] for prompt in prompts])
        # What is padding, or was forgotten, stays in the cache and is masked.
        self.mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
        self.lengths = lengths
        self.steering: dict[int, torch.Tensor] = {}
        model(
            ids,
            attention_mask=self.mask,
            position_ids=(self.mask.cumsum(1) - 1).clamp_min(0),
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        self.steering = _by_layer(steering, len(prompts))

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits after each of ``tokens`` (num_rows, n), (num_rows, n, vocab_size) float32."""
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
        positions = self.lengths[:, None] + torch.arange(tokens.shape[1])
        self.lengths = self.lengths + tokens.shape[1]
        with _steered(self.model, self.steering):
            found = self.model(
                tokens, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache
            ).logits
        return found.float()

    def forget(self, num_read: int, num_kept: torch.Tensor) -> None:
        """Of the last ``num_read`` tokens each row keeps its first ``num_kept`` (num_rows,)."""
        self.mask[:, -num_read:] = (torch.arange(num_read) < num_kept[:, None]).long()
        self.lengths = self.lengths - num_read + num_kept

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with some rows."""
        self.cache.batch_select_indices(rows)
        self.mask, self.lengths, self.last = self.mask[rows], self.lengths[rows], self.last[rows]
        self.steering = {layer: vectors[rows] for layer, vectors in self.steering.items()}


@torch.inference_mode()
def sampled(
    model: PreTrainedModel,
    requests: Sequence[Request],
    dice: Sequence[torch.Generator],
    temperature: float,
    max_tokens: int,
) -> list[list[int]]:
    """Each request's tokens, an end token among them, drawn with its own generator; steered, where requests say so."""
    steering = [request.guidance[STEERING] for request in requests if STEERING in request.guidance]
    contexts = ReadRows(model, [request.prompt for request in requests], steering)
    answers: list[list[int]] = [[] for _ in requests]
    rows, tokens = list(range(len(requests))), contexts.last
    while rows:
        probabilities = _probabilities(contexts.read(tokens[:, None])[:, -1], temperature)
        tokens = _draw(probabilities, [dice[row] for row in rows])
        going = _extend(answers, rows, tokens[:, None], max_tokens, _end_ids(model))
        if len(going) < len(rows):
            contexts.keep(going)
        rows, tokens = [rows[i] for i in going], tokens[going]
    return answers


@torch.inference_mode()
def judged(
    model: PreTrainedModel,
    requests: Sequence[Request],
    dice: Sequence[torch.Generator],
    temperature: float,
    max_tokens: int,
) -> list[list[int]]:
    """Each request's tokens by Persona-judge: a round drafts tokens in one context, and in the other they are accepted
    with probability min(1, p_judge / p_draft); in place of the first that is not, one is drawn from what the judge has
    more of, and after all of them one from the judge. Then the two change places.

    By this rule a round's tokens have the judge's distribution, whatever was drafted.
    """
    drafter = ReadRows(model, [request.prompt for request in requests])
    judge = ReadRows(model, [request.guidance[JUDGE] for request in requests])
    answers: list[list[int]] = [[] for _ in requests]
    rows = list(range(len(requests)))
    while rows:
        own = [dice[row] for row in rows]
        tokens, num_tokens = _judged_round(drafter, judge, own, temperature)
        going = _extend(answers, rows, tokens, max_tokens, _end_ids(model), num_tokens)
        drafter.last = judge.last = tokens.gather(1, num_tokens[:, None] - 1)[:, 0]
        if len(going) < len(rows):
            drafter.keep(going)
            judge.keep(going)
        rows = [rows[i] for i in going]
        drafter, judge = judge, drafter
    return answers


def _judged_round(
    drafter: ReadRows, judge: ReadRows, dice: Sequence[torch.Generator], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (num_rows, DRAFTS_PER_ROUND + 1), and how many of them each row has: at least one."""
    token, drafts, drafted_with = drafter.last, [], []
    for _ in range(DRAFTS_PER_ROUND):
        drafted_with.append(_probabilities(drafter.read(token[:, None])[:, -1], temperature))
        token = _draw(drafted_with[-1], dice)
        drafts.append(token)
    drafter.read(token[:, None])  # so that both have read the same
    tokens, q = torch.stack(drafts, 1), torch.stack(drafted_with, 1)
    p = _probabilities(judge.read(torch.cat([judge.last[:, None], tokens], 1)), temperature)
    num_accepted = num_accepted_of(
        tokens, p, q, torch.stack([torch.rand(DRAFTS_PER_ROUND, generator=die) for die in dice])
    )
    for contexts in (drafter, judge):
        contexts.forget(DRAFTS_PER_ROUND + 1, num_accepted + 1)
    row = torch.arange(len(tokens))
    left = remainder(p, q)[row, num_accepted]
    next_tokens = _draw(left, dice)
    tokens = torch.cat([tokens, torch.zeros_like(tokens[:, :1])], 1)
    tokens[row, num_accepted] = next_tokens
    return tokens, num_accepted + 1


def num_accepted_of(drafts: torch.Tensor, p: torch.Tensor, q: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """How many of each row's drafts (num_rows, n) are accepted, until the first that is not.

    Args:
        p, q: the judge's and the drafter's probabilities, (num_rows, n or more, vocab_size).
        uniform: (num_rows, n) in [0, 1).
    """
    n = drafts.shape[1]
    ratio = (p[:, :n] / q).gather(2, drafts[:, :, None])[:, :, 0]
    return (uniform < ratio).long().cumprod(1).sum(1)


def remainder(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """What the next token is drawn from after so many accepted drafts, (num_rows, n + 1, vocab_size), not normalized:
    what the judge has more of than the drafter, and after all of them the judge's."""
    left = (p[:, :-1] - q).clamp_min(0)
    # Equal distributions reject nothing but by rounding.
    left = torch.where(left.sum(2, keepdim=True) > 0, left, p[:, :-1])
    return torch.cat([left, p[:, -1:]], 1)


def _end_ids(model: PreTrainedModel) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _extend(
    answers: list[list[int]],
    rows: Sequence[int],
    tokens: torch.Tensor,
    max_tokens: int,
    ends: set[int],
    num_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add each row's tokens to its answer, up to an end token or to the most. Returns which rows go on."""
    going = []
    for i, row in enumerate(rows):
        for token in tokens[i, : None if num_tokens is None else num_tokens[i]].tolist():
            answers[row].append(token)
            if token in ends or len(answers[row]) == max_tokens:
                break
        else:
            going.append(i)
    return torch.tensor(going, dtype=torch.long)


def _probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return (logits / temperature).softmax(-1)


def _draw(probabilities: torch.Tensor, dice: Sequence[torch.Generator]) -> torch.Tensor:
    """A token of each row, (num_rows,)."""
    return torch.cat([torch.multinomial(p, 1, generator=die) for p, die in zip(probabilities, dice, strict=True)])


def _by_layer(steering: Sequence[Steering], num_rows: int) -> dict[int, torch.Tensor]:
    """What each layer adds to each row: (num_rows, hidden_size)."""
    found: dict[int, torch.Tensor] = {}
    for row, one in enumerate(steering):
        found.setdefault(one.layer, torch.zeros(num_rows, len(one.vector)))[row] = one.vector
    return found


@contextmanager
def _steered(model: PreTrainedModel, steering: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Within it layers add to what they hand on."""

    def add(vectors: torch.Tensor) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + vectors[:, None].to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    layers = model.get_decoder().layers
    hooks = [layers[layer].register_forward_hook(add(vectors)) for layer, vectors in steering.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
