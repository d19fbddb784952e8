"""Rewards of groups of tokens on a GPU, for a reward model with another tokenizer: :mod:`.groups`, in four launches.

As :mod:`.fused` by tokens, but :func:`gather_groups_kernel` merges a row's candidates and looks their groups up, and
:func:`score_groups_kernel` has a program for each of a row's distinct groups, and more where a group is large: it
gathers the rows of lm_head of the group's members and keeps the logsumexp of their logits. What the programs, and the
ranks of a tensor-parallel group, have of a group is put together by :func:`reweight_groups_kernel`, which normalizes
over the groups and writes. No member list is ever as long as the vocabulary, and nothing is synchronized.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import fused_large_groups, large_groups
from .fused_large_groups import score_large_kernel
from .fused_scoring import capped, context_args, dot_candidates, head_args, load_bound, row_args, rule_args
from .fused_selection import MERGE_WARPS, merge, select, store_candidates
from .groups import gather_shards
from .keys import LOWEST_KEY, from_key
from .launching import COUNTS, ROW_POINTERS
from .types import Controls, Groups, Mixture, OutputHead, Rows
from .writing import write_rewarded

BLOCK_M, BLOCK_D = 4, 512
"""Members, and elements of their rows, that a program scores at a time: most groups have one or two."""
MAX_PARTS = 16
PART = 256
"""Programs of a group, at most, and so many members of the largest for each."""
BLOCK_K = 16
"""Candidates with which all are compared at a time."""
SCORE_WARPS, REWEIGHT_WARPS = 4, 4
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def gather_groups_kernel(
    top_k_ptr,  # [R] int64
    top_k_stride,
    keys_ptr,  # [R, num_keys] int64
    num_keys,
    kept_ptr,  # [R, CAPACITY] int64, the programs' own room
    candidates_ptr,  # [R, K] int64, out
    key_ptr,  # [V] int32, or several tables
    key_offsets_ptr,  # [R] int64, or nothing
    groups_ptr,  # [R, K] int32, out; -1 where there is no candidate, -2 where the reward model has no opinion of it
    large_ptr,  # [groups] int32, or nothing
    wanted_ptr,  # [large] int32, zeros, or nothing; out: 1 for those that the row has
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Merge a row's candidates, and find their groups."""
    row_idx = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, K)
    top_k = tl.load(top_k_ptr + row_idx * top_k_stride).to(tl.int32)
    if top_k > 0:
        kept, rank = merge(
            keys_ptr + row_idx * num_keys, num_keys, kept_ptr + row_idx * CAPACITY, top_k, CAPACITY, NUM_KEYS, WIDTH
        )  # fmt: skip
        store_candidates(candidates_ptr + row_idx * K, kept, rank, top_k, K)
        tl.debug_barrier()  # what other threads wrote is read
        candidates = tl.load(candidates_ptr + row_idx * K + place)
        _, ids = from_key(candidates)
        if key_offsets_ptr is not None:
            ids += tl.load(key_offsets_ptr + row_idx)
        group = tl.load(key_ptr + ids, mask=candidates > LOWEST_KEY, other=-1)
        tl.store(groups_ptr + row_idx * K + place, group)
        if large_ptr is not None:
            large = tl.load(large_ptr + group, mask=group >= 0, other=-1)
            tl.store(wanted_ptr + large, tl.full([K], 1, tl.int32), mask=large >= 0)


