"""The first part of the guidance step in PyTorch: which tokens are a row's candidates."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .types import Rows

NEG_INF = float("-inf")
MAX_LOGIT = 1e30
"""Of a logit with its controls undone: absurd ones overflow, and the differences of two must stay finite."""
SLICE = 64
"""Tokens of the vocabulary that are looked at together."""
MIN_K, USUAL_K = 16, 64
"""Places for candidates that kernels are compiled for: so many; so many, or else the next power of 2."""
MAX_SORTED_ROWS = 4
"""So many rows are sorted sooner as they are, on a CPU, than by slices."""


def pad_k(max_top_k: int) -> int:
    """K, the places that a row has for its candidates."""
    return MIN_K if max_top_k <= MIN_K else max(USUAL_K, 1 << (max_top_k - 1).bit_length())


def compiled_top_k(most: int) -> list[int]:
    """A k for each K that steps of up to ``most`` candidates have."""
    return sorted({max(k for k in range(1, most + 1) if pad_k(k) == K) for K in map(pad_k, range(1, most + 1))})


class Candidates(NamedTuple):
    """The candidates of each guided row."""

    ids: torch.Tensor
    """[R, K] int64"""
    z: torch.Tensor
    """[R, K] float32, the base logits; -inf in places beyond a row's candidates"""
    is_readable: bool = True
    """As of their :class:`.types.Rows`"""


def select_candidates(logits: torch.Tensor, rows: Rows, vocab_size: int) -> Candidates:
    """The candidates of each guided row, largest base logit first; of equal ones the lower token ids are in.

    Args:
        logits: [N, V].
        rows: those that are guided.
        vocab_size: only the first ``vocab_size`` <= V tokens can be candidates.
    """
    index, top_k = rows.index, rows.top_k
    place = torch.arange(rows.max_top_k, device=logits.device)
    if rows.is_readable and index.shape[0] > 0 and rows.max_top_k < vocab_size:
        found = largest_without_ties(logits, index, rows.max_top_k, vocab_size)
        if found is not None:
            return Candidates(found[0], found[1].masked_fill(place >= top_k.unsqueeze(1), NEG_INF), True)
    # The k first tokens are in the k first slices, by largest logit: one pass over the vocabulary, and no copy of it.
    maxima = slice_maxima(logits, vocab_size)
    if not rows.is_readable or not bool((maxima < float("inf")).all()):
        logits = logits.nan_to_num(nan=NEG_INF, posinf=NEG_INF, neginf=NEG_INF)
        maxima = slice_maxima(logits, vocab_size)
    k, num_slices = min(rows.max_top_k, vocab_size), maxima.shape[1]
    _, slices = largest(maxima[index].float(), torch.arange(num_slices, device=index.device), min(k, num_slices))
    ids = (slices.unsqueeze(-1) * SLICE + torch.arange(SLICE, device=index.device)).flatten(1)
    # What the last slice lacks comes behind all tokens, of which there are k in these slices.
    z = logits[index.unsqueeze(1), ids.clamp(max=vocab_size - 1)].float().masked_fill(ids >= vocab_size, NEG_INF)
    values, ids = largest(z, ids, k)
    return Candidates(ids, values.masked_fill(place[:k] >= top_k.unsqueeze(1), NEG_INF), rows.is_readable)


def largest_without_ties(
    logits: torch.Tensor, rows: torch.Tensor, k: int, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What :func:`select_candidates` finds, where no two are equal; else None. For logits that the host may look
    at."""
    some = logits if len(rows) == len(logits) else logits[rows]
    if len(some) > MAX_SORTED_ROWS and vocab_size % SLICE == 0 and k < vocab_size // SLICE:
        # The first k + 1 are in the first k + 1 slices, or their like are.
        parts = some[:, :vocab_size].reshape(-1, SLICE)
        slices = slice_maxima(some, vocab_size).topk(k + 1, dim=-1, sorted=False).indices
        first = torch.arange(0, len(parts), vocab_size // SLICE).unsqueeze(1)
        their = parts.index_select(0, (slices + first).flatten()).view(len(some), -1)
        values, places = their.topk(k + 1, dim=-1)
        ids = slices.gather(1, places // SLICE) * SLICE + places % SLICE
    else:
        values, ids = some[:, :vocab_size].topk(k + 1, dim=-1)
    if some is logits:
        values, ids = values[rows], ids[rows]
    # NaN is among the first where there is one, and greater than nothing.
    if not bool((values[:, :-1] > values[:, 1:]).all()) or float(values[:, 0].amax()) == float("inf"):
        return None
    return ids[:, :-1], values[:, :-1].float()


def slice_maxima(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The largest logit of each slice of the vocabulary; [N, V] -> [N, ceil(vocab_size / SLICE)]."""
    whole = vocab_size // SLICE * SLICE
    parts = [logits[:, :whole].unflatten(1, (-1, SLICE)).amax(-1)] if whole else []
    if whole < vocab_size:
        parts.append(logits[:, whole:vocab_size].amax(-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def largest(values: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of each row, in order; of equal ones the lower ids. (``topk`` breaks ties as it likes.)

    Args:
        values: [R, n] float32, no NaN.
        ids: [R, n] or [n] int64, below 2**31, distinct in a row.
        k: at most n.

    Returns:
        values [R, k], ids [R, k].
    """
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()  # integers that sort as the floats do
    places = (ordered * 2**32 - ids).topk(k, dim=-1).indices
    return values.gather(1, places), ids.expand_as(values).gather(1, places)
