"""What the guidance step reads of two tokenizers, on the device."""

from __future__ import annotations

import numpy as np
import torch

from pad_vllm.kernels import Groups
from pad_vllm.reward.device import to_device
from pad_vllm.reward.token_tables import NO_OPINION, TokenTables
from pad_vllm.worker.tokens import SharedTokens


def device_groups(tables: TokenTables, device: torch.device) -> Groups:
    """What the guidance step needs of the tables of two tokenizers: those of an answer's first token, where there are
    such, behind the others, with groups of their own."""
    key, members, starts = tables.key, tables.members, tables.member_starts
    if (first := tables.first) is not None:
        shifted = np.where(first.key >= 0, first.key + len(starts) - 1, first.key)
        key, members = np.concatenate([key, shifted]), np.concatenate([members, first.members])
        starts = np.concatenate([starts[:-1], first.member_starts + starts[-1]])
    return Groups(
        to_device(key, device, torch.int32),
        to_device(members, device, torch.int32),
        to_device(starts, device, torch.int32),
        int((starts[1:] - starts[:-1]).max()),
        any_silent=bool((tables.key == NO_OPINION).any()),
    )


def candidate_tables(
    tokens: SharedTokens, vocab_size: int, num_rows: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which tokens below ``vocab_size`` are no candidates, and which the reward model has no opinion of.

    Args:
        num_rows: of the reward model's output head.

    Returns:
        [n] int64 ids, and [vocab_size] bool where tokens are the same; None where there are none.
    """
    foreign = {i for i in tokens.no_candidates if i < vocab_size}
    if tokens.pair is None:
        foreign |= set(range(num_rows, vocab_size)) - tokens.no_opinion.keys()
    foreign_ids = to_device(sorted(foreign), device, torch.int64) if foreign else None
    if not tokens.no_opinion:
        return foreign_ids, None
    no_opinion = torch.zeros(vocab_size, dtype=torch.bool)
    no_opinion[list(tokens.no_opinion)] = True
    return foreign_ids, to_device(no_opinion, device, torch.bool)
