"""The guidance step in PyTorch: the rule in code, and what the fused kernel is held against.

For a guided row with base logits z, its candidates C the k largest finite entries of z (ties by lower token id), and
reward logits r on C:

    reward_c = log_softmax_C(r)_c - reference * log_softmax_C(y)_c
    z'_c     = z_c + beta * reward_c    for c in C,    -inf elsewhere

y are the base model's own logits, z these after what the request did to them by ``logit_bias`` and penalties
(:class:`Controls`): the reward compares two models, and the controls stay in the sum. Without controls y is z.
Of some candidates N the reward model may have no opinion, as of ``</think>`` where it does not reason. The others' z'
is by the rule over these alone, and N keeps the probability among the candidates that the base gave it:

    z'_n = z_n + logsumexp of z' over C without N - logsumexp of z over C without N      (z_n where all of C is N)

A row whose largest z' is no finite number gets its end token and nothing else: it is never left unguided.

The guided decoding of PAD (arXiv 2410.04070), with the candidate-normalized implicit reward of its released code.
``reference`` is 1 (pi_ref is the base model) or 0 (an autoregressive reward model). A constant added to a row of r
cancels, so r is computed for the candidates alone: k rows of lm_head.

With several contexts in a row (:class:`Mixture`), r is the weighted sum of theirs: of several preferences', and, with
a weight below 0, of one without a preference, where pi_ref is the reward model itself. Their normalizers cancel too.

Shapes: N rows of logits of which R are guided, C contexts (R, or more), V tokens, d hidden, K = the largest k.
Everything is computed in float32, whatever comes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from .selection import NEG_INF, select_candidates

MAX_LOGIT = 1e30
"""Of a logit with its controls undone: absurd ones overflow, and the differences of two must stay finite."""


class OutputTokens(NamedTuple):
    """The generated tokens that guided rows have seen: what presence and frequency are counted in."""

    token_ids: torch.Tensor
    """[H, L] int32 or int64, histories"""
    rows: torch.Tensor
    """[R] int64: each guided row's history"""
    begin: torch.Tensor
    """[R] int64: where in its history the generated tokens begin"""
    end: torch.Tensor
    """[R] int64: behind the last of them that is settled"""
    draft_ids: torch.Tensor
    """[R, D] int32: this step's drafts that the row has seen too, negative where there are fewer"""


class Controls(NamedTuple):
    """What requests did to the base logits: z = penalize(y + bias), in this order, as vLLM does it.

    By slot of the S requests; R rows are guided, V tokens.
    """

    slots: torch.Tensor
    """[R] int64: each guided row's request"""
    num_bias: torch.Tensor
    """[S] int32: how many tokens of the request are biased"""
    bias_ids: torch.Tensor
    """[S, B] int32: the first ``num_bias`` are these tokens"""
    bias: torch.Tensor
    """[S, B] float32: and this was added to their logits"""
    penalties: torch.Tensor
    """[S, 3] float32: presence, frequency, repetition; 0, 0 and 1 where there are none"""
    prompt_mask: torch.Tensor
    """[S, ceil(V / 32)] int32: a bit for each token of the prompt, for requests with a repetition penalty"""
    output: OutputTokens | None
    """None where no request in the batch has penalties"""


class Mixture(NamedTuple):
    """Rows that several contexts are mixed in: their reward logits are sum_j weights_j r_j, over J of C contexts."""

    contexts: torch.Tensor
    """[R, J] int64: each row's contexts, of C; behind the last of its own, any of them"""
    weights: torch.Tensor
    """[R, J] float32; 0 behind the last of a row's own"""


