"""What a request's bias and penalties did to its candidates' logits, undone: a launch only where requests have them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .keys import LOWEST_KEY, from_key
from .launching import COUNTS, ROW_POINTERS
from .selection import MAX_LOGIT
from .types import Controls

TILE = 4096
"""Elements of [K, tokens] that a program compares at a time."""
WARPS = 4
LARGEST_LOGIT = tl.constexpr(MAX_LOGIT)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def undo_controls_kernel(
    top_k_ptr,  # [R] int64
    top_k_stride,
    keys_ptr,  # [R, NUM_KEYS] int64, a row's candidates in its first K
    slots_ptr,  # [R] int64
    num_bias_ptr,  # [S] int32
    bias_ids_ptr,  # [S, max_bias] int32
    logit_bias_ptr,  # [S, max_bias] float32
    max_bias,
    penalties_ptr,  # [S, 3] float32
    prompt_mask_ptr,  # [S, ceil(V / 32)] int32
    prompt_mask_stride,
    output_ptr,  # [H, L], or nothing
    output_stride,
    output_rows_ptr,  # [R] int64, or nothing
    output_begin_ptr,  # [R] int64, or nothing
    output_end_ptr,  # [R] int64, or nothing
    draft_ids_ptr,  # [R, num_drafts] int32, or nothing
    num_drafts,
    y_ptr,  # [R, K] float32, out
    K: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PENALTIES: tl.constexpr,
):
    """The candidates' logits before penalties, then before the bias."""
    row_idx = tl.program_id(0).to(tl.int64)
    if tl.load(top_k_ptr + row_idx * top_k_stride) > 0:
        place, block = tl.arange(0, K), tl.arange(0, BLOCK)
        candidates = tl.load(keys_ptr + row_idx * NUM_KEYS + place)
        y, ids = from_key(candidates)
        ids = tl.where(candidates > LOWEST_KEY, ids, 0).to(tl.int32)
        slot = tl.load(slots_ptr + row_idx)
        if HAS_PENALTIES:
            presence = tl.load(penalties_ptr + slot * 3)
            frequency = tl.load(penalties_ptr + slot * 3 + 1)
            repetition = tl.load(penalties_ptr + slot * 3 + 2)
            if (presence != 0.0) | (frequency != 0.0) | (repetition != 1.0):
                counts = tl.zeros([K], tl.int32)
                tokens_ptr = output_ptr + tl.load(output_rows_ptr + row_idx) * output_stride
                end = tl.load(output_end_ptr + row_idx)
                for start in range(tl.load(output_begin_ptr + row_idx), end, BLOCK):
                    tokens = tl.load(tokens_ptr + start + block, mask=start + block < end, other=-1)
                    counts += tl.sum((tokens[None, :] == ids[:, None]).to(tl.int32), 1)
                for i in range(num_drafts):
                    counts += (tl.load(draft_ids_ptr + row_idx * num_drafts + i) == ids).to(tl.int32)
                prompted = (tl.load(prompt_mask_ptr + slot * prompt_mask_stride + ids // 32) >> (ids % 32)) & 1
                y += frequency * counts + tl.where(counts > 0, presence, 0.0)
                unrepeated = tl.where(y > 0, y * repetition, y / repetition)
                y = tl.where(prompted + counts > 0, unrepeated, y)
        num_bias = tl.load(num_bias_ptr + slot)
        for start in range(0, num_bias, BLOCK):
            at = slot * max_bias + start + block
            tokens = tl.load(bias_ids_ptr + at, mask=start + block < num_bias, other=-1)
            bias = tl.load(logit_bias_ptr + at, mask=start + block < num_bias, other=0.0)
            y -= tl.sum(tl.where(tokens[None, :] == ids[:, None], bias[None, :], 0.0), 1)
        tl.store(y_ptr + row_idx * K + place, tl.minimum(tl.maximum(y, -LARGEST_LOGIT), LARGEST_LOGIT))


def undo_controls(keys: torch.Tensor, top_k: torch.Tensor, controls: Controls) -> torch.Tensor:
    """What :func:`.reference.undo_controls` does.

    Args:
        keys: [R, K] int64, each row's candidates in order, LOWEST_KEY behind them.
        top_k: [R] int64; in rows of 0 the keys may be anything.

    Returns:
        [R, K] float32; behind a row's candidates it may be anything.
    """
    num_rows, K = keys.shape
    y = torch.empty(num_rows, K, device=keys.device)
    output = controls.output
    undo_controls_kernel[(num_rows,)](
        top_k,
        top_k.stride(0),
        keys,
        controls.slots,
        controls.num_bias,
        controls.bias_ids,
        controls.bias,
        controls.bias.shape[1],
        controls.penalties,
        controls.prompt_mask,
        controls.prompt_mask.stride(0),
        *((output.token_ids, output.token_ids.stride(0)) if output else (None, 0)),
        *((output.rows, output.begin, output.end, output.draft_ids) if output else [None] * 4),
        output.draft_ids.shape[1] if output else 0,
        y,
        K=K,
        NUM_KEYS=K,
        BLOCK=max(TILE // K, 16),
        HAS_PENALTIES=output is not None,
        num_warps=WARPS,
    )
    return y
