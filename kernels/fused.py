"""The guidance step on a GPU: two launches, in place, no host synchronization.

:mod:`.fused_selection`'s launch writes -inf over the guided rows and leaves, of each slice of a row, the few logits
that may be candidates. :func:`score_kernel` has a program for each few candidates of a row: it merges the slices'
candidates, gathers its own ones' rows of lm_head and takes the dot products with the hidden state in float32; the last
of a row's programs normalizes over the candidates and writes the k new logits. With tensor parallelism they stop
before, and the partial scores are summed over the ranks; where requests have a bias or penalties, they stop too, and
:mod:`.controls` takes these out of the candidates' logits; then :func:`reweight_kernel` goes on. Where rows have
several contexts, :mod:`.mixture` mixes them before. The semantics are :mod:`.reference`'s, to the tie; shapes and names
too. What is compiled depends on the number of rows in one thing: up to FEW_ROWS, :func:`score_kernel` has another
size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .controls import undo_controls
from .fused_groups import reweight_groups_, score_groups
from .fused_scoring import capped, context_args, dot_candidates, head_args, load_bound, row_args, rule_args, sum_weights
from .fused_selection import IS_INTERPRETED, IS_NVIDIA, can_overlap, merge, select, store_candidates
from .fused_tracing import score_contexts, trace_groups_, trace_tokens_
from .keys import LOWEST_KEY, from_key
from .launching import COUNTS, ROW_POINTERS
from .mixture import mix_contexts
from .scoring import append_adapters, map_heads
from .selection import MIN_K, pad_k
from .types import Controls, Groups, HeadMix, Mixture, OutputHead, Rows, SharedVocabulary, Trace
from .writing import write_guided

FEW, BLOCK_D = 16, 512
"""Candidates that a program of the second launch scores at a time, and elements of their rows of lm_head that it holds
at a time."""
FEW_ROWS, FEW_OF_FEW, BLOCK_D_OF_FEW = 16, 4, 2048
"""Up to so many rows, or with the fewest candidates, these instead: a multiprocessor alone reads slowly."""
PROGRAMS = 32 if IS_INTERPRETED else 512
"""In the second launch, about, as far as there are candidates for so many: each merges its row again, which the
interpreter does one after the other."""
SCORE_WARPS, REWEIGHT_WARPS = 8, 1
SCORE_REGISTERS = 128
"""Of a thread, at most, on GPUs of NVIDIA: so that two programs fit on a multiprocessor."""


@triton.jit
def score_part(
    part, num_parts, row_idx, top_k, kept, rank, hidden_ptr, hidden_stride, lm_head_ptr, lm_head_stride, bias_ptr,
    more_ptr, more_stride, num_more, scores_ptr, contexts_ptr, weights_ptr, num_contexts, soft_cap, vocab_start,
    shard_size, hidden_size,
    K: tl.constexpr, FEW: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MIXTURE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Score a program's part of a row's candidates, FEW at a time; ``kept`` and ``rank`` are of :func:`.merge`, the
    others :func:`score_kernel`'s."""
    begin, end = row_idx * num_contexts, (row_idx + 1) * num_contexts
    for first in range(part * FEW, top_k, num_parts * FEW):
        place = first + tl.arange(0, FEW)
        mine = tl.where((rank[:, None] == place[None, :]) & (place < top_k)[None, :], kept[:, None], LOWEST_KEY)
        candidates = tl.max(mine, 0)
        _, ids = from_key(candidates)
        local = ids - vocab_start
        is_mine = (candidates > LOWEST_KEY) & (local >= 0) & (local < shard_size)
        local = tl.where(is_mine, local, 0)
        if HAS_MIXTURE and HAS_SOFT_CAP:
            scores = tl.zeros([FEW], tl.float32)
            for i in range(begin, end):
                row_hidden_ptr = hidden_ptr + tl.load(contexts_ptr + i) * hidden_stride
                partial = dot_candidates(
                    row_hidden_ptr, lm_head_ptr, lm_head_stride, bias_ptr, more_ptr, more_stride, num_more, 1.0, local,
                    is_mine, hidden_size, FEW, BLOCK_D, HAS_BIAS,
                )  # fmt: skip
                if NORMALIZE:
                    scores += tl.load(weights_ptr + i) * capped(partial, soft_cap)
                else:
                    tl.store(scores_ptr + i * K + place, partial)
        else:
            bias_weight = sum_weights(weights_ptr, begin, end) if HAS_MIXTURE else 1.0
            row_hidden_ptr = hidden_ptr + row_idx * hidden_stride
            scores = dot_candidates(
                row_hidden_ptr, lm_head_ptr, lm_head_stride, bias_ptr, more_ptr, more_stride, num_more, bias_weight,
                local, is_mine, hidden_size, FEW, BLOCK_D, HAS_BIAS,
            )  # fmt: skip
            if NORMALIZE and HAS_SOFT_CAP:
                scores = capped(scores, soft_cap)
        if NORMALIZE or not (HAS_MIXTURE and HAS_SOFT_CAP):
            tl.store(scores_ptr + row_idx * K + place, scores)


