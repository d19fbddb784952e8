"""The oracle: PAD as a plain loop, to be checked by eye against the rule.

transformers and PyTorch in float32, no cache, one sequence at a time. Everything in pad-vllm is held against it.

    reward_c = log_softmax_C(r)_c - log_softmax_C(y)_c        C: the k largest finite entries of z, ties by lower id
    z'_c     = z_c + beta * reward_c   for c in C,   -inf elsewhere

y are the base model's logits, with masks (-inf) only; z are these after ``logit_bias``, then penalties, in the order of
both of vLLM's runners. Where nothing is biased or penalized z is y.

Several preferences, with weights w_j of which W is the sum, each in a context of its own with the reward logits r_j;
r_0 are those in the context without a preference:

    reward_c = sum_j w_j log_softmax_C(r_j)_c - W ref_c       ref: log_softmax_C(y), log_softmax_C(r_0), or 0

A reward model with another tokenizer (:class:`Groups`): C has no token without a key, and with G the distinct keys of C

    r_g = logsumexp of r over members(g),  y_g = logsumexp of y over the c in C with key(c) = g
    reward_g = sum_j w_j log_softmax_G(r_j)_g - W ref_g       ref: log_softmax_G(y), log_softmax_G(r_0), or 0
    z'_c     = z_c + beta * reward_key(c)

and its contexts grow by the pieces of each generated token. The first one may have keys, members and pieces of its own
(``Groups.first``).

Adapters: r_j are the logits of the reward model with adapter j merged into it, r_0 those without any.

Candidates N that the reward model has no opinion of, as ``</think>`` where it does not reason: z' of the others is by
the rule over these alone, and N keeps the probability among the candidates that the base gave it:

    z'_n = z_n + logsumexp of z' over C without N - logsumexp of z over C without N      (z_n where all of C is N)

A bound (``max_divergence``, nats): in place of beta there is the largest of 0, beta / 2^16, 2 beta / 2^16, ..., beta
for which

    KL(softmax of z' over C || softmax of z over C) < max_divergence

which grows with each of these (:func:`bounded_beta`), so bisection finds it; 0 where there is none.
What guidance did in a position (:func:`effect`), which a request's trace has as means over the tokens that it kept:

    divergence = KL(softmax_C z' || softmax_C z)
    changed    = argmax_C z' is not argmax_C z                         ties by lower id
    reward_j   = sum over c in C of softmax_C(z')_c (log_softmax_C(r_j)_c - ref_c)

with ref as above: log_softmax_C(y), log_softmax_C(r_0), or 0; where the weights' sum W is 0, no neutral context is
read, and ref is 0. Of groups the two are those of the candidate's group; and N is left out of C in reward_j.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

NEG_INF = float("-inf")
NUM_HALVINGS = 16


class Groups(NamedTuple):
    """What the base's tokens are to a reward model with another tokenizer."""

    key: list[int]
    """By base token; -1: no candidate; -2: a candidate that the reward model has no opinion of"""
    members: list[list[int]]
    """By reward token"""
    pieces: list[list[int]]
    """By base token, reward tokens"""
    first: Groups | None = None
    """Of an answer's first token, where that is another's"""


def guided_logits(
    z: torch.Tensor,
    r: torch.Tensor | list[torch.Tensor],
    top_k: int,
    beta: float,
    reference: str = "base",
    y: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
    r_0: torch.Tensor | None = None,
    groups: Groups | None = None,
    no_opinion: Collection[int] = (),
    max_divergence: float = math.inf,
) -> torch.Tensor:
    """z' of one position. z, y: [vocab] float, the base model's logits; y None: it is z. r: [vocab], the reward model's
    logits, or such for each preference. weights None: 1/m each. r_0: [vocab], where reference is ``neutral``.
    groups: of a reward model with another tokenizer. no_opinion: tokens that the reward model has none of."""
    y = z if y is None else y
    r = r if isinstance(r, list) else [r]
    weights = [1 / len(r)] * len(r) if weights is None else weights
    values = z.tolist()
    finite = [i for i in range(len(values)) if math.isfinite(values[i]) and (groups is None or groups.key[i] != -1)]
    best = sorted(finite, key=lambda i: (-values[i], i))[:top_k]
    silent = [c for c in best if c in no_opinion or (groups is not None and groups.key[c] == -2)]
    candidates = [c for c in best if c not in silent]
    guided = torch.full_like(z, NEG_INF)
    guided[silent] = z[silent]
    if not candidates:
        return guided
    if groups is None:
        r, y, r_0 = [r_j[candidates] for r_j in r], y[candidates], None if r_0 is None else r_0[candidates]
    else:
        keys = [groups.key[c] for c in candidates]
        distinct = sorted(set(keys))
        r = [logsumexp_each(r_j, [groups.members[g] for g in distinct]) for r_j in r]
        r_0 = None if r_0 is None else logsumexp_each(r_0, [groups.members[g] for g in distinct])
        y = logsumexp_each(y, [[c for c, key in zip(candidates, keys, strict=True) if key == g] for g in distinct])
    reward = sum(w * torch.log_softmax(r_j, dim=0) for w, r_j in zip(weights, r, strict=True))
    if reference == "base":
        reward = reward - sum(weights) * torch.log_softmax(y, dim=0)
    elif reference == "neutral":
        reward = reward - sum(weights) * torch.log_softmax(r_0, dim=0)
    else:
        assert reference == "none"
    if groups is not None:
        reward = reward[[distinct.index(key) for key in keys]]
    if max_divergence < math.inf:  # N keeps its share: the divergence over C is so much of that over C without N
        share = torch.exp(torch.logsumexp(z[candidates], dim=0) - torch.logsumexp(z[best], dim=0))
        beta = bounded_beta(z[candidates], reward, beta, float(max_divergence / share))
    guided[candidates] = z[candidates] + beta * reward
    guided[silent] += torch.logsumexp(guided[candidates], dim=0) - torch.logsumexp(z[candidates], dim=0)
    return guided


