"""The guidance step on a GPU: two launches, in place, no host synchronization.

:func:`select_kernel` scans a slice of a guided row, keeps the slice's largest logits and writes -inf over all of it:
one read and one write of the row. :func:`score_kernel`, one program a row, merges the slices' candidates, gathers their
rows of lm_head, takes the dot products with the hidden state in float32, normalizes over the candidates and writes the
k new logits. With tensor parallelism it stops before it normalizes, and the partial scores are summed over the ranks;
where requests have a bias or penalties, it stops too, and :mod:`.controls` takes these out of the candidates' logits;
then :func:`reweight_kernel` goes on. Where rows have several contexts, :mod:`.mixture` mixes them before. The semantics
are :mod:`.reference`'s, to the tie; shapes and names too. A candidate is one int64 key (:mod:`.keys`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .controls import undo_controls
from .keys import NO_KEY, from_key, to_key
from .mixture import mix_contexts
from .reference import Controls, Mixture, map_heads
from .writing import write_guided

BLOCK_V = 1024
"""Logits that a program of the first launch holds at a time."""
MIN_SLICE = 2048
"""Fewer logits than this are not worth a program."""
PROGRAMS = 1024
"""In the first launch, about: enough to keep every multiprocessor of today's GPUs reading."""
MAX_KEYS = 4096
"""Of a row's slices together, which the second launch merges."""
TILE = 4096
"""Elements of lm_head that a program of the second launch holds at a time, [K, TILE / K]."""
SELECT_WARPS, SCORE_WARPS, REWEIGHT_WARPS = 4, 8, 1


