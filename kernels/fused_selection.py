"""A guided row's candidates on a GPU: what it costs hardly depends on how many there are.

:func:`select_kernel`, a program for each slice of a row, takes the slice as [WIDTH, HEIGHT] integers that order as the
logits do. Of the WIDTH columns' maxima it seeks a bound that at least k of them reach, and so at least k of the slice's
logits. Only the columns that reach it, a few more than k as a rule, are read again, from the cache; what reaches the
bound in them is kept, by a prefix sum, and -inf is written over all of the slice: one read and one write of memory, and
few registers. :func:`merge` does alike to what a row's slices kept, and ranks what is left. Where more survive than
there are places for (ties), a slower search finds of equal logits the token id up to which they fit: it is exact for
every row.

A candidate is one int64 key (:mod:`.keys`), whose upper half is the integer of its logit.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from .keys import LOWEST_KEY, NOTHING, order, to_key
from .launching import COUNTS, ROW_POINTERS
from .types import Rows

HEIGHT, WIDTH = 8, 2048
"""Of a slice: a thread has whole columns, four of them."""
MIN_WIDTH = 64
"""Of a small vocabulary, which is one slice."""
OVERLAP = True
"""Whether the next launch may start, and load what it needs of the arguments, before a selection is done."""
MAX_KEYS = 8192
"""Of a row's slices together, which one program merges; where there are more, other launches merge parts of them."""
SELECT_WARPS, MERGE_WARPS = 16, 8
SELECT_REGISTERS = 64
"""Of a thread, at most, on GPUs of NVIDIA: so that two programs fit on a multiprocessor."""
IS_NVIDIA = torch.version.hip is None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PAIRS = tl.constexpr(16384)
"""Keys that are compared with each other at a time."""
ROUNDS = tl.constexpr(3)
"""In which a bound is sought evenly between logits; then every second one parts the integers, of which there are
only 32 bits. The first one looks nearer to the low end, where most logits are."""
FOLDS = tl.constexpr(not IS_INTERPRETED)
"""Whether several values are reduced together, which saves barriers; the interpreter would call Python for each."""


@triton.jit
def fold_column(most, least, other_most, other_least):
    return tl.maximum(most, other_most), tl.minimum(least, other_least)


@triton.jit
def fold_group(low, high, least, other_low, other_high, other_least):
    return tl.minimum(low, other_low), tl.maximum(high, other_high), tl.minimum(least, other_least)


