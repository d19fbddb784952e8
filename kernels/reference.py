"""The guidance step in PyTorch: the rule in code, and what the fused kernel is held against.

For a guided row with base logits z, its candidates C the k largest finite entries of z (ties by lower token id), and
reward logits r on C:

    reward_c = log_softmax_C(r)_c - reference * log_softmax_C(z)_c
    z'_c     = z_c + beta * reward_c    for c in C,    -inf elsewhere

The guided decoding of PAD (arXiv 2410.04070), with the candidate-normalized implicit reward of its released code.
``reference`` is 1 (pi_ref is the base model) or 0 (an autoregressive reward model). A constant added to a row of r
cancels, so r is computed for the candidates alone: k rows of lm_head.

Shapes: N rows of logits of which R are guided, V tokens, d hidden, K = the largest k. Everything is computed in
float32, whatever comes in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

NEG_INF = float("-inf")
SLICE = 64
"""Tokens of the vocabulary that are looked at together."""


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


def select_candidates(
    logits: torch.Tensor, rows: torch.Tensor, top_k: torch.Tensor, max_top_k: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates of each guided row, largest base logit first; of equal ones the lower token ids are in.

    Reads nothing back from a device.

    Args:
        logits: [N, V].
        rows: [R] int64, the guided rows.
        top_k: [R] int64, 0 <= top_k <= max_top_k.
        max_top_k: K, host integer.
        vocab_size: only the first ``vocab_size`` <= V tokens can be candidates.

    Returns:
        ids [R, K] int64, and z [R, K] float32: the base logits, -inf in places beyond a row's candidates.
    """
    # The k first tokens are in the k first slices, by largest logit: one pass over the vocabulary, and no copy of it.
    maxima = slice_maxima(logits, vocab_size)
    if not reads_are_free(logits) or not bool((maxima < float("inf")).all()):
        logits = logits.nan_to_num(nan=NEG_INF, posinf=NEG_INF, neginf=NEG_INF)
        maxima = slice_maxima(logits, vocab_size)
    k, num_slices = min(max_top_k, vocab_size), maxima.shape[1]
    _, slices = largest(maxima[rows].float(), torch.arange(num_slices, device=rows.device), min(k, num_slices))
    ids = (slices.unsqueeze(-1) * SLICE + torch.arange(SLICE, device=rows.device)).flatten(1)
    # What the last slice lacks comes behind all tokens, of which there are k in these slices.
    z = logits[rows.unsqueeze(1), ids.clamp(max=vocab_size - 1)].float().masked_fill(ids >= vocab_size, NEG_INF)
    values, ids = largest(z, ids, k)
    place = torch.arange(k, device=z.device)
    return ids, values.masked_fill(place >= top_k.unsqueeze(1), NEG_INF)


def reads_are_free(tensor: torch.Tensor) -> bool:
    """Whether the host may look at values, and at lengths that depend on them, without waiting for a device."""
    return tensor.is_cpu


