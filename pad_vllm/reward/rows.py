"""What the reward engine is asked for in a step: rows of contexts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NewType

import numpy as np
import torch

from pad_vllm.reward.device import to_device
from pad_vllm.reward.pace import ALONE, Lengths

ContextSlot = NewType("ContextSlot", int)
"""A context's place in the reward engine: its row of the block table"""


@dataclass
class ContextRows:
    """A step of C contexts and R rows. Without drafts R = C; with drafts R >= C."""

    slots: np.ndarray
    """[C] int64: the contexts' slots, distinct"""
    num_tokens: Lengths
    """[C]: the context's length with this step's tokens, at most"""
    lengths: Lengths | None
    """[R]: each row's position + 1, if the host knows; it does not under speculative decoding"""
    row_slots: torch.Tensor
    """[R] int64, on the device: each row's slot; a context's rows are in the order of their positions. ``no_slot``:
    the row is to be left alone"""
    positions: torch.Tensor | None
    """[R] int64, on the device: position of the row's token in its context; None if the host knows it"""
    token_ids: torch.Tensor
    """[R] int32 or int64, on the device"""
    history: Callable[[ContextSlot], Sequence[int]]
    """Slot -> the context's generated tokens, up to that of its first row; none while that is the prompt's last.
    Called only for a context that must be computed; may synchronize with the device."""
    step: int = ALONE
    """Of :class:`~pad_vllm.reward.pace.Pace`"""
    is_full: torch.Tensor | None = None
    """[R] bool, on the device: rows behind the last position of their contexts, which are left alone; None: none is"""

    def within(self, max_len: int, no_slot: int) -> ContextRows:
        """These rows, those behind a context's last position left alone."""
        if self.lengths is None:
            lengths, is_full = None, self.device_positions() >= max_len
        else:
            tokens = self.lengths.array()
            lengths = Lengths(np.where(tokens > max_len, 1, tokens))
            is_full = to_device(tokens > max_len, self.row_slots.device, torch.bool)
        return replace(
            self,
            num_tokens=Lengths(self.num_tokens.array().clip(max=max_len)),
            lengths=lengths,
            row_slots=self.row_slots.where(~is_full, no_slot),
            positions=None if self.positions is None else self.positions.where(~is_full, 0),
            is_full=is_full,
            step=ALONE,
        )

    def advance(self, step: int, token_ids: torch.Tensor, history: Callable[[ContextSlot], Sequence[int]]) -> None:
        """Make of them the next step's rows, each a token further in its context; the host must know their lengths."""
        assert self.lengths is not None
        self.num_tokens.advance()
        self.lengths.advance()
        self.step, self.token_ids, self.history = step, token_ids, history

    def select(self, rows: slice | np.ndarray | torch.Tensor) -> ContextRows:
        """Some of the rows; by a tensor on the device where the host does not know their lengths."""
        on_device = to_device(rows, self.row_slots.device, torch.int64) if isinstance(rows, np.ndarray) else rows
        return replace(
            self,
            lengths=None if self.lengths is None else Lengths(self.lengths.array()[rows]),
            row_slots=self.row_slots[on_device],
            positions=None if self.positions is None else self.positions[on_device],
            token_ids=self.token_ids[on_device],
            step=ALONE,
        )

    def device_positions(self) -> torch.Tensor:
        """[R] int64, on the device."""
        if self.positions is not None:
            return self.positions
        assert self.lengths is not None
        return to_device(self.lengths.array() - 1, self.row_slots.device, torch.int64)
