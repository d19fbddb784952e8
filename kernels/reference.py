"""The guidance step in PyTorch: the rule in code, and what the fused kernel is held against.

For a guided row with base logits z, its candidates C the k largest finite entries of z (ties by lower token id), and
reward logits r on C:

    reward_c = log_softmax_C(r)_c - reference * log_softmax_C(y)_c
    z'_c     = z_c + beta * reward_c    for c in C,    -inf elsewhere

y are the base model's own logits, z these after what the request did to them by ``logit_bias`` and penalties
(:class:`.types.Controls`): the reward compares two models, and the controls stay in the sum. Without controls y is z.
Of some candidates N the reward model may have no opinion, as of ``</think>`` where it does not reason. The others' z'
is by the rule over these alone, and N keeps the probability among the candidates that the base gave it:

    z'_n = z_n + logsumexp of z' over C without N - logsumexp of z over C without N      (z_n where all of C is N)

Where a row's divergence has a bound (:attr:`.types.Rows.max_divergence`), :mod:`.divergence` says which smaller beta it
gets.

A row whose largest z' is no finite number gets its end token and nothing else: it is never left unguided.

The guided decoding of PAD (arXiv 2410.04070), with the candidate-normalized implicit reward of its released code.
``reference`` is 1 (pi_ref is the base model) or 0 (an autoregressive reward model). A constant added to a row of r
cancels, so r is computed for the candidates alone: k rows of lm_head.

With several contexts in a row (:class:`.types.Mixture`), r is the weighted sum of theirs: of several preferences', and,
with a weight below 0, of one without a preference, where pi_ref is the reward model itself. Their normalizers cancel
too.

Shapes are :mod:`.types`', K the largest k. Everything is computed in float32, whatever comes in.
"""

from __future__ import annotations

import math

import torch

from .divergence import bound_beta
from .groups import reward_groups
from .scoring import append_adapters, cap_and_scale, map_heads, mix_contexts, score_candidates
from .selection import MAX_LOGIT, NEG_INF, Candidates, select_candidates
from .tracing import trace_
from .types import Controls, Groups, HeadMix, Mixture, OutputHead, OutputTokens, Rows, SharedVocabulary, Trace


def guide_(
    logits: torch.Tensor,
    hidden_states: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    vocabulary: SharedVocabulary | Groups,
    *,
    controls: Controls | None = None,
    mixture: Mixture | None = None,
    head_mix: HeadMix | None = None,
    trace: Trace | None = None,
) -> None:
    """One step of PAD over a batch of logits, in place; rows that ``rows`` does not name are not touched.

    Args:
        logits: [N, V] float32 (or bf16), base logits after bias, penalties and grammar mask.
        hidden_states: [C, d], any float dtype: the reward model's, one for each context.
        head: the reward model's output head.
        rows: the guided rows of ``logits``.
        vocabulary: what candidates are to the reward model: tokens of its own, or of groups of its tokens.
        controls: what requests did to their logits by bias and penalties; None where none of them did.
        mixture: the contexts of each row; None: one each, in the rows' order.
        head_mix: value heads, and their weights in each context; None: the hidden states are taken as they are.
        trace: receives what guidance did in the rows; None: nothing is traced.
    """
    if head_mix is not None:
        hidden_states = map_heads(hidden_states, head_mix)
    hidden_states = append_adapters(hidden_states, head.adapters)
    candidates = select_candidates(logits, rows, vocabulary.vocab_size)
    y = candidates.z if controls is None else undo_controls(candidates, controls)
    if isinstance(vocabulary, Groups):
        reward, has_opinion = reward_groups(hidden_states, head, rows, vocabulary, candidates, y, mixture)
    else:
        reward, has_opinion = reward_tokens(hidden_states, head, rows, vocabulary, candidates, y, mixture)
    write_(logits, rows, candidates, reward, has_opinion)
    if trace is not None:
        trace_(logits, hidden_states, head, rows, vocabulary, candidates, y, mixture, trace)


def undo_controls(candidates: Candidates, controls: Controls) -> torch.Tensor:
    """The candidates' logits as the base model gave them: [R, K] float32 y, -inf where z is."""
    ids, z = candidates.ids, candidates.z
    slots, y = controls.slots, z
    if controls.output is not None:
        presence, frequency, repetition = controls.penalties[slots].unsqueeze(-1).unbind(1)
        counts = count_output(controls.output, 32 * controls.prompt_mask.shape[1], candidates.is_readable).gather(
            1, ids
        )
        prompted = (controls.prompt_mask[slots].gather(1, ids // 32) >> (ids % 32)) & 1
        y = y + (frequency * counts + presence * (counts > 0))
        unrepeated = torch.where(y > 0, y * repetition, y / repetition)
        y = torch.where(prompted + counts > 0, unrepeated, y)
    biased = ids.unsqueeze(-1) == controls.bias_ids[slots].unsqueeze(1)
    biased &= torch.arange(biased.shape[-1], device=ids.device) < controls.num_bias[slots].view(-1, 1, 1)
    y = y - controls.bias[slots].unsqueeze(1).where(biased, 0.0).sum(-1)
    return y.clamp(-MAX_LOGIT, MAX_LOGIT).where(z > NEG_INF, NEG_INF)


def count_output(output: OutputTokens, vocab_size: int, is_readable: bool) -> torch.Tensor:
    """How often each row has seen each token below ``vocab_size`` among its generated ones: [R, vocab_size] int32."""
    length = output.token_ids.shape[1]
    if is_readable:
        length = int(output.end.max())
    place = torch.arange(length, device=output.end.device)
    seen = (place >= output.begin.unsqueeze(1)) & (place < output.end.unsqueeze(1))
    settled = output.token_ids[output.rows, :length].long().masked_fill(~seen, -1)
    tokens = torch.cat([settled, output.draft_ids.long()], 1)
    counts = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.int32, device=tokens.device)
    tokens = tokens.where((tokens >= 0) & (tokens < vocab_size), vocab_size)
    return counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.int32))[:, :vocab_size]


