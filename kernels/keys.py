"""Candidates as int64 keys: a logit's float32 bits, made to order as integers do, above its inverted token id. So the
largest keys are the largest logits, and of equal ones those with the lower ids."""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST_KEY = tl.constexpr(-(2**63))
"""Less than the key of any finite logit."""


NOTHING = tl.constexpr(-(2**31))
"""The integer of what is no candidate: less than any finite logit's."""


@triton.jit
def order(values):
    """int32 that order as logits do; NOTHING for what is no candidate. A zero's sign is dropped: -0.0 and 0.0 are a
    tie."""
    bits = (values.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)
    return tl.where(tl.abs(values) < float("inf"), bits ^ ((bits >> 31) & 0x7FFFFFFF), NOTHING)  # false for NaN


@triton.jit
def to_key(ordered, ids):
    """int64 keys of logits, as :func:`order` has them, and their token ids."""
    return (ordered.to(tl.int64) << 32) | (-1 - ids).to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def from_key(keys):
    """(float32 logits, int64 token ids) of keys."""
    ordered = (keys >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
