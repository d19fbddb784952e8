"""What the guidance step reads of two tokenizers, on the device."""

from __future__ import annotations

import numpy as np
import torch

from pad_vllm.kernels import Groups, SharedVocabulary, find_large
from pad_vllm.reward.device import to_device
from pad_vllm.reward.token_tables import NO_OPINION, TokenTables
from pad_vllm.worker.tokens import SharedTokens


def device_vocabulary(tokens: SharedTokens, vocab_size: int, device: torch.device) -> SharedVocabulary | Groups:
    """What the base's tokens below ``vocab_size`` are to the reward model, for the guidance step."""
    if tokens.pair is not None:
        return device_groups(tokens.pair.tables, vocab_size, device)
    if not tokens.no_opinion:
        return SharedVocabulary(vocab_size)
    no_opinion = torch.zeros(vocab_size, dtype=torch.bool)
    no_opinion[list(tokens.no_opinion)] = True
    return SharedVocabulary(vocab_size, to_device(no_opinion, device, torch.bool))


def device_groups(tables: TokenTables, vocab_size: int, device: torch.device) -> Groups:
    """The tables of two tokenizers: those of an answer's first token, where there are such, behind the others, with
    groups of their own."""
    key, members, starts = tables.key, tables.members, tables.member_starts
    if (first := tables.first) is not None:
        shifted = np.where(first.key >= 0, first.key + len(starts) - 1, first.key)
        key, members = np.concatenate([key, shifted]), np.concatenate([members, first.members])
        starts = np.concatenate([starts[:-1], first.member_starts + starts[-1]])
    device_starts = to_device(starts, device, torch.int32)
    return Groups(
        vocab_size,
        to_device(key, device, torch.int32),
        to_device(members, device, torch.int32),
        device_starts,
        int((starts[1:] - starts[:-1]).max()),
        find_large(device_starts),
        any_silent=bool((tables.key == NO_OPINION).any()),
    )


def foreign_candidates(
    tokens: SharedTokens, vocab_size: int, num_rows: int, device: torch.device
) -> torch.Tensor | None:
    """Which tokens below ``vocab_size`` are no candidates.

    Args:
        num_rows: of the reward model's output head.

    Returns:
        [n] int64 ids; None where there are none.
    """
    foreign = {i for i in tokens.no_candidates if i < vocab_size}
    if tokens.pair is None:
        foreign |= set(range(num_rows, vocab_size)) - tokens.no_opinion.keys()
    return to_device(sorted(foreign), device, torch.int64) if foreign else None
