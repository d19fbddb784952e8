"""The end of a row's program: z' from the scores of its candidates, and into the row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_guided(row_ptr, ids, z, y, scores, is_candidate, no_opinion_ptr, beta, reference, end_id, scale):
    """Normalize over the candidates of one row that the reward model has an opinion of, and write z'.

    ``no_opinion_ptr``: [vocab_size] bool, or nothing.
    """
    has_opinion = is_candidate
    if no_opinion_ptr is not None:
        has_opinion = is_candidate & (tl.load(no_opinion_ptr + ids, mask=is_candidate, other=1) == 0)
    r = tl.where(has_opinion, scores * scale, float("-inf"))
    y = tl.where(has_opinion, y, float("-inf"))
    r_max, y_max = tl.max(r, 0), tl.max(y, 0)
    log_r = r - r_max - tl.log(tl.sum(tl.exp(r - r_max), 0))
    log_y = y - y_max - tl.log(tl.sum(tl.exp(y - y_max), 0))
    guided = z + beta * (log_r - reference * log_y)
    if no_opinion_ptr is not None:
        guided = keep_shares(guided, z, has_opinion)
    store_guided(row_ptr, ids, guided, is_candidate, end_id)


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
