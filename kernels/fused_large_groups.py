"""Groups of hundreds and thousands of members, for :mod:`.fused_groups`: a lone space, the first byte of a script.

A row of lm_head is read once for sixteen contexts, and not for each that has the group among its candidates, by
programs that have a block of members each. Which groups a step has, only the device knows: there are programs for all
of them, and those whose group no row has end at once. Groups share no members but themselves, so a step reads at most
as many rows of lm_head as it has, and as many again for each further sixteen contexts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .fused_scoring import capped
from .launching import COUNTS, ROW_POINTERS

BLOCK_C, BLOCK_D = 16, 32
"""Contexts of a program, and elements of their hidden states and its members' rows that it multiplies at a time."""
WARPS = 8


def precision(hidden_states: torch.Tensor, lm_head: torch.Tensor) -> str:
    """The ``input_precision`` with which products of the two are exact, and summed in float32."""
    return "tf32" if hidden_states.itemsize == lm_head.itemsize == 2 else "ieee"


@triton.jit
def add_products(
    r,  # [BLOCK_C, BLOCK_M] float32
    hidden_ptrs,  # [BLOCK_C], each of [size]
    has,  # [BLOCK_C]
    rows_ptr,
    rows_stride,
    local,  # [BLOCK_M]
    is_mine,  # [BLOCK_M]
    size,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,  # tf32 holds numbers of half precision as they are
):
    """r, and the products of hidden states with the rows ``local``; of contexts that do not have the group any."""
    for start in range(0, size, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        there = d < size
        h = tl.load(hidden_ptrs[:, None] + d[None, :], mask=has[:, None] & there[None, :], other=0.0)
        w = tl.load(
            rows_ptr + local[None, :] * rows_stride + d[:, None], mask=is_mine[None, :] & there[:, None], other=0.0
        )
        r = tl.dot(h.to(tl.float32), w.to(tl.float32), r, input_precision=PRECISION)
    return r


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def score_large_kernel(
    top_k_ptr,  # [R] int64
    top_k_stride,
    groups_ptr,  # [R, K] int32
    wanted_ptr,  # [large] int32: whether a row has the group
    blocks_ptr,  # [B, 4] int32
    members_ptr,  # [M] int32
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
    num_all,  # R * J
    soft_cap,
    scale,
    vocab_start,
    shard_size,
    hidden_size,
    scores_ptr,  # [B, R * J] float32, out: of contexts that have the group, and a weight
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """The logsumexp of a block of a group's members, in the contexts that have it."""
    block = tl.program_id(0).to(tl.int64)
    if tl.load(wanted_ptr + tl.load(blocks_ptr + 4 * block + 1)) != 0:
        group = tl.load(blocks_ptr + 4 * block)
        c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        row = c // num_contexts
        has = (c < num_all) & (tl.load(top_k_ptr + row * top_k_stride, mask=c < num_all, other=0) > 0)
        theirs = tl.load(groups_ptr + row[:, None] * K + tl.arange(0, K)[None, :], mask=has[:, None], other=-1)
        has = has & (tl.max((theirs == group).to(tl.int32), 1) > 0)
        context = c
        if HAS_MIXTURE:
            has = has & (tl.load(weights_ptr + c, mask=has, other=0.0) != 0.0)
            context = tl.load(contexts_ptr + c, mask=has, other=0)
        if tl.max(has.to(tl.int32), 0) > 0:
            m = tl.load(blocks_ptr + 4 * block + 2) + tl.arange(0, BLOCK_M)
            is_member = m < tl.load(blocks_ptr + 4 * block + 3)
            local = tl.load(members_ptr + m, mask=is_member, other=0).to(tl.int64) - vocab_start
            is_mine = is_member & (local >= 0) & (local < shard_size)
            local = tl.where(is_mine, local, 0)
            r = tl.zeros([BLOCK_C, BLOCK_M], tl.float32)
            their_hidden_ptr = hidden_ptr + context * hidden_stride
            r = add_products(
                r, their_hidden_ptr, has, lm_head_ptr, lm_head_stride, local, is_mine, hidden_size, BLOCK_D, PRECISION
            )
            if more_ptr is not None:
                r = add_products(
                    r, their_hidden_ptr + hidden_size, has, more_ptr, more_stride, local, is_mine, num_more, BLOCK_D,
                    PRECISION,
                )  # fmt: skip
            if HAS_BIAS:
                r += tl.load(bias_ptr + local, mask=is_mine, other=0.0).to(tl.float32)[None, :]
            if HAS_SOFT_CAP:
                r = capped(r, soft_cap)
            r = tl.where(is_mine[None, :], r * scale, float("-inf"))
            most = tl.maximum(tl.max(r, 1), -3.4028234663852886e38)
            log_sum = most + tl.log(tl.sum(tl.exp(r - most[:, None]), 1))
            tl.store(scores_ptr + block * num_all + c, log_sum, mask=has)
