"""What guidance did in each row, on a GPU: :mod:`.tracing` in a launch behind the step's, and in one more where rows
have several contexts.

A step has the candidates, and of a row with one context their scores. Contexts that were mixed in the hidden state are
scored apart by :func:`score_contexts_kernel`. :func:`trace_kernel`, or :func:`trace_groups_kernel` with another
tokenizer, has a program for each row: it reads z' where the step has written it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .fused_groups import GroupScores, add_exponentials
from .fused_scoring import capped, context_args, dot_candidates, head_args, row_args
from .keys import LOWEST_KEY, from_key
from .launching import COUNTS, ROW_POINTERS
from .types import NUM_COUNTS, REFERENCE_BASE, Mixture, OutputHead, Rows, SharedVocabulary, Trace

SCORED, BLOCK_D = 4, 512
"""Candidates of a context that a program scores, and elements of their rows of lm_head that it holds at a time."""
SCORE_WARPS, TRACE_WARPS = 4, 1
NUM_OTHERS = 16
"""Candidates with which all are compared at a time, to find those of one group."""
LEAST = tl.constexpr(-3.4028234663852886e38)
FIRST_REWARD = tl.constexpr(NUM_COUNTS)
HOLDS_BASE = tl.constexpr(REFERENCE_BASE)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def score_contexts_kernel(
    top_k_ptr,  # [R] int64
    top_k_stride,
    candidates_ptr,  # [R, K] int64
    hidden_ptr,  # [C, hidden_size + num_more]
    hidden_stride,
    lm_head_ptr,  # [shard_size, hidden_size]
    lm_head_stride,
    bias_ptr,  # [shard_size], or nothing
    more_ptr,  # [shard_size, num_more], or nothing: the adapters' columns of lm_head
    more_stride,
    num_more,
    contexts_ptr,  # [R, J] int64
    weights_ptr,  # [R, J] float32
    num_contexts,  # J
    vocab_start,
    shard_size,
    hidden_size,
    scores_ptr,  # [R * J, K] float32, out: only of candidates, and of contexts with a weight
    K: tl.constexpr,
    SCORED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The candidates' scores in one context, before soft cap and scale."""
    context = tl.program_id(0).to(tl.int64)
    row_idx = context // num_contexts
    place = tl.program_id(1) * SCORED + tl.arange(0, SCORED)
    top_k = tl.load(top_k_ptr + row_idx * top_k_stride)
    if (tl.program_id(1) * SCORED < top_k) & (tl.load(weights_ptr + context) != 0.0):
        candidates = tl.load(candidates_ptr + row_idx * K + place)
        _, ids = from_key(candidates)
        local = ids - vocab_start
        is_mine = (candidates > LOWEST_KEY) & (local >= 0) & (local < shard_size)
        local = tl.where(is_mine, local, 0)
        row_hidden_ptr = hidden_ptr + tl.load(contexts_ptr + context) * hidden_stride
        scores = dot_candidates(
            row_hidden_ptr, lm_head_ptr, lm_head_stride, bias_ptr, more_ptr, more_stride, num_more, 1.0, local, is_mine,
            hidden_size, SCORED, BLOCK_D, HAS_BIAS,
        )  # fmt: skip
        tl.store(scores_ptr + context * K + place, scores)


@triton.jit
def log_softmax(values, is_there, is_counted):
    """[K], of those that are there; of groups, whose members have one value, the first alone counts."""
    most = tl.max(tl.where(is_there, values, LEAST), 0)
    total = tl.sum(tl.where(is_there & is_counted, tl.exp(values - most), 0.0), 0)
    return values - most - tl.log(tl.maximum(total, 1e-38))


@triton.jit
def count_row(row_ptr, z, ids, is_candidate, WIDTH: tl.constexpr):
    """z' [K], whether it is sound, and what a row's values [WIDTH] begin with: 1, whether the first choice is another,
    and the divergence."""
    written = tl.load(row_ptr + ids, mask=is_candidate, other=0.0).to(tl.float32)
    guided, i = written, tl.arange(0, WIDTH)
    finite = tl.abs(guided) < float("inf")  # false for NaN
    num_bad = tl.sum((is_candidate & (finite == 0)).to(tl.int32), 0)
    sound = (num_bad == 0) & (tl.max(is_candidate.to(tl.int32), 0) > 0)
    guided = tl.where(is_candidate & finite, guided, LEAST)
    log_p, log_q = log_softmax(guided, is_candidate, is_candidate), log_softmax(z, is_candidate, is_candidate)
    divergence = tl.sum(tl.where(is_candidate, tl.exp(log_p) * (log_p - log_q), 0.0), 0)
    best, last = tl.max(guided, 0), 0x7FFFFFFF
    now = tl.min(tl.where(is_candidate & (guided == best), ids, last), 0)
    z_best = tl.max(tl.where(is_candidate, z, LEAST), 0)
    before = tl.min(tl.where(is_candidate & (z == z_best), ids, last), 0)
    changed = (now != before).to(tl.float32)
    return written, sound, tl.where(i == 0, 1.0, tl.where(i == 1, changed, tl.where(i == 2, divergence, 0.0)))