def slice_maxima(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The largest logit of each slice of the vocabulary; [N, V] -> [N, ceil(vocab_size / SLICE)]."""
    whole = vocab_size // SLICE * SLICE
    parts = [logits[:, :whole].unflatten(1, (-1, SLICE)).amax(-1)] if whole else []
    if whole < vocab_size:
        parts.append(logits[:, whole:vocab_size].amax(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def largest(values: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of each row, in order; of equal ones the lower ids. (``topk`` breaks ties as it likes.)

    Args:
        values: [R, n] float32, no NaN.
        ids: [R, n] or [n] int64, below 2**31, distinct in a row.
        k: at most n.

    Returns:
        values [R, k], ids [R, k].
    """
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers that sort as the floats do
    places = (ordered * 2**32 - ids).topk(k, dim=-1).indices
    return values.gather(1, places), ids.expand_as(values).gather(1, places)


def score_candidates(
    hidden_states: torch.Tensor,
    lm_head: torch.Tensor,
    ids: torch.Tensor,
    bias: torch.Tensor | None = None,
    vocab_start: int = 0,
    sharded: bool = False,
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

    Returns:
        [R, K] float32.
    """
    local = ids - vocab_start if vocab_start else ids
    mine = (local >= 0) & (local < lm_head.shape[0]) if sharded else None
    if sharded:
        local = local.where(mine, 0)
    scores = torch.bmm(lm_head[local].float(), hidden_states.float().unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        scores = scores + bias[local].float()
    return scores.where(mine, 0.0) if sharded else scores


def cap_and_scale(scores: torch.Tensor, soft_cap: float | None = None, scale: float = 1.0) -> torch.Tensor:
    """What some architectures do to their logits, elementwise; after the scores of all shards are summed."""
    if soft_cap is not None:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    return scores * scale


def reweight_(
    logits: torch.Tensor,
    rows: torch.Tensor,
    ids: torch.Tensor,
    z: torch.Tensor,
    scores: torch.Tensor,
    top_k: torch.Tensor,
    beta: torch.Tensor,
    reference: torch.Tensor,
) -> None:
    """Write z' into the guided rows of ``logits``, in place; rows of top_k 0 are left alone.

    Args:
        logits: [N, V].
        rows: [R] int64.
        ids, z: of :func:`select_candidates`.
        scores: [R, K] float32, the reward model's logits of the candidates.
        top_k: [R] int64.
        beta: [R] float32.
        reference: [R] float32, 1 or 0.
    """
    candidate = z > NEG_INF
    log_r = scores.masked_fill(~candidate, NEG_INF).log_softmax(-1)
    reward = log_r - reference.unsqueeze(1) * z.log_softmax(-1)
    guided = torch.where(candidate, z + beta.unsqueeze(1) * reward, NEG_INF)
    guided = guided.to(logits.dtype)
    if reads_are_free(logits):
        live = top_k.nonzero().squeeze(1)
        rows, ids, guided = rows[live], ids[live], guided[live]
        logits.index_fill_(0, rows, NEG_INF)
        logits[rows.unsqueeze(1), ids] = guided
        return
    new = logits.new_full((len(rows), logits.shape[1]), NEG_INF).scatter_(1, ids, guided)
    logits[rows] = torch.where(top_k.unsqueeze(1) > 0, new, logits[rows])


def guide_(
    logits: torch.Tensor,
    hidden_states: torch.Tensor,
    lm_head: torch.Tensor,
    rows: torch.Tensor,
    top_k: torch.Tensor,
    beta: torch.Tensor,
    reference: torch.Tensor,
    *,
    max_top_k: int,
    vocab_size: int,
    bias: torch.Tensor | None = None,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    vocab_start: int = 0,
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """One step of PAD over a batch of logits, in place; rows that ``rows`` does not name are not touched.

    Args:
        logits: [N, V] float32 (or bf16), base logits after bias, penalties and grammar mask.
        hidden_states: [R, d], the reward model's, one for each guided row.
        lm_head: [V', d], the reward model's output head, or this rank's shard of it.
        rows: [R] int64, the guided rows of ``logits``, distinct.
        top_k: [R] int64, k of each row; 0 leaves the row alone, so that how many rows are guided may be known on the
            device only.
        beta: [R] float32, guidance strength.
        reference: [R] float32, 1 for ``base`` and 0 for ``none``.
        max_top_k: K >= every top_k, known on the host.
        vocab_size: tokens that base and reward model share; others are never candidates.
        bias: [V'] of the output head, or None.
        heads: (weight [H, d, d] or [H, d], bias [H, d], head_weights [R, 1 + H]) of :func:`map_heads`, or None.
        soft_cap, scale: of the reward model's logits, where its architecture has them.
        vocab_start: first token of this rank's shard.
        all_reduce: sums the [R, K] scores over a tensor-parallel group; None on one device.
    """
    if heads is not None:
        hidden_states = map_heads(hidden_states, *heads)
    ids, z = select_candidates(logits, rows, top_k, max_top_k, vocab_size)
    scores = score_candidates(hidden_states, lm_head, ids, bias, vocab_start, sharded=all_reduce is not None)
    if all_reduce is not None:
        scores = all_reduce(scores)
    reweight_(logits, rows, ids, z, cap_and_scale(scores, soft_cap, scale), top_k, beta, reference)