@triton.jit
def select_kernel(
    logits_ptr,  # [N, num_cols]
    logits_stride,
    rows_ptr,  # [R] int64
    top_k_ptr,  # [R] int64
    top_k_stride,
    keys_ptr,  # [R, num_slices, K] int64, out
    vocab_size,
    num_cols,
    slice_size,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest keys of each slice of each guided row, in no order; and -inf in their place."""
    row_idx = tl.program_id(0).to(tl.int64)
    slice_idx = tl.program_id(1)
    top_k = tl.load(top_k_ptr + row_idx * top_k_stride)
    place = tl.arange(0, K)
    # Places beyond the row's k are never the smallest, and so never taken.
    best = tl.where(place < top_k, NO_KEY, 2**63 - 1)
    if top_k > 0:
        row_ptr = logits_ptr + tl.load(rows_ptr + row_idx) * logits_stride
        begin = slice_idx * slice_size
        end = tl.minimum(begin + slice_size, num_cols)
        smallest = tl.min(best, 0)
        for start in range(begin, end, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            values = tl.load(row_ptr + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
            finite = (tl.abs(values) < float("inf")) & (ids < vocab_size)  # false for NaN
            keys = tl.where(finite, to_key(values, ids), NO_KEY)
            tl.store(row_ptr + ids, tl.full([BLOCK], float("-inf"), logits_ptr.dtype.element_ty), mask=ids < end)
            keys = tl.where(keys > smallest, keys, NO_KEY)
            largest = tl.max(keys, 0)
            while largest > NO_KEY:
                best = tl.where(place == tl.argmin(best, 0), largest, best)
                smallest = tl.min(best, 0)
                keys = tl.where((keys < largest) & (keys > smallest), keys, NO_KEY)
                largest = tl.max(keys, 0)
    best = tl.where(place < top_k, best, NO_KEY)
    tl.store(keys_ptr + (row_idx * tl.num_programs(1) + slice_idx) * K + place, best)


@triton.jit
def capped(scores, soft_cap):
    """tanh by exp, of a negative number: it cannot overflow."""
    x = scores / soft_cap
    e = tl.exp(-2.0 * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e) * soft_cap


@triton.jit
def merge(keys_ptr, top_k, K: tl.constexpr, NUM_KEYS: tl.constexpr):
    """The largest ``top_k`` of a row's keys, in order; [K] int64."""
    keys = tl.load(keys_ptr + tl.arange(0, NUM_KEYS))
    place = tl.arange(0, K)
    candidates = tl.full([K], NO_KEY, tl.int64)
    for i in range(top_k):
        largest = tl.max(keys, 0)
        candidates = tl.where(place == i, largest, candidates)
        keys = tl.where(keys < largest, keys, NO_KEY)
    return candidates


@triton.jit
def sum_weights(weights_ptr, begin, end):
    total = 0.0
    for i in range(begin, end):
        total += tl.load(weights_ptr + i)
    return total


@triton.jit
def dot_candidates(
    hidden_ptr,  # [hidden_size]
    lm_head_ptr,
    lm_head_stride,
    bias_ptr,  # [shard_size], or nothing
    bias_weight,
    local,
    is_mine,
    hidden_size,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """[K] float32: the rows ``local`` of lm_head times a hidden state, and the bias so many times; 0 where they are not
    this shard's."""
    scores = tl.zeros([K], tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(hidden_ptr + d, mask=d < hidden_size, other=0.0).to(tl.float32)
        weight = tl.load(
            lm_head_ptr + local[:, None] * lm_head_stride + d[None, :],
            mask=is_mine[:, None] & (d < hidden_size)[None, :],
            other=0.0,
        ).to(tl.float32)
        scores += tl.sum(weight * h[None, :], 1)
    if HAS_BIAS:
        scores += bias_weight * tl.load(bias_ptr + local, mask=is_mine, other=0.0).to(tl.float32)
    return scores


@triton.jit
def score_kernel(
    logits_ptr,  # [N, num_cols]
    logits_stride,
    rows_ptr,  # [R] int64
    top_k_ptr,  # [R] int64
    top_k_stride,
    keys_ptr,  # [R, num_slices, K] int64
    hidden_ptr,  # [R, hidden_size]; [C, hidden_size] for a mixture with a soft cap
    hidden_stride,
    lm_head_ptr,  # [shard_size, hidden_size]
    lm_head_stride,
    bias_ptr,  # [shard_size], or nothing
    beta_ptr,  # [R] float32
    beta_stride,
    reference_ptr,  # [R] float32
    reference_stride,
    end_ids_ptr,  # [R] int64
    no_opinion_ptr,  # [vocab_size] bool, or nothing
    scores_ptr,  # [R, K] float32 ([R, J, K] for a mixture with a soft cap), out unless NORMALIZE
    contexts_ptr,  # [R, J] int64, or nothing
    weights_ptr,  # [R, J] float32, or nothing
    num_contexts,  # J
    soft_cap,
    scale,
    vocab_start,
    shard_size,
    hidden_size,
    K: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Merge a row's candidates, score them, and either write the row or leave keys and partial scores."""
    row_idx = tl.program_id(0).to(tl.int64)
    top_k = tl.load(top_k_ptr + row_idx * top_k_stride)
    if top_k > 0:
        place = tl.arange(0, K)
        row_keys = keys_ptr + row_idx * NUM_KEYS
        candidates = merge(row_keys, top_k, K, NUM_KEYS)
        is_candidate = candidates > NO_KEY
        z, ids = from_key(candidates)

        local = ids - vocab_start
        is_mine = is_candidate & (local >= 0) & (local < shard_size)
        local = tl.where(is_mine, local, 0)
        begin, end = row_idx * num_contexts, (row_idx + 1) * num_contexts
        if HAS_MIXTURE and HAS_SOFT_CAP:
            scores = tl.zeros([K], tl.float32)
            for i in range(begin, end):
                row_hidden_ptr = hidden_ptr + tl.load(contexts_ptr + i) * hidden_stride
                partial = dot_candidates(
                    row_hidden_ptr, lm_head_ptr, lm_head_stride, bias_ptr, 1.0, local, is_mine, hidden_size, K, BLOCK_D,
                    HAS_BIAS,
                )  # fmt: skip
                if NORMALIZE:
                    scores += tl.load(weights_ptr + i) * capped(partial, soft_cap)
                else:
                    tl.store(scores_ptr + i * K + place, partial)
        else:
            bias_weight = sum_weights(weights_ptr, begin, end) if HAS_MIXTURE else 1.0
            row_hidden_ptr = hidden_ptr + row_idx * hidden_stride
            scores = dot_candidates(
                row_hidden_ptr, lm_head_ptr, lm_head_stride, bias_ptr, bias_weight, local, is_mine, hidden_size, K,
                BLOCK_D, HAS_BIAS,
            )  # fmt: skip
            if NORMALIZE and HAS_SOFT_CAP:
                scores = capped(scores, soft_cap)
        if NORMALIZE:
            row_ptr = logits_ptr + tl.load(rows_ptr + row_idx) * logits_stride
            beta = tl.load(beta_ptr + row_idx * beta_stride)
            reference = tl.load(reference_ptr + row_idx * reference_stride)
            end_id = tl.load(end_ids_ptr + row_idx)
            write_guided(row_ptr, ids, z, z, scores, is_candidate, no_opinion_ptr, beta, reference, end_id, scale)
        else:
            tl.store(row_keys + place, candidates)
            if not (HAS_MIXTURE and HAS_SOFT_CAP):
                tl.store(scores_ptr + row_idx * K + place, scores)


@triton.jit
def reweight_kernel(
    logits_ptr,  # [N, num_cols]
    logits_stride,
    rows_ptr,  # [R] int64
    top_k_ptr,  # [R] int64
    top_k_stride,
    keys_ptr,  # [R, NUM_KEYS] int64, a row's candidates in its first K
    y_ptr,  # [R, K] float32, or nothing
    scores_ptr,  # [R, K] float32 ([R, J, K] for a mixture with a soft cap)
    beta_ptr,  # [R] float32
    beta_stride,
    reference_ptr,  # [R] float32
    reference_stride,
    end_ids_ptr,  # [R] int64
    no_opinion_ptr,  # [vocab_size] bool, or nothing
    weights_ptr,  # [R, J] float32, or nothing
    num_contexts,  # J
    soft_cap,
    scale,
    K: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    HAS_CONTROLS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """Write a row whose candidates' scores are whole, and free of what requests did to its logits."""
    row_idx = tl.program_id(0).to(tl.int64)
    if tl.load(top_k_ptr + row_idx * top_k_stride) > 0:
        place = tl.arange(0, K)
        candidates = tl.load(keys_ptr + row_idx * NUM_KEYS + place)
        is_candidate = candidates > NO_KEY
        z, ids = from_key(candidates)
        row_ptr = logits_ptr + tl.load(rows_ptr + row_idx) * logits_stride
        if HAS_MIXTURE and HAS_SOFT_CAP:
            scores = tl.zeros([K], tl.float32)
            for i in range(row_idx * num_contexts, (row_idx + 1) * num_contexts):
                scores += tl.load(weights_ptr + i) * capped(tl.load(scores_ptr + i * K + place), soft_cap)
        else:
            scores = tl.load(scores_ptr + row_idx * K + place)
            if HAS_SOFT_CAP:
                scores = capped(scores, soft_cap)
        beta = tl.load(beta_ptr + row_idx * beta_stride)
        reference = tl.load(reference_ptr + row_idx * reference_stride)
        end_id = tl.load(end_ids_ptr + row_idx)
        y = z
        if HAS_CONTROLS:
            y = tl.load(y_ptr + row_idx * K + place)
        write_guided(row_ptr, ids, z, y, scores, is_candidate, no_opinion_ptr, beta, reference, end_id, scale)


def cut(num_rows: int, num_cols: int, K: int) -> tuple[int, int]:
    """Into how many slices the first launch cuts a row, a power of two, so that few variants are compiled; and how
    large each is."""
    most = max(1, min(num_cols // MIN_SLICE, MAX_KEYS // K))
    wanted = max(1, PROGRAMS // num_rows)
    slices = 1 << (min(most, wanted).bit_length() - 1)
    return slices, triton.cdiv(triton.cdiv(num_cols, slices), BLOCK_V) * BLOCK_V


def guide_(
    logits: torch.Tensor,
    hidden_states: torch.Tensor,
    lm_head: torch.Tensor,
    rows: torch.Tensor,
    top_k: torch.Tensor,
    beta: torch.Tensor,
    reference: torch.Tensor,
    end_ids: torch.Tensor,
    *,
    max_top_k: int,
    vocab_size: int,
    controls: Controls | None = None,
    mixture: Mixture | None = None,
    bias: torch.Tensor | None = None,
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    soft_cap: float | None = None,
    scale: float = 1.0,
    vocab_start: int = 0,
    all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
    no_opinion: torch.Tensor | None = None,
) -> None:
    """:func:`.reference.guide_`, by Triton kernels. The last dimensions of ``logits``, ``hidden_states`` and
    ``lm_head`` must be contiguous; their rows may lie any stride apart."""
    if (num_rows := len(rows)) == 0:
        return
    if heads is not None:
        hidden_states = map_heads(hidden_states, *heads)  # a [d, d] product for each is what the library does best
    assert logits.stride(1) == hidden_states.stride(1) == lm_head.stride(1) == 1
    assert mixture is None or all(tensor.is_contiguous() for tensor in mixture)
    K = max(16, triton.next_power_of_2(max_top_k))
    slices, slice_size = cut(num_rows, logits.shape[1], K)
    keys = torch.empty(num_rows, slices, K, dtype=torch.int64, device=logits.device)
    row_args = (logits, logits.stride(0), rows, top_k, top_k.stride(0), keys)
    rule_args = (beta, beta.stride(0), reference, reference.stride(0), end_ids, no_opinion)
    contexts, weights = mixture or (None, None)
    num_contexts = 1 if mixture is None else contexts.shape[1]
    if mixture is not None and soft_cap is None:  # an output head is linear: it is enough to score the mixture
        hidden_states = mix_contexts(hidden_states, contexts, weights)
    tile = TILE // (1 if mixture is None or soft_cap is None else 2)  # or registers would spill
    cap_args = (num_contexts, soft_cap or 1.0, scale)
    variant = {"HAS_MIXTURE": mixture is not None, "HAS_SOFT_CAP": soft_cap is not None}
    select_kernel[(num_rows, slices)](
        *row_args, vocab_size, logits.shape[1], slice_size, K=K, BLOCK=BLOCK_V, num_warps=SELECT_WARPS
    )
    is_whole = all_reduce is None and controls is None
    scores = None if is_whole else torch.zeros(num_rows * (num_contexts if soft_cap else 1), K, device=logits.device)
    score_kernel[(num_rows,)](
        *row_args,
        *(hidden_states, hidden_states.stride(0), lm_head, lm_head.stride(0), bias),
        *rule_args,
        *(scores, contexts, weights),
        *cap_args,
        *(vocab_start, lm_head.shape[0], hidden_states.shape[1]),
        K=K,
        NUM_KEYS=slices * K,
        BLOCK_D=max(tile // K, 16),
        HAS_BIAS=bias is not None,
        **variant,
        NORMALIZE=is_whole,
        num_warps=SCORE_WARPS,
    )
    if is_whole:
        return
    y = None if controls is None else undo_controls(keys, top_k, controls)
    reweight_kernel[(num_rows,)](
        *row_args,
        y,
        scores if all_reduce is None else all_reduce(scores),
        *rule_args,
        weights,
        *cap_args,
        K=K,
        NUM_KEYS=slices * K,
        HAS_CONTROLS=controls is not None,
        **variant,
        num_warps=REWEIGHT_WARPS,
    )