@triton.jit
def bound(ordered, k, most, GROUPS: tl.constexpr):
    """A bound that at least ``k`` <= ``most`` of ``ordered`` [WIDTH, HEIGHT] reach, if there are so many, and no more
    than ``most`` unless they are ties; and how many do.

    It starts from the least of the maxima of GROUPS groups, which so many reach. Then a round counts for several
    thresholds at once, in the bits of an int64: a reduction over a program's warps takes long, whatever it reduces.
    """
    WIDTH: tl.constexpr = ordered.shape[0]
    BITS: tl.constexpr = 12 if ordered.numel < 4096 else 15 if ordered.numel < 32768 else 20
    NUM: tl.constexpr = 60 // BITS
    lowest = tl.where(ordered > NOTHING, ordered, 0x7FFFFFFF)
    maxima, minima = tl.max(ordered, 1), tl.min(lowest, 1)
    maxima, minima = tl.reshape(maxima, [WIDTH // GROUPS, GROUPS]), tl.reshape(minima, [WIDTH // GROUPS, GROUPS])
    if FOLDS:
        maxima, minima = tl.reduce((maxima, minima), 0, fold_column)
        low, high, least = tl.reduce((maxima, maxima, minima), 0, fold_group)
    else:
        maxima = tl.max(maxima, 0)
        low, high, least = tl.min(maxima, 0), tl.max(maxima, 0), tl.min(tl.min(minima, 0), 0)
    low = tl.maximum(tl.where((k <= GROUPS) & (low > NOTHING), low, tl.minimum(least, high)), NOTHING + 1)
    high = tl.maximum(high + 1, NOTHING + 2)
    num = most + 1
    i = 0
    while (i == 0) | ((num > most) & (low + 1 < high)):
        # Thresholds lie between the logits of the ends, or every second round, and whatever happens in the end, between
        # the integers.
        last = high - 1
        low_logit = (low ^ ((low >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        high_logit = (last ^ ((last >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        step = tl.maximum(((high >> 1) - (low >> 1)) // (NUM + 1) * 2, 1)
        by_logits = (i < ROUNDS) | (i % 2 == 0)
        least = tl.where(i > 0, low + 1, low)
        packed = tl.zeros([WIDTH], tl.int64)
        for j in tl.static_range(NUM):  # at first most are near the low end, where most logits are
            f = tl.where(i == 0, (1 << j) / (1 << NUM) if j > 0 else 0.0, (j + 1) / (NUM + 1))
            bits = ((1.0 - f) * low_logit + f * high_logit).to(tl.int32, bitcast=True)
            middle = tl.where(by_logits, bits ^ ((bits >> 31) & 0x7FFFFFFF), low + step * (j + 1))
            middle = tl.minimum(tl.maximum(middle, least), last)
            reach = tl.sum((ordered >= middle).to(tl.int32), 1)
            packed += reach.to(tl.int64) << (BITS * j)
        packed = tl.sum(packed, 0)
        new_low, new_high = low, high
        num = tl.where(i == 0, packed.to(tl.int32) & ((1 << BITS) - 1), num)
        for j in tl.static_range(NUM):
            f = tl.where(i == 0, (1 << j) / (1 << NUM) if j > 0 else 0.0, (j + 1) / (NUM + 1))
            bits = ((1.0 - f) * low_logit + f * high_logit).to(tl.int32, bitcast=True)
            middle = tl.where(by_logits, bits ^ ((bits >> 31) & 0x7FFFFFFF), low + step * (j + 1))
            middle = tl.minimum(tl.maximum(middle, least), last)
            reach = (packed >> (BITS * j)).to(tl.int32) & ((1 << BITS) - 1)
            is_low = (reach >= k) & (middle >= new_low)
            new_low = tl.where(is_low, middle, new_low)
            num = tl.where(is_low, reach, num)
            new_high = tl.where((reach < k) & (middle > low), tl.minimum(new_high, middle), new_high)
        low, high = new_low, new_high
        i += 1
    return low, num


@triton.jit
def drop_ties(ordered, ids, least, k):
    """Without those of the ties at ``least`` that are not among the k first, by lower id."""
    ties = ordered == least
    wanted = k - tl.sum((ordered > least).to(tl.int32))
    low, high = tl.min(tl.where(ties, ids, 0x7FFFFFFF)), tl.max(tl.where(ties, ids, 0))
    while low < high:  # the lowest id up to which there are enough
        mid = low + (high - low) // 2
        enough = tl.sum((ties & (ids <= mid)).to(tl.int32)) >= wanted
        low = tl.where(enough, low, mid + 1)
        high = tl.where(enough, mid, high)
    return tl.where(ties & (ids > low), NOTHING, ordered)


@triton.jit
def count(slice_ptr, num_logits, least, last, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    """How many of a slice's logits are over ``least``, or are that and stand before ``last``; [WIDTH], by columns."""
    counts = tl.zeros([WIDTH], tl.int32)
    for i in range(HEIGHT):
        place = i * WIDTH + tl.arange(0, WIDTH)
        ordered = order(tl.load(slice_ptr + place, mask=place < num_logits, other=float("-inf")))
        counts += ((ordered > least) | ((ordered == least) & (place < last))).to(tl.int32)
    return counts


@triton.jit
def keep_slowly(
    out_ptr, slice_ptr, begin, num_logits, low, high, k, WIDTH: tl.constexpr, HEIGHT: tl.constexpr
):  # fmt: skip
    """Write the keys of a slice's k largest logits, ties by lower id, where more columns than places hold ties of their
    bound ``low``; ``high`` is the largest. It reads the slice again at every step, and is exact."""
    END: tl.constexpr = WIDTH * HEIGHT
    high += 1
    while low + 1 < high:
        mid = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = tl.sum(count(slice_ptr, num_logits, mid, END, WIDTH, HEIGHT)) >= k
        low = tl.where(enough, mid, low)
        high = tl.where(enough, high, mid)
    first, last = 0, END  # the place before which there are enough of the ties
    while first + 1 < last:
        mid = (first + last) // 2
        enough = tl.sum(count(slice_ptr, num_logits, low, mid, WIDTH, HEIGHT)) >= k
        first = tl.where(enough, first, mid)
        last = tl.where(enough, mid, last)
    counts = count(slice_ptr, num_logits, low, last, WIDTH, HEIGHT)
    at = tl.cumsum(counts, 0) - counts
    for i in range(HEIGHT):
        place = i * WIDTH + tl.arange(0, WIDTH)
        ordered = order(tl.load(slice_ptr + place, mask=place < num_logits, other=float("-inf")))
        is_kept = (ordered > low) | ((ordered == low) & (place < last))
        tl.store(out_ptr + at, to_key(ordered, begin + place), mask=is_kept)
        at += is_kept.to(tl.int32)


@triton.jit
def fill(out_ptr, total, CAPACITY: tl.constexpr):
    """LOWEST_KEY behind ``total`` keys."""
    place = tl.arange(0, CAPACITY)
    tl.store(out_ptr + place, tl.full([CAPACITY], LOWEST_KEY, tl.int64), mask=place >= total)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def select_kernel(
    logits_ptr,  # [N, num_cols]
    logits_stride,
    rows_ptr,  # [R] int64
    top_k_ptr,  # [R] int64
    top_k_stride,
    keys_ptr,  # [R, num_slices, CAPACITY] int64, out
    arrivals_ptr,  # [R] int32, out: 0; or nothing
    vocab_size,
    num_cols,
    CAPACITY: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The keys of each slice of each guided row that may be the row's candidates, in no order; and -inf in their
    place."""
    slice_idx = tl.program_id(0)
    row_idx = tl.program_id(1).to(tl.int64)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    top_k = tl.load(top_k_ptr + row_idx * top_k_stride).to(tl.int32)
    row = tl.load(rows_ptr + row_idx)  # not after the branch, where it would wait for top_k
    if arrivals_ptr is not None:
        tl.store(arrivals_ptr + row_idx, 0, mask=slice_idx == 0)
    if top_k > 0:
        begin = slice_idx * (WIDTH * HEIGHT)
        slice_ptr = logits_ptr + row * logits_stride + begin
        out_ptr = keys_ptr + (row_idx * tl.num_programs(0) + slice_idx) * CAPACITY
        w, h = tl.arange(0, WIDTH), tl.arange(0, HEIGHT)[None, :]
        place = w[:, None] + h * WIDTH
        num_logits = vocab_size - begin
        maxima = tl.max(order(tl.load(slice_ptr + place, mask=place < num_logits, other=float("-inf"))), 1)
        COLUMNS: tl.constexpr = min(CAPACITY, WIDTH)
        GROUPS: tl.constexpr = min(CAPACITY // 2, WIDTH)
        least, num = bound(maxima[:, None], top_k, COLUMNS // 8 * 7, GROUPS)
        if num <= COLUMNS:
            least = tl.where(num < top_k, NOTHING + 1, least)  # all that there is: it is in these columns
            at = tl.cumsum((maxima >= least).to(tl.int32), 0) - 1
            tl.store(out_ptr + at, w.to(tl.int64), mask=maxima >= least)
            tl.debug_barrier()  # what other threads wrote is read
            c = tl.arange(0, COLUMNS)
            column = tl.load(out_ptr + c, mask=c < num, other=0).to(tl.int32)
            ids = column[:, None] + h * WIDTH
            mask = (c < num)[:, None] & (ids < num_logits)
            ordered = order(tl.load(slice_ptr + ids, mask=mask, other=float("-inf")))
            tl.debug_barrier()  # all have read, before others write
            total = tl.sum((ordered >= least).to(tl.int32))
            if total > CAPACITY:
                least, total = bound(ordered, top_k, CAPACITY, min(GROUPS, COLUMNS))
                if total > CAPACITY:
                    ordered = drop_ties(ordered, ids, least, top_k)
                    total = top_k
            flat, flat_ids = tl.reshape(ordered, [COLUMNS * HEIGHT]), tl.reshape(ids, [COLUMNS * HEIGHT])
            flat_at = tl.cumsum((flat >= least).to(tl.int32), 0) - 1
            tl.store(out_ptr + flat_at, to_key(flat, begin + flat_ids), mask=flat >= least)
        else:
            total = top_k
            keep_slowly(out_ptr, slice_ptr, begin, num_logits, least, tl.max(maxima, 0), top_k, WIDTH, HEIGHT)
        fill(out_ptr, total, CAPACITY)
        tl.debug_barrier()  # all have read
        place = w[:, None] + h * WIDTH
        nothing = tl.full([WIDTH, HEIGHT], float("-inf"), logits_ptr.dtype.element_ty)
        tl.store(slice_ptr + place, nothing, mask=place < num_cols - begin)


@triton.jit
def merge_slices(
    keys_ptr, num_keys, out_ptr, top_k, CAPACITY: tl.constexpr, NUM_KEYS: tl.constexpr, WIDTH: tl.constexpr
):
    """As a slice's logits, ``num_keys`` keys of several: of these, what may be the row's candidates goes to
    [CAPACITY]."""
    HEIGHT: tl.constexpr = NUM_KEYS // WIDTH
    w, h = tl.arange(0, WIDTH)[:, None], tl.arange(0, HEIGHT)[None, :]
    keys = tl.load(keys_ptr + w + h * WIDTH, mask=w + h * WIDTH < num_keys, other=LOWEST_KEY)
    ordered, tails = (keys >> 32).to(tl.int32), keys.to(tl.int32)
    GROUPS: tl.constexpr = min(CAPACITY // 2, WIDTH)
    least, total = bound(ordered, top_k, CAPACITY, GROUPS)
    if total > CAPACITY:
        ordered = drop_ties(ordered, -1 - tails, least, top_k)
        total = top_k
    counts = tl.sum((ordered >= least).to(tl.int32), 1)
    at = tl.cumsum(counts, 0) - counts
    for i in tl.static_range(HEIGHT):  # a thread has all of a column: to take one row after another costs nothing
        head, tail = tl.sum(tl.where(h == i, ordered, 0), 1), tl.sum(tl.where(h == i, tails, 0), 1)
        key = (head.to(tl.int64) << 32) | tail.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(out_ptr + at, key, mask=head >= least)
        at += (head >= least).to(tl.int32)
    fill(out_ptr, total, CAPACITY)


@triton.jit
def merge(
    keys_ptr, num_keys, kept_ptr, top_k, CAPACITY: tl.constexpr, NUM_KEYS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """A row's candidates are among ``keys`` [CAPACITY] int64: those of which ``rank`` is less than top_k, and that are
    keys. ``kept_ptr`` is the program's own room for [CAPACITY] of them."""
    merge_slices(keys_ptr, num_keys, kept_ptr, top_k, CAPACITY, NUM_KEYS, WIDTH)
    tl.debug_barrier()  # what other threads wrote is read
    place = tl.arange(0, CAPACITY)
    keys = tl.load(kept_ptr + place)
    rank = tl.full([CAPACITY], 0, tl.int32)
    SOME: tl.constexpr = min(PAIRS // CAPACITY, CAPACITY)
    for start in range(0, CAPACITY, SOME):
        others = tl.load(kept_ptr + start + tl.arange(0, SOME))
        rank += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), 1)
    return keys, rank


@triton.jit
def store_candidates(candidates_ptr, keys, rank, top_k, K: tl.constexpr):
    """Write a row's candidates in order to [K] places, LOWEST_KEY behind them."""
    is_candidate = (keys > LOWEST_KEY) & (rank < top_k)
    tl.store(candidates_ptr + rank, keys, mask=is_candidate)
    place = tl.arange(0, K)
    num = tl.sum(is_candidate.to(tl.int32), 0)
    tl.store(candidates_ptr + place, tl.full([K], LOWEST_KEY, tl.int64), mask=place >= num)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=ROW_POINTERS)
def merge_kernel(
    top_k_ptr,  # [R] int64
    top_k_stride,
    keys_ptr,  # [R, num_keys] int64
    num_keys,
    out_ptr,  # [R, parts, CAPACITY] int64, out
    CAPACITY: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Merge a part of a row's slices."""
    part = tl.program_id(0)
    row_idx = tl.program_id(1).to(tl.int64)
    top_k = tl.load(top_k_ptr + row_idx * top_k_stride).to(tl.int32)
    if top_k > 0:
        part_ptr = keys_ptr + row_idx * num_keys + part * NUM_KEYS
        part_out_ptr = out_ptr + (row_idx * tl.num_programs(0) + part) * CAPACITY
        merge_slices(part_ptr, num_keys - part * NUM_KEYS, part_out_ptr, top_k, CAPACITY, NUM_KEYS, WIDTH)


def select(
    logits: torch.Tensor, rows: Rows, K: int, vocab_size: int, arrivals: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, int]]:
    """Launch the selection of the slices, and as many merges as leave what one program can merge.

    Returns:
        keys [R, num_keys] int64, among which are the rows' candidates, and the constants of :func:`merge`.
    """
    index, top_k = rows.index, rows.top_k
    num_rows, num_cols = index.shape[0], logits.shape[1]
    width = min(WIDTH, max(MIN_WIDTH, triton.next_power_of_2(triton.cdiv(num_cols, HEIGHT))))
    capacity, slices = 2 * K, triton.cdiv(num_cols, HEIGHT * width)
    keys = torch.empty(num_rows, slices * capacity, dtype=torch.int64, device=logits.device)
    select_kernel[(slices, num_rows)](
        *(logits, logits.stride(0), index, top_k, top_k.stride(0), keys, arrivals, vocab_size, num_cols),
        CAPACITY=capacity,
        HEIGHT=HEIGHT,
        WIDTH=width,
        OVERLAP=can_overlap(logits.device),
        **select_options(logits.device),
    )
    most = max(MAX_KEYS, 2 * capacity)
    while (num_keys := keys.shape[1]) > most:
        parts = triton.cdiv(num_keys, most)
        merged = torch.empty(num_rows, parts * capacity, dtype=torch.int64, device=logits.device)
        merge_kernel[(parts, num_rows)](
            *(top_k, top_k.stride(0), keys, num_keys, merged), **merge_constants(most, capacity), num_warps=MERGE_WARPS
        )
        keys = merged
    return keys, merge_constants(num_keys, capacity)


def select_options(device: torch.device) -> dict[str, int]:
    """Warps and registers: so that several programs, and what they wait for, fit on a multiprocessor."""
    limit = {"maxnreg": SELECT_REGISTERS} if SELECT_REGISTERS and IS_NVIDIA and device.type == "cuda" else {}
    return {"num_warps": SELECT_WARPS} | limit


def can_overlap(device: torch.device) -> bool:
    """Programmatic dependent launch: on NVIDIA's GPUs since Hopper."""
    return OVERLAP and IS_NVIDIA and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def merge_constants(num_keys: int, capacity: int) -> dict[str, int]:
    size = triton.next_power_of_2(num_keys)
    return {"CAPACITY": capacity, "NUM_KEYS": size, "WIDTH": min(size, 64 * MERGE_WARPS)}
