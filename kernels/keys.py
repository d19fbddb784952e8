"""Candidates as int64 keys: a logit's float32 bits, made to order as integers do, above its inverted token id. So the
largest keys are the largest logits, and of equal ones those with the lower ids."""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY = tl.constexpr(-(2**63))
"""Less than the key of any finite logit."""


@triton.jit
def to_key(values, ids):
    """int64 keys of float32 values and their token ids. A zero's sign is dropped: -0.0 and 0.0 are a tie."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))


@triton.jit
def from_key(keys):
    """The inverse: (float32 values, int64 token ids)."""
    ordered = (keys >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), 0xFFFFFFFF - (keys & 0xFFFFFFFF)