@triton.jit
def add_exponentials(most, total, values):
    """A running logsumexp, as (most, total): the values' own is most + log(total)."""
    larger = tl.maximum(most, values)
    return larger, total * tl.exp(most - larger) + tl.exp(values - larger)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def score_groups_kernel(
    top_k_ptr,  # [R] int64
    top_k_stride,
    groups_ptr,  # [R, K] int32
    members_ptr,  # [M] int32
    starts_ptr,  # [groups + 1] int32
    large_ptr,  # [groups] int32, or nothing
    large_starts_ptr,  # [large + 1] int32, or nothing
    large_scores_ptr,  # [B, R * J] float32, of score_large_kernel, or nothing
    hidden_ptr,  # [C, hidden_size + num_more]
    hidden_stride,
    lm_head_ptr,  # [shard_size, hidden_size]
    lm_head_stride,
    bias_ptr,  # [shard_size], or nothing
    more_ptr,  # [shard_size, num_more], or nothing: the adapters' columns of lm_head
    more_stride,
    num_more,
    contexts_ptr,  # [R, J] int64, or nothing
    weights_ptr,  # [R, J] float32, or nothing
    num_contexts,  # J
    soft_cap,
    scale,
    vocab_start,
    shard_size,
    hidden_size,
    scores_ptr,  # [PARTS, R * J, K] float32, out: only of a group's first candidate, and of contexts with a weight
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """The logsumexp of a part of a group's members, in one context."""
    context, place, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row_idx = context // num_contexts
    is_wanted = place < tl.load(top_k_ptr + row_idx * top_k_stride)
    if HAS_MIXTURE:
        is_wanted = is_wanted & (tl.load(weights_ptr + context) != 0.0)
    if is_wanted:
        group = tl.load(groups_ptr + row_idx * K + place)
        places = tl.arange(0, K)
        groups = tl.load(groups_ptr + row_idx * K + places)
        first = tl.min(tl.where(groups == group, places, K), 0)
        if (group >= 0) & (first == place):
            row_hidden_ptr = hidden_ptr + context * hidden_stride
            if HAS_MIXTURE:
                row_hidden_ptr = hidden_ptr + tl.load(contexts_ptr + context) * hidden_stride
            begin, end = tl.load(starts_ptr + group), tl.load(starts_ptr + group + 1)
            most, total = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
            if large_ptr is not None:
                large = tl.load(large_ptr + group)
                if large >= 0:
                    begin, end = tl.load(large_starts_ptr + large), tl.load(large_starts_ptr + large + 1)
                    for start in range(begin + part * BLOCK_M, end, PARTS * BLOCK_M):
                        b = start + tl.arange(0, BLOCK_M)
                        at = b.to(tl.int64) * tl.num_programs(0) + context
                        r = tl.load(large_scores_ptr + at, mask=b < end, other=float("-inf"))
                        most, total = add_exponentials(most, total, r)
                    end = begin
            for start in range(begin + part * BLOCK_M, end, PARTS * BLOCK_M):
                m = start + tl.arange(0, BLOCK_M)
                local = tl.load(members_ptr + m, mask=m < end, other=0).to(tl.int64) - vocab_start
                is_mine = (m < end) & (local >= 0) & (local < shard_size)
                local = tl.where(is_mine, local, 0)
                r = dot_candidates(
                    row_hidden_ptr, lm_head_ptr, lm_head_stride, bias_ptr, more_ptr, more_stride, num_more, 1.0, local,
                    is_mine, hidden_size, BLOCK_M, BLOCK_D, HAS_BIAS,
                )  # fmt: skip
                if HAS_SOFT_CAP:
                    r = capped(r, soft_cap)
                most, total = add_exponentials(most, total, tl.where(is_mine, r * scale, float("-inf")))
            largest = tl.max(most, 0)
            log_sum = largest + tl.log(tl.sum(total * tl.exp(most - largest), 0))
            at = (part * tl.num_programs(0) + context) * K + place
            tl.store(scores_ptr + at, log_sum)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def reweight_groups_kernel(
    logits_ptr,  # [N, num_cols]
    logits_stride,
    rows_ptr,  # [R] int64
    top_k_ptr,  # [R] int64
    top_k_stride,
    candidates_ptr,  # [R, K] int64
    groups_ptr,  # [R, K] int32
    y_ptr,  # [R, K] float32, or nothing
    scores_ptr,  # [num_parts, R * J, K] float32
    num_parts,
    weights_ptr,  # [R, J] float32, or nothing
    num_contexts,  # J
    beta_ptr,  # [R] float32
    beta_stride,
    reference_ptr,  # [R] float32
    reference_stride,
    has_bound,
    max_divergence_ptr,  # [R] float32; anything unless has_bound
    max_divergence_stride,
    end_ids_ptr,  # [R] int64
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ANY_SILENT: tl.constexpr,
    HAS_CONTROLS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
):
    """Normalize over the groups of one row, and write it."""
    row_idx = tl.program_id(0).to(tl.int64)
    if tl.load(top_k_ptr + row_idx * top_k_stride) > 0:
        place = tl.arange(0, K)
        candidates = tl.load(candidates_ptr + row_idx * K + place)
        group = tl.load(groups_ptr + row_idx * K + place)
        is_candidate, has_opinion = group != -1, group >= 0
        z, ids = from_key(candidates)
        y = z
        if HAS_CONTROLS:
            y = tl.load(y_ptr + row_idx * K + place)
        first = tl.full([K], K, tl.int32)  # of each candidate's group
        most, total = tl.full([K], LOWEST, tl.float32), tl.zeros([K], tl.float32)
        for start in range(0, K, BLOCK_K):
            others = start + tl.arange(0, BLOCK_K)
            same = group[:, None] == tl.load(groups_ptr + row_idx * K + others)[None, :]
            if HAS_CONTROLS:
                their_y = tl.load(y_ptr + row_idx * K + others)
            else:
                their_y, _ = from_key(tl.load(candidates_ptr + row_idx * K + others))
            first = tl.minimum(first, tl.min(tl.where(same, others[None, :], K), 1))
            theirs = tl.where(same, their_y[None, :], float("-inf"))
            larger = tl.maximum(most, tl.max(theirs, 1))
            total = total * tl.exp(most - larger) + tl.sum(tl.exp(theirs - larger[:, None]), 1)
            most = larger
        y_group = most + tl.log(total)
        scores = tl.zeros([K], tl.float32)
        num_all = tl.num_programs(0) * num_contexts
        for context in range(row_idx * num_contexts, (row_idx + 1) * num_contexts):
            weight = 1.0
            if HAS_MIXTURE:
                weight = tl.load(weights_ptr + context)
            if weight != 0.0:
                most, total = tl.full([K], LOWEST, tl.float32), tl.zeros([K], tl.float32)
                for part in range(num_parts):
                    at = (part * num_all + context) * K + first
                    values = tl.load(scores_ptr + at, mask=has_opinion, other=float("-inf"))
                    most, total = add_exponentials(most, total, values)
                scores += weight * (most + tl.log(total))
        r = tl.where(has_opinion, scores, float("-inf"))
        r_first = tl.where(has_opinion & (first == place), scores, float("-inf"))
        y_all = tl.where(has_opinion, y, float("-inf"))
        r_max, y_max = tl.max(r_first, 0), tl.max(y_all, 0)
        log_r = r - r_max - tl.log(tl.sum(tl.exp(r_first - r_max), 0))
        log_y = y_group - y_max - tl.log(tl.sum(tl.exp(y_all - y_max), 0))
        beta = tl.load(beta_ptr + row_idx * beta_stride)
        reference = tl.load(reference_ptr + row_idx * reference_stride)
        bound = load_bound(has_bound, max_divergence_ptr, max_divergence_stride, row_idx)
        row_ptr = logits_ptr + tl.load(rows_ptr + row_idx) * logits_stride
        reward = log_r - reference * log_y
        end_id = tl.load(end_ids_ptr + row_idx)
        write_rewarded(row_ptr, ids, z, reward, is_candidate, has_opinion, ANY_SILENT, beta, bound, end_id)


class GroupScores(NamedTuple):
    """The candidates' groups, and what the reward model says of these."""

    row_groups: torch.Tensor
    """[R, K] int32: each candidate's group; -1 where there is no candidate, -2 where the reward model has no opinion of
    it"""
    scores: torch.Tensor
    """[parts, R * J, K] float32, logsumexps of parts of a group's members, of all ranks: of a group's first candidate,
    and of contexts with a weight"""


def score_groups(
    logits: torch.Tensor,
    hidden_states: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    groups: Groups,
    candidates: torch.Tensor,
    controls: Controls | None,
    mixture: Mixture | None,
) -> GroupScores:
    """Select the candidates, find their groups, and score each of these by its members' rows of the output head.

    Arguments are those of :func:`.fused.score_tokens`; ``controls`` changes nothing here.
    """
    (num_rows, K), device = candidates.shape, logits.device
    keys, sizes = select(logits, rows, K, groups.vocab_size)
    kept = torch.empty(num_rows, sizes["CAPACITY"], dtype=torch.int64, device=device)
    row_groups = torch.empty(num_rows, K, dtype=torch.int32, device=device)
    large, wanted = groups.large, None
    if large is not None:
        wanted = torch.zeros(len(large.starts) - 1, dtype=torch.int32, device=device)
    gather_groups_kernel[(num_rows,)](
        *(rows.top_k, rows.top_k.stride(0), keys, keys.shape[1], kept, candidates),
        *(groups.key, rows.key_offsets, row_groups, large and large.index, wanted),
        K=K,
        **sizes,
        num_warps=MERGE_WARPS,
    )
    scores = score_members(hidden_states, head, rows, groups, mixture, row_groups, wanted)
    if head.all_reduce is not None:
        scores = gather_shards(scores, head).flatten(0, 1)
    return GroupScores(row_groups, scores)


def score_members(
    hidden_states: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    groups: Groups,
    mixture: Mixture | None,
    row_groups: torch.Tensor,
    wanted: torch.Tensor | None,
) -> torch.Tensor:
    """The logsumexp of the reward model's logits over the members of each row's groups, of this rank.

    Args:
        row_groups: [R, K] int32.
        wanted: [large] int32, of :func:`gather_groups_kernel`.

    Returns:
        [parts, R * J, K] float32, to be put together; of a group's first candidate, and of contexts with a weight.
    """
    (num_rows, K), device = row_groups.shape, row_groups.device
    contexts, weights, num_contexts = context_args(mixture)
    num_all, large, of_large = num_rows * num_contexts, groups.large, None
    top_k_args = (rows.top_k, rows.top_k.stride(0))
    of_head, context = head_args(hidden_states, head), (contexts, weights, num_contexts)
    sizes = (head.soft_cap or 1.0, head.scale, head.vocab_start, *head.weight.shape)
    variant = {
        "HAS_BIAS": head.bias is not None,
        "HAS_MIXTURE": mixture is not None,
        "HAS_SOFT_CAP": head.soft_cap is not None,
    }
    if large is not None:
        of_large = torch.empty(len(large.blocks), num_all, device=device)
        score_large_kernel[(len(large.blocks), triton.cdiv(num_all, fused_large_groups.BLOCK_C))](
            *(*top_k_args, row_groups, wanted, large.blocks, groups.members),
            *(*of_head, *context, num_all, *sizes, of_large),
            K=K,
            BLOCK_M=large_groups.BLOCK_M,
            BLOCK_C=fused_large_groups.BLOCK_C,
            BLOCK_D=fused_large_groups.BLOCK_D,
            PRECISION=fused_large_groups.precision(hidden_states, head.weight),
            **variant,
            num_warps=fused_large_groups.WARPS,
        )
    most = groups.most if large is None else min(groups.most, large_groups.LARGE_ON_DEVICE)
    parts = min(triton.next_power_of_2(triton.cdiv(most, PART)), MAX_PARTS)
    scores = torch.full((parts, num_all, K), float("-inf"), device=device)
    score_groups_kernel[(num_all, rows.max_top_k, parts)](
        *(*top_k_args, row_groups, groups.members, groups.starts),
        *((large.index, large.starts, of_large) if large is not None else (None, None, None)),
        *(*of_head, *context, *sizes, scores),
        K=K,
        PARTS=parts,
        BLOCK_M=BLOCK_M,
        BLOCK_D=BLOCK_D,
        **variant,
        num_warps=SCORE_WARPS,
    )
    return scores


def reweight_groups_(
    logits: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    groups: Groups,
    candidates: torch.Tensor,
    mixture: Mixture | None,
    scored: GroupScores,
    y: torch.Tensor | None,
) -> None:
    """Write the rows, by what :func:`score_groups` returned; other arguments as of :func:`.fused.reweight_tokens_`."""
    row_groups, scores = scored
    num_rows, K = candidates.shape
    _, weights, num_contexts = context_args(mixture)
    reweight_groups_kernel[(num_rows,)](
        *(*row_args(logits, rows), candidates, row_groups, y),
        *(scores, scores.shape[0], weights, num_contexts, *rule_args(rows)),
        K=K,
        BLOCK_K=BLOCK_K,
        ANY_SILENT=groups.any_silent,
        HAS_CONTROLS=y is not None,
        HAS_MIXTURE=mixture is not None,
        num_warps=REWEIGHT_WARPS,
    )