@triton.jit
def load_finished(candidates_ptr, scores_ptr, K: tl.constexpr):
    """[K] keys and scores that other programs wrote: past the multiprocessor's own cache."""
    place = tl.arange(0, K)
    return (
        tl.load(candidates_ptr + place, cache_modifier=".cg"),
        tl.load(scores_ptr + place, cache_modifier=".cg"),
    )


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def score_kernel(
    logits_ptr,  # [N, num_cols]
    logits_stride,
    rows_ptr,  # [R] int64
    top_k_ptr,  # [R] int64
    top_k_stride,
    keys_ptr,  # [R, num_keys] int64
    num_keys,
    kept_ptr,  # [R, num_parts, CAPACITY] int64, the programs' own room
    candidates_ptr,  # [R, K] int64, out
    arrivals_ptr,  # [R] int32, 0 at first
    hidden_ptr,  # [R, hidden_size + num_more]; as many times C for a mixture with a soft cap
    hidden_stride,
    lm_head_ptr,  # [shard_size, hidden_size]
    lm_head_stride,
    bias_ptr,  # [shard_size], or nothing
    more_ptr,  # [shard_size, num_more], or nothing: the adapters' columns of lm_head
    more_stride,
    num_more,
    beta_ptr,  # [R] float32
    beta_stride,
    reference_ptr,  # [R] float32
    reference_stride,
    has_bound,
    max_divergence_ptr,  # [R] float32; anything unless has_bound
    max_divergence_stride,
    end_ids_ptr,  # [R] int64
    no_opinion_ptr,  # [vocab_size] bool, or nothing
    scores_ptr,  # [R, K] float32 ([R, J, K] for a mixture with a soft cap, unless NORMALIZE), out
    contexts_ptr,  # [R, J] int64, or nothing
    weights_ptr,  # [R, J] float32, or nothing
    num_contexts,  # J
    soft_cap,
    scale,
    vocab_start,
    shard_size,
    hidden_size,
    K: tl.constexpr,
    FEW: tl.constexpr,
    CAPACITY: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    OVERLAP: tl.constexpr = False,
):
    """Merge a row's candidates and score a part of them. Then the last of the row's programs writes the row; or all of
    them leave candidates and partial scores."""
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    row_idx = tl.program_id(1).to(tl.int64)
    top_k = tl.load(top_k_ptr + row_idx * top_k_stride).to(tl.int32)
    if NORMALIZE:  # here, where nothing waits for them
        row_ptr = logits_ptr + tl.load(rows_ptr + row_idx) * logits_stride
        beta = tl.load(beta_ptr + row_idx * beta_stride)
        reference = tl.load(reference_ptr + row_idx * reference_stride)
        bound = load_bound(has_bound, max_divergence_ptr, max_divergence_stride, row_idx)
        end_id = tl.load(end_ids_ptr + row_idx)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()  # what the launches before wrote is seen from here on
    if top_k > 0:
        row_candidates_ptr = candidates_ptr + row_idx * K
        part_kept_ptr = kept_ptr + (row_idx * num_parts + part) * CAPACITY
        row_keys_ptr = keys_ptr + row_idx * num_keys
        kept, rank = merge(row_keys_ptr, num_keys, part_kept_ptr, top_k, CAPACITY, NUM_KEYS, WIDTH)
        if part == 0:
            store_candidates(row_candidates_ptr, kept, rank, top_k, K)
        score_part(
            part, num_parts, row_idx, top_k, kept, rank, hidden_ptr, hidden_stride, lm_head_ptr, lm_head_stride,
            bias_ptr, more_ptr, more_stride, num_more, scores_ptr, contexts_ptr, weights_ptr, num_contexts, soft_cap,
            vocab_start, shard_size, hidden_size, K, FEW, BLOCK_D, HAS_BIAS, HAS_MIXTURE, HAS_SOFT_CAP, NORMALIZE,
        )  # fmt: skip
        if NORMALIZE:
            tl.debug_barrier()  # all threads' scores are out before their program is counted
            if tl.atomic_add(arrivals_ptr + row_idx, 1, sem="acq_rel") == num_parts - 1:
                candidates, scores = load_finished(row_candidates_ptr, scores_ptr + row_idx * K, K)
                write_guided(row_ptr, candidates, None, scores, no_opinion_ptr, beta, reference, bound, end_id, scale)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def reweight_kernel(
    logits_ptr,  # [N, num_cols]
    logits_stride,
    rows_ptr,  # [R] int64
    top_k_ptr,  # [R] int64
    top_k_stride,
    candidates_ptr,  # [R, K] int64
    y_ptr,  # [R, K] float32, or nothing
    scores_ptr,  # [R, K] float32 ([R, J, K] for a mixture with a soft cap)
    beta_ptr,  # [R] float32
    beta_stride,
    reference_ptr,  # [R] float32
    reference_stride,
    has_bound,
    max_divergence_ptr,  # [R] float32; anything unless has_bound
    max_divergence_stride,
    end_ids_ptr,  # [R] int64
    no_opinion_ptr,  # [vocab_size] bool, or nothing
    weights_ptr,  # [R, J] float32, or nothing
    num_contexts,  # J
    soft_cap,
    scale,
    K: tl.constexpr,
    HAS_CONTROLS: tl.constexpr,
    HAS_MIXTURE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
):
    """Write a row whose candidates' scores are whole, and free of what requests did to its logits."""
    row_idx = tl.program_id(0).to(tl.int64)
    if tl.load(top_k_ptr + row_idx * top_k_stride) > 0:
        place = tl.arange(0, K)
        candidates = tl.load(candidates_ptr + row_idx * K + place)
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
        bound = load_bound(has_bound, max_divergence_ptr, max_divergence_stride, row_idx)
        end_id = tl.load(end_ids_ptr + row_idx)
        y = None
        if HAS_CONTROLS:
            y = tl.load(y_ptr + row_idx * K + place)
        write_guided(row_ptr, candidates, y, scores, no_opinion_ptr, beta, reference, bound, end_id, scale)