def bounded_beta(z: torch.Tensor, reward: torch.Tensor, beta: float, most: float) -> float:
    """The largest multiple of beta / 2^16, up to beta, whose divergence is below ``most``.

    d/db KL(softmax(z + b reward) || softmax(z)) = b Var(reward) under softmax(z + b reward), so it grows with |b|."""

    def keeps_to_it(b: float) -> bool:
        log_q, log_p = torch.log_softmax(z + b * reward, dim=0), torch.log_softmax(z, dim=0)
        divergence = sum(torch.exp(log_q) * (log_q - log_p))
        return bool(divergence < most) and most > 0

    if keeps_to_it(beta):
        return beta
    bounded, step = 0.0, beta
    for _ in range(NUM_HALVINGS):
        step = step / 2
        if keeps_to_it(bounded + step):
            bounded = bounded + step
    return bounded


class Effect(NamedTuple):
    """What guidance did in one position."""

    changed: bool
    divergence: float
    """In nats"""
    rewards: list[float]
    """Of each context"""


def effect(
    z: torch.Tensor,
    guided: torch.Tensor,
    r: torch.Tensor | list[torch.Tensor],
    reference: str = "base",
    y: torch.Tensor | None = None,
    r_0: torch.Tensor | None = None,
    groups: Groups | None = None,
    no_opinion: Collection[int] = (),
) -> Effect:
    """Of ``guided``, which :func:`guided_logits` made of z; the other arguments are that one's. ``r_0`` None: ref is 0
    where ``reference`` is neutral."""
    y = z if y is None else y
    r = r if isinstance(r, list) else [r]
    candidates = [c for c in range(len(guided)) if math.isfinite(guided[c])]
    log_q, log_p = torch.log_softmax(z[candidates], 0), torch.log_softmax(guided[candidates], 0)
    divergence = float((log_p.exp() * (log_p - log_q)).sum())
    changed = int(guided[candidates].argmax()) != int(z[candidates].argmax())  # the first of equal ones
    spoken = [c for c in candidates if c not in no_opinion and (groups is None or groups.key[c] != -2)]
    if not spoken:
        return Effect(changed, divergence, [0.0] * len(r))

    def log_of(values: torch.Tensor, is_base: bool = False) -> torch.Tensor:
        if groups is None:
            return torch.log_softmax(values[spoken], 0)
        keys = [groups.key[c] for c in spoken]
        distinct = sorted(set(keys))
        own = [[c for c, key in zip(spoken, keys, strict=True) if key == g] for g in distinct]
        tokens = own if is_base else [groups.members[g] for g in distinct]
        return torch.log_softmax(logsumexp_each(values, tokens), 0)[[distinct.index(key) for key in keys]]

    ref = {"base": lambda: log_of(y, True), "neutral": lambda: 0.0 if r_0 is None else log_of(r_0), "none": lambda: 0.0}
    p, against = torch.softmax(guided[spoken], 0), ref[reference]()
    return Effect(changed, divergence, [float((p * (log_of(r_j) - against)).sum()) for r_j in r])


def logsumexp_each(values: torch.Tensor, tokens: list[list[int]]) -> torch.Tensor:
    """Of the values of each of these lists of tokens."""
    return torch.stack([torch.logsumexp(values[part], dim=0) for part in tokens])


def biased(y: torch.Tensor, logit_bias: dict[int, float]) -> torch.Tensor:
    """``logit_bias`` of the OpenAI API."""
    y = y.clone()
    for token, bias in logit_bias.items():
        y[token] += bias
    return y


def penalized(
    y: torch.Tensor, prompt: list[int], output: list[int], presence: float, frequency: float, repetition: float
) -> torch.Tensor:
    """The penalties of the OpenAI API and of CTRL, one token at a time."""
    y = y.clone()
    for token in set(prompt) | set(output) if repetition != 1.0 else ():
        y[token] = y[token] / repetition if y[token] > 0 else y[token] * repetition
    for token in set(output) if frequency or presence else ():
        y[token] -= frequency * output.count(token) + presence
    return y