def map_heads(
    hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, head_weights: torch.Tensor
) -> torch.Tensor:
    """Mix value heads: a_0 h + sum_i a_i (W_i h + b_i), for i = 1..H.

    Args:
        hidden_states: [R, d], any float dtype.
        weight: [H, d, d] float32, or [H, d] for heads that are diagonal: the paper's w_p.
        bias: [H, d] float32.
        head_weights: [R, 1 + H] float32, a; a_0 is the weight of the unmapped hidden state.

    Returns:
        [R, d] float32.
    """
    h = hidden_states.float()
    mapped = (torch.einsum("hij,rj->rhi", weight, h) if weight.dim() == 3 else h.unsqueeze(1) * weight) + bias
    return head_weights[:, :1] * h + torch.einsum("rh,rhi->ri", head_weights[:, 1:], mapped)


def mix_contexts(values: torch.Tensor, mixture: Mixture) -> torch.Tensor:
    """sum_j weights_j values_j; [C, n], any float dtype -> [R, n] float32."""
    return torch.bmm(mixture.weights.unsqueeze(1), values[mixture.contexts].float()).squeeze(1)


def score_candidates(
    hidden_states: torch.Tensor,
    lm_head: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    vocab_start: int = 0,
    sharded: bool = False,
    bias_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reward model's logits of the candidates, before soft cap and scale.

    Args:
        hidden_states: [R, d], mapped by the value heads where there are any.
        lm_head: [V', d], any float dtype: the rows [vocab_start, vocab_start + V') of the whole output head.
        ids: [R, K] int64.
        bias: [V'] or None.
        vocab_start: where this shard begins.
        sharded: whether there are others. A candidate outside this one then scores 0: the sum over the shards of a
            tensor-parallel group is the score.
        bias_weight: [R, 1] float32, how many times a row's hidden state has the bias: where it is a mixture.

    Returns:
        [R, K] float32.
    """
    local = ids - vocab_start if vocab_start else ids
    mine = (local >= 0) & (local < lm_head.shape[0]) if sharded else None
    if sharded:
        local = local.where(mine, 0)
    scores = torch.bmm(lm_head[local].float(), hidden_states.float().unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        scores = scores + bias[local].float() * (1.0 if bias_weight is None else bias_weight)
    return scores.where(mine, 0.0) if sharded else scores


def cap_and_scale(scores: torch.Tensor, soft_cap: float | None = None, scale: float = 1.0) -> torch.Tensor:
    """What some architectures do to their logits, elementwise; after the scores of all shards are summed."""
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    return scores * scale


def undo_controls(
    z: torch.Tensor, ids: torch.Tensor, controls: Controls, vocab_size: int, may_read: bool
) -> torch.Tensor:
    """The candidates' logits as the base model gave them.

    Args:
        z: [R, K] float32, -inf where there is no candidate.
        ids: [R, K] int64.
        controls: of these rows.
        vocab_size: V, more than any id.
        may_read: as of :func:`select_candidates`.

    Returns:
        [R, K] float32 y, -inf where z is.
    """
    slots, y = controls.slots, z
    if controls.output is not None:
        presence, frequency, repetition = controls.penalties[slots].unsqueeze(-1).unbind(1)
        counts = count_output(controls.output, vocab_size, may_read).gather(1, ids)
        prompted = (controls.prompt_mask[slots].gather(1, ids // 32) >> (ids % 32)) & 1
        y = y + (frequency * counts + presence * (counts > 0))
        unrepeated = torch.where(y > 0, y * repetition, y / repetition)
        y = torch.where(prompted + counts > 0, unrepeated, y)
    biased = ids.unsqueeze(-1) == controls.bias_ids[slots].unsqueeze(1)
    biased &= torch.arange(biased.shape[-1], device=ids.device) < controls.num_bias[slots].view(-1, 1, 1)
    y = y - controls.bias[slots].unsqueeze(1).where(biased, 0.0).sum(-1)
    return y.clamp(-MAX_LOGIT, MAX_LOGIT).where(z > NEG_INF, NEG_INF)


def count_output(output: OutputTokens, vocab_size: int, may_read: bool) -> torch.Tensor:
    """How often each row has seen each token among its generated ones: [R, vocab_size] int32."""
    length = output.token_ids.shape[1]
    if may_read:
        length = int(output.end.max())
    place = torch.arange(length, device=output.end.device)
    seen = (place >= output.begin.unsqueeze(1)) & (place < output.end.unsqueeze(1))
    settled = output.token_ids[output.rows, :length].long().masked_fill(~seen, -1)
    tokens = torch.cat([settled, output.draft_ids.long()], 1)
    counts = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.int32, device=tokens.device)
    tokens = tokens.where((tokens >= 0) & (tokens < vocab_size), vocab_size)
    return counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.int32))[:, :vocab_size]


def reweight_(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    z: torch.Tensor,
    y: torch.Tensor,
    scores: torch.Tensor,
    top_k: torch.Tensor,
    beta: torch.Tensor,
    reference: torch.Tensor,
    end_ids: torch.Tensor,
    may_read: bool,
    has_opinion: torch.Tensor | None = None,
) -> None:
    """Write z' into the guided rows of ``logits``, in place; rows of top_k 0 are left alone.

    Args:
        logits: [N, V].
        rows: [R] int64.
        ids, z: of :func:`select_candidates`.
        y: [R, K] float32, z without its controls.
        scores: [R, K] float32, the reward model's logits of the candidates.
        top_k: [R] int64.
        beta: [R] float32.
        reference: [R] float32.
        end_ids: [R] int64, what a row without a finite z' is left with.
        may_read: as of :func:`select_candidates`.
        has_opinion: [R, K] bool, of which candidates the reward model has one; None: of all.
    """
    scores = scores.masked_fill(z == NEG_INF, NEG_INF)
    if has_opinion is not None:
        scores, y = scores.where(has_opinion, NEG_INF), y.where(has_opinion, NEG_INF)
    reward = scores.log_softmax(-1) - reference.unsqueeze(1) * y.log_softmax(-1)
    write_(logits, rows, ids, z, reward, top_k, beta, end_ids, may_read, has_opinion)


def write_(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    z: torch.Tensor,
    reward: torch.Tensor,
    top_k: torch.Tensor,
    beta: torch.Tensor,
    end_ids: torch.Tensor,
    may_read: bool,
    has_opinion: torch.Tensor | None = None,
) -> None:
    """As :func:`reweight_`, of rewards [R, K] float32; what these are without an opinion does not matter."""
    guided = torch.where(z > NEG_INF, z + beta.unsqueeze(1) * reward, NEG_INF)
    if has_opinion is not None:
        guided = keep_shares(guided, z, has_opinion)
    largest_z = guided.amax(-1, keepdim=True)  # of a NaN and anything it is NaN
    if not may_read or not math.isfinite(float(largest_z.sum())):
        sound = largest_z.isfinite()
        ids, guided = torch.where(sound, ids, end_ids.unsqueeze(1)), guided.where(sound, 0.0)
    guided = guided.to(logits.dtype)
    if may_read:
        if not bool(top_k.all()):
            live = top_k.nonzero().squeeze(1)
            rows, ids, guided = rows[live], ids[live], guided[live]
        if len(rows) == len(logits):  # they are distinct
            logits.fill_(NEG_INF)
        else:
            logits.index_fill_(0, rows, NEG_INF)
        logits[rows.unsqueeze(1), ids] = guided
        return
    new = logits.new_full((len(rows), logits.shape[1]), NEG_INF).scatter_(1, ids, guided)
    logits[rows] = torch.where(top_k.unsqueeze(1) > 0, new, logits[rows])


def keep_shares(guided: torch.Tensor, z: torch.Tensor, has_opinion: torch.Tensor) -> torch.Tensor:
    """z' [R, K] with that of the candidates without an opinion, which keep their share of the base's probability."""
    speaks = has_opinion & (z > NEG_INF)
    shift = guided.where(speaks, NEG_INF).logsumexp(-1) - z.where(speaks, NEG_INF).logsumexp(-1)
    shift = shift.where(speaks.any(-1), 0.0)
    return guided.where(has_opinion, z + shift.unsqueeze(1))


def guide_(
    logits: torch.Tensor,
    hidden_states: torch.Tensor,
    lm_head: torch.Tensor,
    rows: torch.Tensor,
    top_k: torch.Tensor,
    beta: torch.Tensor,
    reference: torch.Tensor,
    end_ids: torch.Tensor,
    *,
    max_top_k: int,
    vocab_size: int,
    controls: Controls | None = None,
    mixture: Mixture | None = None,
    bias: torch.Tensor | None = None,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    vocab_start: int = 0,
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    no_opinion: torch.Tensor | None = None,
    may_read: bool | None = None,
) -> None:
    """One step of PAD over a batch of logits, in place; rows that ``rows`` does not name are not touched.

    Args:
        logits: [N, V] float32 (or bf16), base logits after bias, penalties and grammar mask.
        hidden_states: [C, d], the reward model's, one for each context.
        lm_head: [V', d], the reward model's output head, or this rank's shard of it.
        rows: [R] int64, the guided rows of ``logits``, distinct.
        top_k: [R] int64, k of each row; 0 leaves the row alone, so that how many rows are guided may be known on the
            device only.
        beta: [R] float32, guidance strength.
        reference: [R] float32, how much of the base model's log probability the reward is held against: with
            ``base`` 1, or the sum of the contexts' weights; else 0.
        end_ids: [R] int64, the token that ends each row's request where guidance gives nothing finite.
        max_top_k: K >= every top_k, known on the host.
        vocab_size: tokens that base and reward model share, or that ``no_opinion`` names; others are never candidates.
        controls: what requests did to their logits by bias and penalties; None where none of them did.
        mixture: the contexts of each row; None: one each, in the rows' order.
        bias: [V'] of the output head, or None.
        heads: (weight [H, d, d] or [H, d], bias [H, d], head_weights [C, 1 + H]) of :func:`map_heads`, or None.
        soft_cap, scale: of the reward model's logits, where its architecture has them.
        vocab_start: first token of this rank's shard.
        all_reduce: sums the [R, K] scores over a tensor-parallel group; None on one device.
        no_opinion: [vocab_size] bool, of which tokens the reward model has no opinion, nor needs a row; None: of none.
        may_read: as of :func:`select_candidates`; None: where the logits are the host's own.
    """
    may_read = logits.is_cpu if may_read is None else may_read
    if heads is not None:
        hidden_states = map_heads(hidden_states, *heads)
    ids, z = select_candidates(logits, rows, top_k, max_top_k, vocab_size, may_read)
    has_opinion = None if no_opinion is None else ~no_opinion[ids]
    scored, bias_weight = ids if has_opinion is None else ids.where(has_opinion, vocab_start), None
    if mixture is not None and soft_cap is None:  # an output head is linear: it is enough to score the mixture
        hidden_states, bias_weight = mix_contexts(hidden_states, mixture), mixture.weights.sum(1, keepdim=True)
    elif mixture is not None:
        hidden_states = hidden_states[mixture.contexts.flatten()]
        scored = scored.repeat_interleave(mixture.contexts.shape[1], 0)
    scores = score_candidates(
        hidden_states, lm_head, scored, bias, vocab_start, sharded=all_reduce is not None, bias_weight=bias_weight
    )
    if all_reduce is not None:
        scores = all_reduce(scores)
    scores = cap_and_scale(scores, soft_cap, scale)
    if mixture is not None and soft_cap is not None:
        scores = torch.bmm(mixture.weights.unsqueeze(1), scores.unflatten(0, mixture.contexts.shape)).squeeze(1)
    y = z if controls is None else undo_controls(z, ids, controls, logits.shape[1], may_read)
    reweight_(logits, rows, ids, z, y, scores, top_k, beta, reference, end_ids, may_read, has_opinion)