def parts_of(num_rows: int, max_top_k: int) -> tuple[int, int, int]:
    """FEW, BLOCK_D and how many programs a row has in the second launch."""
    is_few = num_rows <= FEW_ROWS or pad_k(max_top_k) == MIN_K
    few, block_d = (FEW_OF_FEW, BLOCK_D_OF_FEW) if is_few else (FEW, BLOCK_D)
    return few, block_d, min(triton.cdiv(max_top_k, few), max(1, PROGRAMS // num_rows))


def score_options(device: torch.device) -> dict[str, int | bool]:
    """Of the second launch: its warps, and on NVIDIA's GPUs its registers, and whether it may begin early."""
    overlap = can_overlap(device)
    options: dict[str, int | bool] = {"OVERLAP": overlap, "num_warps": SCORE_WARPS}
    if SCORE_REGISTERS and IS_NVIDIA and device.type == "cuda":
        options["maxnreg"] = SCORE_REGISTERS
    return options | ({"launch_pdl": True} if overlap else {})


def guide_(
    logits: torch.Tensor,
    hidden_states: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    vocabulary: SharedVocabulary | Groups,
    *,
    controls: Controls | None = None,
    mixture: Mixture | None = None,
    head_mix: HeadMix | None = None,
    trace: Trace | None = None,
) -> None:
    """:func:`.reference.guide_`, by Triton kernels. The last dimensions of ``logits``, ``hidden_states`` and
    ``head.weight`` must be contiguous; their rows may lie any stride apart.

    The value heads' matrix products are left to the library: a [d, d] product for each head is what it does best.
    """
    if (num_rows := rows.index.shape[0]) == 0:
        return
    if head_mix is not None:
        hidden_states = map_heads(hidden_states, head_mix)
    hidden_states = append_adapters(hidden_states, head.adapters)
    assert logits.stride(1) == hidden_states.stride(1) == head.weight.stride(1) == 1
    assert mixture is None or all(tensor.is_contiguous() for tensor in mixture)
    candidates = torch.empty(num_rows, pad_k(rows.max_top_k), dtype=torch.int64, device=logits.device)
    if isinstance(vocabulary, Groups):
        of_groups = score_groups(logits, hidden_states, head, rows, vocabulary, candidates, controls, mixture)
        y = None if controls is None else undo_controls(candidates, rows.top_k, controls)
        reweight_groups_(logits, head, rows, vocabulary, candidates, mixture, of_groups, y)
        if trace is not None:
            trace_groups_(logits, rows, candidates, mixture, of_groups, y, trace)
        return
    traces = trace is not None
    scored = score_tokens(logits, hidden_states, head, rows, vocabulary, candidates, controls, mixture, traces)
    y = None if controls is None else undo_controls(candidates, rows.top_k, controls)
    if not scored.is_written:
        reweight_tokens_(logits, head, rows, vocabulary, candidates, mixture, scored.scores, y)
    if trace is not None:
        apart, is_capped = scored.apart, scored.is_written and mixture is None
        trace_tokens_(logits, head, rows, vocabulary, candidates, mixture, apart, is_capped, y, trace)


class TokenScores(NamedTuple):
    """What the reward model says of the candidates, of all ranks."""

    scores: torch.Tensor
    """[R, K] float32 ([R * J, K] for a mixture with a soft cap); with the soft cap, if the rows are written"""
    is_written: bool
    """Whether the rows are: no other rank has a part of them, and no controls are to be undone"""
    apart: torch.Tensor
    """[R * J, K] float32: in each context by itself, where these are traced; else ``scores``"""


def score_tokens(
    logits: torch.Tensor,
    hidden_states: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    vocabulary: SharedVocabulary,
    candidates: torch.Tensor,
    controls: Controls | None,
    mixture: Mixture | None,
    traces: bool,
) -> TokenScores:
    """Select the candidates and score each by its own row of the output head.

    Args:
        hidden_states: [C, d], mapped by the value heads where there are any; [C, d + Q] where the head has adapters.
        candidates: [R, K] int64, out: keys.
        traces: whether each context's scores are asked for.
    """
    is_capped = head.soft_cap is not None
    of_contexts = hidden_states
    if mixture is not None and not is_capped:  # an output head is linear: it is enough to score the mixture
        hidden_states = mix_contexts(hidden_states, mixture)
    (num_rows, K), device = candidates.shape, logits.device
    # Without a soft cap, a mixture is to the scores a context like another, but for the bias.
    has_mixture = mixture is not None and (is_capped or head.bias is not None)
    contexts, weights, num_contexts = context_args(mixture if has_mixture else None)
    is_whole = head.all_reduce is None and controls is None
    arrivals = torch.empty(num_rows, dtype=torch.int32, device=device)
    keys, sizes = select(logits, rows, K, vocabulary.vocab_size, arrivals)
    few, block_d, parts = parts_of(num_rows, rows.max_top_k)
    kept = torch.empty(num_rows, parts, sizes["CAPACITY"], dtype=torch.int64, device=device)
    make = torch.empty if is_whole else torch.zeros  # the ranks' sum is read, also where there are no candidates
    num_scores = num_rows * (num_contexts if head.soft_cap and not is_whole else 1)
    # Of contexts that are mixed; the ranks' parts of all these are summed together.
    num_apart = num_rows * mixture.contexts.shape[1] if traces and mixture and (is_whole or not is_capped) else 0
    both = make(num_scores + num_apart, K, device=device)
    scores = both[:num_scores]
    score_kernel[(parts, num_rows)](
        *(*row_args(logits, rows), keys, keys.shape[1], kept, candidates, arrivals),
        *head_args(hidden_states, head),
        *(*rule_args(rows), vocabulary.no_opinion, scores, contexts, weights, num_contexts),
        *(head.soft_cap or 1.0, head.scale, head.vocab_start, *head.weight.shape),
        K=K,
        FEW=few,
        **sizes,
        BLOCK_D=block_d // 2 if has_mixture and is_capped else block_d,  # or registers would spill
        HAS_BIAS=head.bias is not None,
        HAS_MIXTURE=has_mixture,
        HAS_SOFT_CAP=is_capped,
        NORMALIZE=is_whole,
        **score_options(device),
    )
    if num_apart and mixture is not None:
        score_contexts(of_contexts, head, rows, candidates, mixture, both[num_scores:])
    if head.all_reduce is not None:
        both = head.all_reduce(both)
    return TokenScores(both[:num_scores], is_whole, both[num_scores:] if num_apart else both)


def reweight_tokens_(
    logits: torch.Tensor,
    head: OutputHead,
    rows: Rows,
    vocabulary: SharedVocabulary,
    candidates: torch.Tensor,
    mixture: Mixture | None,
    scores: torch.Tensor,
    y: torch.Tensor | None,
) -> None:
    """Write the rows, by what :func:`score_tokens` returned; ``y`` [R, K] float32, the candidates' logits without
    controls, or None where there are none."""
    num_rows, K = candidates.shape
    has_mixture = mixture is not None and head.soft_cap is not None
    _, weights, num_contexts = context_args(mixture if has_mixture else None)
    reweight_kernel[(num_rows,)](
        *(*row_args(logits, rows), candidates, y, scores),
        *(*rule_args(rows), vocabulary.no_opinion, weights, num_contexts, head.soft_cap or 1.0, head.scale),
        K=K,
        HAS_CONTROLS=y is not None,
        HAS_MIXTURE=has_mixture,
        HAS_SOFT_CAP=head.soft_cap is not None,
        num_warps=REWEIGHT_WARPS,
    )