@functools.lru_cache(maxsize=4096)
@torch.no_grad()
def logits_after(model, token_ids: tuple[int, ...]) -> torch.Tensor:
    """A model's logits [vocab]. Kept for a while: answers to one prompt under other settings begin alike."""
    return model(torch.tensor([token_ids])).logits[0, -1].clone()


def reward_logits(model, token_ids: list[int], head: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """The reward model's logits [vocab] after ``token_ids``; ``head`` is (W [d, d], b [d]) on the hidden state."""
    if head is None:
        return logits_after(model, tuple(token_ids))
    weight, bias = head
    h = model.model(torch.tensor([token_ids])).last_hidden_state[0, -1]
    return model.lm_head(weight @ h + bias)


@torch.no_grad()
def generate(
    base,
    prompt_ids: list[int],
    max_tokens: int,
    *,
    reward=None,
    reward_prompt_ids: list[int] | list[list[int]] | None = None,
    weights: Sequence[float] | None = None,
    head: tuple[torch.Tensor, torch.Tensor] | None = None,
    top_k: int = 10,
    beta: float = 1.0,
    reference: str = "base",
    eos_token_id: int | None = None,
    mask: Callable[[torch.Tensor, list[int]], torch.Tensor] | None = None,
    logit_bias: Mapping[int, float] | Iterable[tuple[int, float]] = (),
    penalties: tuple[float, float, float] = (0.0, 0.0, 1.0),
    groups: Groups | None = None,
    neutral_prompt_ids: list[int] | None = None,
    behind: Callable[[torch.Tensor], torch.Tensor] | None = None,
    no_opinion: Mapping[int, int] | None = None,
    force: Callable[[list[int]], int | None] | None = None,
    adapted: Sequence | None = None,
    max_divergence: float = math.inf,
    effects: list[Effect] | None = None,
) -> list[int]:
    """Greedy continuation. ``reward_prompt_ids`` is the composed prompt, or one for each preference, whose ``weights``
    are 1/m each when None; None: the reward model sees the base's. ``neutral_prompt_ids``: without a preference, where
    it is not the base's prompt, as with ``groups``.

    ``mask``: (y [vocab], generated tokens) -> y with some at -inf; or what another logits processor before PAD makes of
    it, which nothing can tell from the base model's own. ``behind``: z' [vocab] -> what one behind PAD makes of it.
    ``penalties``: presence, frequency, repetition. ``no_opinion``: tokens that the reward model has none of -> what it
    reads for each. ``force``: generated tokens -> the next one, whatever the logits are, or None. ``adapted``: for each
    context, the reward model with its adapter merged; None: ``reward`` itself, which the neutral context always is.
    ``effects``: gets that of each token.
    """
    contexts = reward_prompt_ids or prompt_ids
    contexts = contexts if isinstance(contexts[0], list) else [contexts]
    output: list[int] = []
    while len(output) < max_tokens:
        y = logits_after(base, (*prompt_ids, *output)).clone()
        if mask is not None:
            y = mask(y, output)
        z = penalized(biased(y, dict(logit_bias)), prompt_ids, output, *penalties)
        if reward is not None:
            seen = reads(output, groups, no_opinion or {})
            read_by = adapted or [reward] * len(contexts)
            r = [reward_logits(model, ids + seen, head) for model, ids in zip(read_by, contexts, strict=True)]
            neutral = neutral_prompt_ids or prompt_ids
            r_0 = reward_logits(reward, neutral + seen, head) if reference == "neutral" else None
            of_first = groups is not None and groups.first is not None and not output
            now = groups.first if of_first else groups
            before = z
            z = guided_logits(z, r, top_k, beta, reference, y, weights, r_0, now, no_opinion or (), max_divergence)
            if effects is not None:
                r_0 = None if weights is not None and sum(weights) == 0 else r_0
                effects.append(effect(before, z, r, reference, y, r_0, now, no_opinion or ()))
        if behind is not None:
            z = behind(z)
        forced = force(output) if force is not None else None
        output.append(int(z.argmax()) if forced is None else forced)
        if output[-1] == eos_token_id:
            break
    return output


def reads(output: list[int], groups: Groups | None, no_opinion: Mapping[int, int]) -> list[int]:
    """The reward model's tokens for generated ones."""
    if groups is None:
        return [no_opinion.get(token, token) for token in output]
    tables = [groups.first or groups, *[groups] * len(output)]
    return [piece for token, table in zip(output, tables, strict=False) for piece in table.pieces[token]]


def mixed_head(tensors: dict[str, torch.Tensor], weights: dict[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_i a_i (W_i h + b_i), as one (W, b), from the tensors of a value-head file."""
    weight = sum(a * tensors[f"{name}.weight"] for name, a in weights.items())
    bias = sum(a * tensors[f"{name}.bias"] for name, a in weights.items())
    return weight, bias
