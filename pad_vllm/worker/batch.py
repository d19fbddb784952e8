"""The guided rows of one step, as the runners' adapters hand them to guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NewType

import numpy as np
import torch

from pad_vllm.kernels import OutputTokens
from pad_vllm.params import MAX_CONTEXTS
from pad_vllm.reward.device import to_device
from pad_vllm.reward.pace import ALONE, Lengths
from pad_vllm.reward.rows import ContextSlot

RequestSlot = NewType("RequestSlot", int)
"""A request's place in the engine. Its contexts have places of their own in the reward engine: MAX_CONTEXTS each."""


def context_slots(slot: RequestSlot) -> range:
    """Those of a request's contexts, as many as it may have."""
    return range(slot * MAX_CONTEXTS, (slot + 1) * MAX_CONTEXTS)


def request_of(slot: ContextSlot) -> RequestSlot:
    """Whose context it is."""
    return RequestSlot(slot // MAX_CONTEXTS)


@dataclass(eq=False)
class Layout:
    """Which requests are guided, and in which rows of the logits. The same object from step to step as long as that is
    the same: what follows from it is then not computed again."""

    slots: np.ndarray
    """[C] int64, distinct"""
    logits_rows: torch.Tensor
    """[R] int64, on the device: which rows of the logits, distinct"""
    row_slots: torch.Tensor
    """[R] int64, on the device: each row's slot; ``Guidance.no_slot`` for a row that is to be left alone"""
    last_rows: torch.Tensor | None = None
    """[C] int64, on the device: the row of each request's last draft. None unless each request has as many drafts as
    there may be, and all its rows stand together"""


@dataclass
class GuidedBatch:
    """The guided rows of one step of the engine: C requests, each in its slot, and R rows of logits.

    Without drafts R = C, in the same order. Under speculative decoding a request has a row for each token that is
    being verified, and how many that is may be known on the device only.
    """

    layout: Layout
    num_tokens: Lengths
    """[C]: the request's tokens, this step's drafts included; an upper bound unless ``exact``"""
    exact: bool
    """Whether each request has one row, which sees ``num_tokens`` tokens."""
    positions: torch.Tensor | None
    """[R] int64, on the device: position of the row's last visible token in its request; None only if ``exact``, where
    it is ``num_tokens - 1``"""
    token_ids: torch.Tensor
    """[R] int32 or int64, on the device: that token"""
    output_ids: Callable[[RequestSlot], Sequence[int]]
    """Slot -> the request's generated tokens that are settled: no drafts. May synchronize; called only when the reward
    model has to read them again."""
    output_tokens: Callable[[], OutputTokens] | None = None
    """The generated tokens that the rows see, on the device; called only when one of the requests has penalties."""
    local_positions: torch.Tensor | None = None
    """[R] int64, on the device: how many of its request's drafts a row sees; None where there are no drafts"""
    last_ids: np.ndarray | None = None
    """[R] int64: ``token_ids``, where the host knows them"""
    logits_positions: torch.Tensor | None = None
    """[N] int64, on the device: positions of all rows of the logits, where the runner has them so"""
    step: int = ALONE
    """Of :class:`~pad_vllm.reward.pace.Pace`"""

    def device_positions(self) -> torch.Tensor:
        """[R] int64, on the device."""
        if self.positions is not None:
            return self.positions
        return to_device(self.num_tokens.array() - 1, self.token_ids.device, torch.int64)
