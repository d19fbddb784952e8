"""What the kernels that score have in common: rows of the output head times hidden states, and the arguments of their
launches."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .types import Mixture, OutputHead, Rows


def row_args(logits: torch.Tensor, rows: Rows) -> tuple[Any, ...]:
    """A launch's, from ``logits_ptr`` to ``top_k_stride``."""
    return logits, logits.stride(0), rows.index, rows.top_k, rows.top_k.stride(0)


def rule_args(rows: Rows) -> tuple[Any, ...]:
    """A launch's, from ``beta_ptr`` to ``end_ids_ptr``. Whether there is a bound is no pointer's to say, or None: the
    first request with one would compile the kernel anew."""
    bound = rows.beta if rows.max_divergence is None else rows.max_divergence
    return (
        *(rows.beta, rows.beta.stride(0), rows.reference, rows.reference.stride(0)),
        *(int(rows.max_divergence is not None), bound, bound.stride(0), rows.end_ids),
    )


def head_args(hidden_states: torch.Tensor, head: OutputHead) -> tuple[Any, ...]:
    """A launch's, from ``hidden_ptr`` to ``num_more``."""
    weight, b = head.weight, None if head.adapters is None else head.adapters.b
    more = (None, 0, 0) if b is None else (b, b.stride(0), b.shape[1])
    return hidden_states, hidden_states.stride(0), weight, weight.stride(0), head.bias, *more


def context_args(mixture: Mixture | None) -> tuple[Any, ...]:
    """A launch's, from ``contexts_ptr`` to ``num_contexts``."""
    return (None, None, 1) if mixture is None else (*mixture, mixture.contexts.shape[1])


BLOCK_MORE = tl.constexpr(32)
"""Of an output head's further columns, the adapters', what a program multiplies at a time."""


@triton.jit
def load_bound(has_bound, max_divergence_ptr, max_divergence_stride, row_idx):
    """A row's ``max_divergence``; inf where no row has one."""
    return tl.load(
        max_divergence_ptr + row_idx * max_divergence_stride, mask=has_bound != 0, other=float("inf")
    )  # fmt: skip


@triton.jit
def capped(scores, soft_cap):
    """tanh by exp, of a negative number: it cannot overflow."""
    x = scores / soft_cap
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e) * soft_cap


@triton.jit
def sum_weights(weights_ptr, begin, end):
    total = 0.0
    for i in range(begin, end):
        total += tl.load(weights_ptr + i)
    return total


@triton.jit
def dot_candidates(
    hidden_ptr,  # [hidden_size + num_more]
    lm_head_ptr,
    lm_head_stride,
    bias_ptr,  # [shard_size], or nothing
    more_ptr,  # [shard_size, num_more], or nothing
    more_stride,
    num_more,
    bias_weight,
    local,
    is_mine,
    hidden_size,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """[K] float32: the rows ``local`` of lm_head, and of its adapters' further columns, times a hidden state, and the
    bias so many times; 0 where they are not this shard's."""
    products = tl.zeros([K, BLOCK_D], tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden_ptr + d, mask=d < hidden_size, other=0.0).to(tl.float32)
        weight = tl.load(
            lm_head_ptr + local[:, None] * lm_head_stride + d[None, :],
            mask=is_mine[:, None] & (d < hidden_size)[None, :],
            other=0.0,
        ).to(tl.float32)
        products += weight * h[None, :]
    scores = tl.sum(products, 1)
    if more_ptr is not None:
        for start in range(0, num_more, BLOCK_MORE):
            q = start + tl.arange(0, BLOCK_MORE)
            h = tl.load(hidden_ptr + hidden_size + q, mask=q < num_more, other=0.0).to(tl.float32)
            weight = tl.load(
                more_ptr + local[:, None] * more_stride + q[None, :],
                mask=is_mine[:, None] & (q < num_more)[None, :],
                other=0.0,
            ).to(tl.float32)
            scores += tl.sum(weight * h[None, :], 1)
    if HAS_BIAS:
        scores += bias_weight * tl.load(bias_ptr + local, mask=is_mine, other=0.0).to(tl.float32)
    return scores