@triton.jit
def expectation(guided, values, has_opinion):
    """Of values [K], under softmax of z' over the candidates that the reward model has an opinion of."""
    p = tl.where(has_opinion, tl.exp(log_softmax(guided, has_opinion, has_opinion)), 0.0)
    return tl.sum(tl.where(has_opinion, p * values, 0.0), 0)


@triton.jit
def add_row(
    values, row, row_idx, slot, row_positions_ptr, values_ptr, positions_ptr, num_places, VALUES: tl.constexpr,
    WIDTH: tl.constexpr, BY_LOGITS_ROW: tl.constexpr,
):  # fmt: skip
    """Leave a row's values [WIDTH] at its place, as :func:`.tracing.add_` does."""
    position = tl.load(row_positions_ptr + (row if BY_LOGITS_ROW else row_idx)).to(tl.int64)
    at = slot * num_places + position % num_places
    before = tl.load(positions_ptr + at)
    i = tl.arange(0, WIDTH)
    last_ptr = values_ptr + at * 2 * VALUES
    last = tl.load(last_ptr + i, mask=i < VALUES, other=0.0)
    total = tl.load(last_ptr + VALUES + i, mask=i < VALUES, other=0.0)
    moves_on = (before >= 0) & (before != position)
    tl.debug_barrier()  # all have read
    tl.store(last_ptr + VALUES + i, total + tl.where(moves_on, last, 0.0), mask=i < VALUES)
    tl.store(last_ptr + i, values, mask=i < VALUES)
    tl.store(positions_ptr + at, position)


