"""The end of a row's program: z' from the scores of its candidates, and into the row."""

from __future__ import annotations

import triton
import triton.language as tl

from .divergence import NUM_HALVINGS
from .keys import LOWEST_KEY, from_key

HALVINGS = tl.constexpr(NUM_HALVINGS)


@triton.jit
def write_guided(row_ptr, candidates, y, scores, no_opinion_ptr, beta, reference, max_divergence, end_id, scale):
    """Normalize over the candidates of one row that the reward model has an opinion of, and write z'.

    Args:
        candidates: [K] int64, keys.
        y: [K] float32, their logits without controls, or nothing: as they are.
        no_opinion_ptr: [vocab_size] bool, or nothing.
    """
    is_candidate = candidates > LOWEST_KEY
    z, ids = from_key(candidates)
    has_opinion = is_candidate
    if no_opinion_ptr is not None:
        has_opinion = is_candidate & (tl.load(no_opinion_ptr + ids, mask=is_candidate, other=1) == 0)
    if y is None:
        y = z
    r = tl.where(has_opinion, scores * scale, float("-inf"))
    y = tl.where(has_opinion, y, float("-inf"))
    r_max, y_max = tl.max(r, 0), tl.max(y, 0)
    log_r = r - r_max - tl.log(tl.sum(tl.exp(r - r_max), 0))
    log_y = y - y_max - tl.log(tl.sum(tl.exp(y - y_max), 0))
    reward = log_r - reference * log_y
    any_silent: tl.constexpr = no_opinion_ptr is not None
    write_rewarded(row_ptr, ids, z, reward, is_candidate, has_opinion, any_silent, beta, max_divergence, end_id)


@triton.jit
def write_rewarded(
    row_ptr, ids, z, reward, is_candidate, has_opinion, ANY_SILENT: tl.constexpr, beta, max_divergence, end_id
):  # fmt: skip
    """Write z' of one row's candidates; of those without an opinion the reward is anything."""
    if max_divergence < float("inf"):
        beta = bound_beta(z, reward, is_candidate, has_opinion, beta, max_divergence)
    guided = z + beta * reward
    if ANY_SILENT:
        guided = keep_shares(guided, z, has_opinion)
    store_guided(row_ptr, ids, guided, is_candidate, end_id)


@triton.jit
def bound_beta(z, reward, is_candidate, has_opinion, beta, max_divergence):
    """:func:`.divergence.bound_beta` of one row: beta is tried first, and then half of what is left, again and again.
    A comparison with NaN is false."""
    log_sum = log_sum_exp(tl.where(has_opinion, z, float("-inf")))
    log_p = z - log_sum
    most = max_divergence / tl.exp(log_sum - log_sum_exp(tl.where(is_candidate, z, float("-inf"))))
    bounded, step, tries = beta * 0.0, beta, HALVINGS + 1
    while tries > 0:
        larger = bounded + step
        guided = tl.where(has_opinion, z + larger * reward, float("-inf"))
        log_q = guided - log_sum_exp(guided)
        divergence = tl.sum(tl.where(log_q == float("-inf"), 0.0, tl.exp(log_q) * (log_q - log_p)), 0)
        bounded = tl.where((divergence < most) & (max_divergence > 0), larger, bounded)
        step = step * 0.5
        tries = tl.where(bounded == beta, 0, tries - 1)
    return bounded


@triton.jit
def keep_shares(guided, z, has_opinion):
    """z' of one row, with that of the candidates without an opinion, which keep their share of the base's
    probability."""
    shift = log_sum_exp(tl.where(has_opinion, guided, float("-inf"))) - log_sum_exp(
        tl.where(has_opinion, z, float("-inf"))
    )
    shift = tl.where(tl.max(has_opinion.to(tl.int32), 0) > 0, shift, 0.0)
    return tl.where(has_opinion, guided, z + shift)


@triton.jit
def log_sum_exp(values):
    largest = tl.max(values, 0)
    return largest + tl.log(tl.sum(tl.exp(values - largest), 0))


@triton.jit
def store_guided(row_ptr, ids, guided, is_candidate, end_id):
    """Write z' of one row's candidates; the end token alone where that is no finite number."""
    num_nan = tl.sum((is_candidate & (guided != guided)).to(tl.int32), 0)
    largest = tl.max(tl.where(is_candidate & (guided == guided), guided, float("-inf")), 0)
    if (num_nan == 0) & (tl.abs(largest) < float("inf")):
        tl.store(row_ptr + ids, guided.to(row_ptr.dtype.element_ty), mask=is_candidate)
    else:
        tl.store(row_ptr + end_id, 0.0)