def reward_tokens(
    hidden_states: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    vocabulary: SharedVocabulary,
    candidates: Candidates,
    y: torch.Tensor,
    mixture: Mixture | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reward of each candidate, by its own row of the output head.

    Args:
        hidden_states: [C, d], mapped by the value heads where there are any; [C, d + Q] where the head has adapters.
        y: [R, K] float32, z without its controls.

    Returns:
        [R, K] float32 reward; and [R, K] bool, of which candidates the reward model has an opinion: None: of all. What
        the reward of the others is does not matter.
    """
    ids, has_opinion = candidates.ids, None
    scored, bias_weight = ids, None
    if vocabulary.no_opinion is not None:
        has_opinion = ~vocabulary.no_opinion[ids]
        scored = ids.where(has_opinion, head.vocab_start)
    if mixture is not None and head.soft_cap is None:  # an output head is linear: it is enough to score the mixture
        hidden_states, bias_weight = mix_contexts(hidden_states, mixture), mixture.weights.sum(1, keepdim=True)
    elif mixture is not None:
        hidden_states = hidden_states[mixture.contexts.flatten()]
        scored = scored.repeat_interleave(mixture.contexts.shape[1], 0)
    scores = score_candidates(hidden_states, head, scored, bias_weight)
    if head.all_reduce is not None:
        scores = head.all_reduce(scores)
    scores = cap_and_scale(scores, head)
    if mixture is not None and head.soft_cap is not None:
        scores = torch.bmm(mixture.weights.unsqueeze(1), scores.unflatten(0, mixture.contexts.shape)).squeeze(1)
    scores = scores.masked_fill(candidates.z == NEG_INF, NEG_INF)
    if has_opinion is not None:
        scores, y = scores.where(has_opinion, NEG_INF), y.where(has_opinion, NEG_INF)
    return scores.log_softmax(-1) - rows.reference.unsqueeze(1) * y.log_softmax(-1), has_opinion


def write_(
    logits: torch.Tensor,
    rows: Rows,
    candidates: Candidates,
    reward: torch.Tensor,
    has_opinion: torch.Tensor | None,
) -> None:
    """Write z' into the guided rows of ``logits``, in place; rows of top_k 0 are left alone.

    Args:
        logits: [N, V].
        reward, has_opinion: as :func:`reward_tokens` returns them.
    """
    ids, z, index, top_k = candidates.ids, candidates.z, rows.index, rows.top_k
    beta = rows.beta
    if rows.max_divergence is not None:
        beta = bound_beta(z, reward, beta, rows.max_divergence, has_opinion)
    guided = torch.where(z > NEG_INF, z + beta.unsqueeze(1) * reward, NEG_INF)
    if has_opinion is not None:
        guided = keep_shares(guided, z, has_opinion)
    largest_z = guided.amax(-1, keepdim=True)  # of a NaN and anything it is NaN
    if not rows.is_readable or not math.isfinite(float(largest_z.sum())):
        sound = largest_z.isfinite()
        ids, guided = torch.where(sound, ids, rows.end_ids.unsqueeze(1)), guided.where(sound, 0.0)
    guided = guided.to(logits.dtype)
    if rows.is_readable:
        if not bool(top_k.all()):
            live = top_k.nonzero().squeeze(1)
            index, ids, guided = index[live], ids[live], guided[live]
        if index.shape[0] == logits.shape[0]:  # they are distinct
            logits.fill_(NEG_INF)
        else:
            logits.index_fill_(0, index, NEG_INF)
        logits[index.unsqueeze(1), ids] = guided
        return
    new = logits.new_full((len(index), logits.shape[1]), NEG_INF).scatter_(1, ids, guided)
    logits[index] = torch.where(top_k.unsqueeze(1) > 0, new, logits[index])


def keep_shares(guided: torch.Tensor, z: torch.Tensor, has_opinion: torch.Tensor) -> torch.Tensor:
    """z' [R, K] with that of the candidates without an opinion, which keep their share of the base's probability."""
    speaks = has_opinion & (z > NEG_INF)
    shift = guided.where(speaks, NEG_INF).logsumexp(-1) - z.where(speaks, NEG_INF).logsumexp(-1)
    shift = shift.where(speaks.any(-1), 0.0)
    return guided.where(has_opinion, z + shift.unsqueeze(1))
