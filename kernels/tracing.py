"""What guidance did in each row, in PyTorch: the values that a request's trace is the sums of.

For a guided row with candidates C, base logits z, guided ones z', and the reward logits r_j of its contexts:

    divergence = KL(softmax_C z' || softmax_C z)
    changed    = argmax_C z' is not argmax_C z                         ties by lower id
    reward_j   = sum over c in C of softmax_C(z')_c (log_softmax_C(r_j)_c - ref_c)

ref is log_softmax_C(y), log_softmax_C(r_0) of the neutral context, or 0 (:attr:`.types.Trace.references`). With another
tokenizer the two are those of the candidate's group; candidates of which the reward model has no opinion are left out
of reward_j. z' is read where the step has written it. A row that got its end token instead has no values.
"""

from __future__ import annotations

import torch

from .groups import gather_shards, score_groups
from .scoring import cap_and_scale, score_candidates
from .selection import NEG_INF, Candidates
from .types import NO_OPINION, REFERENCE_BASE, Groups, Mixture, OutputHead, Rows, SharedVocabulary, Trace


def trace_(
    logits: torch.Tensor,
    hidden_states: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    vocabulary: SharedVocabulary | Groups,
    candidates: Candidates,
    y: torch.Tensor,
    mixture: Mixture | None,
    trace: Trace,
) -> None:
    """Add a step's rows to ``trace``; arguments are those of :func:`.reference.guide_`, when it has written the rows.

    Args:
        hidden_states: [C, d], mapped by the value heads where there are any.
        y: [R, K] float32, z without its controls.
    """
    ids, z = candidates.ids, candidates.z
    num_rows, num_contexts = len(ids), 1 if mixture is None else mixture.contexts.shape[1]
    if mixture is not None:
        hidden_states = hidden_states[mixture.contexts.flatten()]
    if isinstance(vocabulary, Groups):
        places = ids if rows.key_offsets is None else ids + rows.key_offsets.unsqueeze(1)
        keys = vocabulary.key[places].long().masked_fill(z == NEG_INF, -1)
        has_opinion = (z > NEG_INF) & (keys != NO_OPINION)
        scores = score_groups(
            hidden_states, head, keys.repeat_interleave(num_contexts, 0), vocabulary, candidates.is_readable
        )
        if head.all_reduce is not None:
            scores = gather_shards(scores, head).logsumexp(0)
        counts, y = share_groups(keys, y)
    else:
        has_opinion, counts = z > NEG_INF, None
        if vocabulary.no_opinion is not None:
            has_opinion = has_opinion & ~vocabulary.no_opinion[ids]
        scored = ids.where(has_opinion, head.vocab_start)
        scores = score_candidates(hidden_states, head, scored.repeat_interleave(num_contexts, 0))
        if head.all_reduce is not None:
            scores = head.all_reduce(scores)
        scores = cap_and_scale(scores, head)
    guided = logits[rows.index.unsqueeze(1), ids].float()
    r = scores.unflatten(0, (num_rows, num_contexts))
    is_read = None if mixture is None else mixture.weights != 0
    add_(trace, rows, row_values(guided, candidates, y, r, is_read, has_opinion, counts, trace.references[trace.slots]))


def share_groups(keys: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of groups of candidates: [R, K] keys and y -> how many candidates each one's group has, and the group's y."""
    same = keys.unsqueeze(1) == keys.unsqueeze(2)
    return same.sum(-1), y.unsqueeze(1).where(same, NEG_INF).logsumexp(-1)


def row_values(
    guided: torch.Tensor,
    candidates: Candidates,
    y: torch.Tensor,
    r: torch.Tensor,
    is_read: torch.Tensor | None,
    has_opinion: torch.Tensor,
    counts: torch.Tensor | None,
    references: torch.Tensor,
) -> torch.Tensor:
    """The values of rows.

    Args:
        guided: [R, K] float32, z'.
        y: [R, K] float32; of groups, each candidate's group's.
        r: [R, J, K] float32, likewise.
        is_read: [R, J] bool: which of these are the row's own contexts; None: all.
        has_opinion: [R, K] bool: candidates that the reward model has an opinion of.
        counts: [R, K]: how many candidates share a candidate's group; None: none do.
        references: [R] int64.

    Returns:
        [R, NUM_COUNTS + J] float32.
    """
    ids, z = candidates.ids, candidates.z
    is_candidate = z > NEG_INF
    sound = (guided.isfinite() | ~is_candidate).all(-1) & is_candidate.any(-1)
    q = guided.where(is_candidate, NEG_INF)
    log_p, log_q = q.log_softmax(-1), z.log_softmax(-1)
    divergence = torch.where(is_candidate, log_p.exp() * (log_p - log_q), 0.0).sum(-1)
    is_best = q == q.amax(-1, keepdim=True)
    last = torch.iinfo(ids.dtype).max
    changed = ids.where(is_best, last).amin(-1) != ids.where(z == z.amax(-1, keepdim=True), last).amin(-1)

    def log_softmax(values: torch.Tensor) -> torch.Tensor:
        """[..., K], over distinct groups: each counts once."""
        shares = values if counts is None else values - (counts if values.dim() == 2 else counts.unsqueeze(1)).log()
        spoken = has_opinion if values.dim() == 2 else has_opinion.unsqueeze(1)
        return values - shares.where(spoken, NEG_INF).logsumexp(-1, keepdim=True)

    p = guided.where(has_opinion, NEG_INF).softmax(-1).where(has_opinion, 0.0)
    log_r = log_softmax(r)
    of_neutral = log_r.gather(1, references.clamp(0, r.shape[1] - 1).view(-1, 1, 1).expand(-1, 1, r.shape[2]))[:, 0]
    against = torch.where((references == REFERENCE_BASE).unsqueeze(1), log_softmax(y), 0.0)
    against = torch.where((references >= 0).unsqueeze(1), of_neutral, against)
    rewards = torch.where(has_opinion.unsqueeze(1), p.unsqueeze(1) * (log_r - against.unsqueeze(1)), 0.0).sum(-1)
    if is_read is not None:
        rewards = rewards.where(is_read, 0.0)
    values = torch.cat([torch.stack([torch.ones_like(divergence), changed.float(), divergence], 1), rewards], 1)
    return values.where(sound.unsqueeze(1), 0.0)


def add_(trace: Trace, rows: Rows, values: torch.Tensor) -> None:
    """Leave the rows' ``values`` [R, NUM_COUNTS + J] in ``trace``; rows of top_k 0 leave nothing."""
    positions = trace.row_positions[rows.index] if trace.by_logits_row else trace.row_positions
    at = trace.slots, positions % trace.positions.shape[1]
    is_live = rows.top_k > 0
    before, kept = trace.positions[at], trace.values[at]
    moves_on = is_live & (before >= 0) & (before != positions)
    kept[:, 1] += kept[:, 0].where(moves_on.unsqueeze(1), 0.0)
    padded = torch.zeros_like(kept[:, 0])
    padded[:, : values.shape[1]] = values
    kept[:, 0] = padded.where(is_live.unsqueeze(1), kept[:, 0])
    trace.values[at] = kept
    trace.positions[at] = positions.where(is_live, before)