@triton.jit
def load_scores(scores_ptr, at, is_counted, soft_cap, scale, HAS_SOFT_CAP: tl.constexpr):
    r = tl.load(scores_ptr + at, mask=is_counted, other=0.0)
    if HAS_SOFT_CAP:
        r = capped(r, soft_cap)
    return r * scale


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def trace_kernel(
    logits_ptr,  # [N, num_cols]
    logits_stride,
    rows_ptr,  # [R] int64
    top_k_ptr,  # [R] int64
    top_k_stride,
    slots_ptr,  # [R] int64
    row_positions_ptr,  # [N] or [R] int64
    values_ptr,  # [S, num_places, 2, VALUES] float32, in and out
    positions_ptr,  # [S, num_places] int64, in and out
    num_places,
    references_ptr,  # [S] int64
    candidates_ptr,  # [R, K] int64
    weights_ptr,  # [R, J] float32, or nothing
    num_contexts,  # J
    y_ptr,  # [R, K] float32, or nothing
    scores_ptr,  # [R * J, K] float32
    no_opinion_ptr,  # [vocab_size] bool, or nothing
    soft_cap,
    scale,
    K: tl.constexpr,
    VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_LOGITS_ROW: tl.constexpr,
    HAS_CONTROLS: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """What guidance did in one row that is written."""
    row_idx = tl.program_id(0).to(tl.int64)
    if tl.load(top_k_ptr + row_idx * top_k_stride) > 0:
        place, i = tl.arange(0, K), tl.arange(0, WIDTH)
        row, slot = tl.load(rows_ptr + row_idx), tl.load(slots_ptr + row_idx)
        candidates = tl.load(candidates_ptr + row_idx * K + place)
        is_candidate = candidates > LOWEST_KEY
        z, ids = from_key(candidates)
        guided, sound, values = count_row(logits_ptr + row * logits_stride, z, ids, is_candidate, WIDTH)
        has_opinion = is_candidate
        if no_opinion_ptr is not None:
            has_opinion = is_candidate & (tl.load(no_opinion_ptr + ids, mask=is_candidate, other=1) == 0)
        reference = tl.load(references_ptr + slot)
        first = row_idx * num_contexts
        against = tl.zeros([K], tl.float32)
        if reference == HOLDS_BASE:
            y = z
            if HAS_CONTROLS:
                y = tl.load(y_ptr + row_idx * K + place)
            against = log_softmax(y, has_opinion, has_opinion)
        elif reference >= 0:
            r = load_scores(scores_ptr, (first + reference) * K + place, has_opinion, soft_cap, scale, HAS_SOFT_CAP)
            against = log_softmax(r, has_opinion, has_opinion)
        for j in range(num_contexts):
            is_read = True
            if weights_ptr is not None:
                is_read = tl.load(weights_ptr + first + j) != 0.0
            if is_read:
                r = load_scores(scores_ptr, (first + j) * K + place, has_opinion, soft_cap, scale, HAS_SOFT_CAP)
                reward = expectation(guided, log_softmax(r, has_opinion, has_opinion) - against, has_opinion)
                values = tl.where(i == FIRST_REWARD + j, reward, values)
        values = tl.where(sound, values, 0.0)
        add_row(
            values, row, row_idx, slot, row_positions_ptr, values_ptr, positions_ptr, num_places, VALUES, WIDTH,
            BY_LOGITS_ROW,
        )  # fmt: skip


@triton.jit
def load_group_scores(scores_ptr, context, num_all, num_parts, first, has_opinion, K: tl.constexpr):
    """[K]: what the programs have of each candidate's group, put together."""
    most, total = tl.full([K], LEAST, tl.float32), tl.zeros([K], tl.float32)
    for part in range(num_parts):
        at = (part * num_all + context) * K + first
        r = tl.load(scores_ptr + at, mask=has_opinion, other=0.0)
        most, total = add_exponentials(most, total, r)
    return most + tl.log(tl.maximum(total, 1e-38))


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def trace_groups_kernel(
    logits_ptr,  # [N, num_cols]
    logits_stride,
    rows_ptr,  # [R] int64
    top_k_ptr,  # [R] int64
    top_k_stride,
    slots_ptr,  # [R] int64
    row_positions_ptr,  # [N] or [R] int64
    values_ptr,  # [S, num_places, 2, VALUES] float32, in and out
    positions_ptr,  # [S, num_places] int64, in and out
    num_places,
    references_ptr,  # [S] int64
    candidates_ptr,  # [R, K] int64
    weights_ptr,  # [R, J] float32, or nothing
    num_contexts,  # J
    y_ptr,  # [R, K] float32, or nothing
    groups_ptr,  # [R, K] int32
    scores_ptr,  # [num_parts, R * J, K] float32
    num_parts,
    K: tl.constexpr,
    NUM_OTHERS: tl.constexpr,
    VALUES: tl.constexpr,
    WIDTH: tl.constexpr,
    BY_LOGITS_ROW: tl.constexpr,
    HAS_CONTROLS: tl.constexpr,
):
    """What guidance did in one row that is written, by the candidates' groups."""
    row_idx = tl.program_id(0).to(tl.int64)
    if tl.load(top_k_ptr + row_idx * top_k_stride) > 0:
        place, i = tl.arange(0, K), tl.arange(0, WIDTH)
        row, slot = tl.load(rows_ptr + row_idx), tl.load(slots_ptr + row_idx)
        candidates = tl.load(candidates_ptr + row_idx * K + place)
        group = tl.load(groups_ptr + row_idx * K + place)
        is_candidate, has_opinion = group != -1, group >= 0
        z, ids = from_key(candidates)
        guided, sound, values = count_row(logits_ptr + row * logits_stride, z, ids, is_candidate, WIDTH)
        first_of_group = tl.full([K], K, tl.int32)
        most, total = tl.full([K], LEAST, tl.float32), tl.zeros([K], tl.float32)
        for start in range(0, K, NUM_OTHERS):
            others = start + tl.arange(0, NUM_OTHERS)
            same = group[:, None] == tl.load(groups_ptr + row_idx * K + others)[None, :]
            first_of_group = tl.minimum(first_of_group, tl.min(tl.where(same, others[None, :], K), 1))
            if HAS_CONTROLS:
                their_y = tl.load(y_ptr + row_idx * K + others)
            else:
                their_y, _ = from_key(tl.load(candidates_ptr + row_idx * K + others))
            theirs = tl.where(same, their_y[None, :], LEAST)
            larger = tl.maximum(most, tl.max(theirs, 1))
            total = total * tl.exp(most - larger) + tl.sum(tl.exp(theirs - larger[:, None]), 1)
            most = larger
        is_first = first_of_group == place
        reference = tl.load(references_ptr + slot)
        first, num_all = row_idx * num_contexts, tl.num_programs(0) * num_contexts
        against = tl.zeros([K], tl.float32)
        if reference == HOLDS_BASE:
            against = log_softmax(most + tl.log(tl.maximum(total, 1e-38)), has_opinion, is_first)
        elif reference >= 0:
            r = load_group_scores(scores_ptr, first + reference, num_all, num_parts, first_of_group, has_opinion, K)
            against = log_softmax(r, has_opinion, is_first)
        for j in range(num_contexts):
            is_read = True
            if weights_ptr is not None:
                is_read = tl.load(weights_ptr + first + j) != 0.0
            if is_read:
                r = load_group_scores(scores_ptr, first + j, num_all, num_parts, first_of_group, has_opinion, K)
                reward = expectation(guided, log_softmax(r, has_opinion, is_first) - against, has_opinion)
                values = tl.where(i == FIRST_REWARD + j, reward, values)
        values = tl.where(sound, values, 0.0)
        add_row(
            values, row, row_idx, slot, row_positions_ptr, values_ptr, positions_ptr, num_places, VALUES, WIDTH,
            BY_LOGITS_ROW,
        )  # fmt: skip


def score_contexts(
    hidden_states: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    candidates: torch.Tensor,
    mixture: Mixture,
    scores: torch.Tensor,
) -> None:
    """The candidates' scores in each context of each row, before soft cap and scale, of this rank's shard.

    Args:
        hidden_states: [C, d], mapped by the value heads where there are any; [C, d + Q] where the head has adapters.
        candidates: [R, K] int64, keys.
        scores: [R * J, K] float32, out; of candidates, and of contexts with a weight.
    """
    num_rows, K = candidates.shape
    num_contexts = mixture.contexts.shape[1]
    score_contexts_kernel[(num_rows * num_contexts, triton.cdiv(rows.max_top_k, SCORED))](
        *(rows.top_k, rows.top_k.stride(0), candidates),
        *head_args(hidden_states, head),
        *(*context_args(mixture), head.vocab_start, *head.weight.shape, scores),
        K=K,
        SCORED=SCORED,
        BLOCK_D=BLOCK_D,
        HAS_BIAS=head.bias is not None,
        num_warps=SCORE_WARPS,
    )


def trace_args(
    logits: torch.Tensor, rows: Rows, candidates: torch.Tensor, mixture: Mixture | None, trace: Trace
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of both launches: their arguments from ``logits_ptr`` to ``num_contexts``, and constants."""
    _, weights, num_contexts = context_args(mixture)
    num_values = trace.values.shape[-1]
    args = (
        *(*row_args(logits, rows), trace.slots, trace.row_positions, trace.values, trace.positions),
        *(trace.positions.shape[1], trace.references, candidates, weights, num_contexts),
    )
    return args, {
        "K": candidates.shape[1],
        "VALUES": num_values,
        "WIDTH": triton.next_power_of_2(num_values),
        "BY_LOGITS_ROW": trace.by_logits_row,
        "num_warps": TRACE_WARPS,
    }


def trace_tokens_(
    logits: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    vocabulary: SharedVocabulary,
    candidates: torch.Tensor,
    mixture: Mixture | None,
    scores: torch.Tensor,
    is_capped: bool,
    y: torch.Tensor | None,
    trace: Trace,
) -> None:
    """Add the rows that are written to ``trace``.

    Args:
        candidates: [R, K] int64, keys.
        scores: [R * J, K] float32, whole; ``is_capped``: a soft cap is in them.
        y: [R, K] float32, the candidates' logits without controls; None where there are none.
    """
    args, constants = trace_args(logits, rows, candidates, mixture, trace)
    trace_kernel[(len(candidates),)](
        *(*args, y, scores, vocabulary.no_opinion, head.soft_cap or 1.0, head.scale),
        HAS_CONTROLS=y is not None,
        HAS_SOFT_CAP=head.soft_cap is not None and not is_capped,
        **constants,
    )


def trace_groups_(
    logits: torch.Tensor,
    rows: Rows,
    candidates: torch.Tensor,
    mixture: Mixture | None,
    scored: GroupScores,
    y: torch.Tensor | None,
    trace: Trace,
) -> None:
    """:func:`trace_tokens_`, by what :func:`.fused_groups.score_groups` returned."""
    args, constants = trace_args(logits, rows, candidates, mixture, trace)
    trace_groups_kernel[(len(candidates),)](
        *(*args, y, scored.row_groups, scored.scores, scored.scores.shape[0]),
        NUM_OTHERS=NUM_OTHERS,
        HAS_CONTROLS=y is not None,
        **constants,
    )
