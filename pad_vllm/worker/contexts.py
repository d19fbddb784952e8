"""What guidance and drafting ask of the requests' contexts, whichever tokens the reward model has.

Two classes answer: :class:`~pad_vllm.worker.same_tokens.SameTokens`, where a context is the base model's own tokens
behind a preference, and :class:`~pad_vllm.worker.other_tokens.OtherTokens`, where each is some of another tokenizer's.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

from pad_vllm.worker.batch import GuidedBatch, RequestSlot
from pad_vllm.worker.slots import RowParams


class RewardPrompt(NamedTuple):
    """What the reward model reads of a request's prompt, before a preference is put into it."""

    ids: list[int]
    num_own: int
    """Of the tokens at which positions begin to count: a context's offset is what it has more."""
    begins_answer: bool = False
    """Whether the first generated token begins an answer in a chat."""
    is_misread: bool = False
    """Whether it begins as a chat, and is none that the template writes."""


class Contexts(Protocol):
    """Requests' contexts in the reward model, from step to step."""

    def read(self, prompt_ids: list[int]) -> RewardPrompt:
        """What the reward model reads for a prompt of the base model's tokens."""

    def own_ids(self, token_ids: list[int]) -> list[int]:
        """Composed tokens, each as the reward model has it."""

    def begin(self, slot: RequestSlot, prompt_len: int, prompt: RewardPrompt) -> None:
        """A request begins in a slot; ``prompt_len`` tokens of the base's prompt."""

    def hidden_states(self, batch: GuidedBatch, params: RowParams) -> torch.Tensor:
        """Compute a step's rows, and whatever is missing before them.

        Returns:
            [context rows, hidden_size], in the order of ``params.contexts``; NaN where a context is full: the request
            then gets its end token.
        """

    def key_offsets(self, batch: GuidedBatch) -> torch.Tensor | None:
        """[R] int64: where the keys of each row's candidates begin; None where all have the same."""

    def forget_drafts(self, slots: RequestSlot | np.ndarray) -> None:
        """What was drafted for requests is not what their next rows hold."""

    def begin_draft(self, batch: GuidedBatch, params: RowParams, num_drafts: int) -> Draft | None:
        """Begin to draft behind the last token of each request; ``batch`` has a row for each.

        Returns:
            None where the pool has no room for drafts: they would take their blocks from contexts that guidance needs.
        """

    def draftable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the reward model's logits [R, vocabulary], those of tokens that may be drafted, [R, W]; and the base's ids
        of these, [W] int64, or None where a column is its own id."""


class Draft(Protocol):
    """Some requests' contexts, a draft further each time."""

    def hidden_states(self) -> torch.Tensor:
        """[context rows, hidden_size] at the last token of each."""

    def extend(self, token_ids: torch.Tensor) -> None:
        """Put a token behind each request's last; [R] int64, the base's."""
