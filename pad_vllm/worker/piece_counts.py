"""What a base token is to a reward model with another tokenizer, and how many of its tokens each request has.

Positions are those in the generated text: 0 is the prompt's last token, i the i-th reward token after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pad_vllm.reward.device import to_device
from pad_vllm.reward.token_tables import TokenTables
from pad_vllm.worker.batch import RequestSlot


class PieceTable:
    """The pieces of each base token, on the host and on the device. Where an answer's first token c has others, these
    are at c + ``vocab_size``."""

    def __init__(self, tables: TokenTables, device: torch.device) -> None:
        self.vocab_size = len(tables.key)
        self.has_first = tables.first is not None
        self.pieces, self.starts = tables.pieces, tables.piece_starts
        if tables.first is not None:
            self.pieces = np.concatenate([tables.pieces, tables.first.pieces])
            self.starts = np.concatenate([tables.piece_starts[:-1], tables.first.piece_starts + len(tables.pieces)])
        self.num_pieces = np.diff(self.starts).astype(np.int64)
        self.max_pieces = int(self.num_pieces.max())
        self.device_pieces = to_device(self.pieces, device, torch.int32)
        self.device_starts = to_device(self.starts, device, torch.int64)

    def places(self, token_ids: Sequence[int], first: int) -> np.ndarray:
        """[tokens] int64: where a request's generated tokens stand, all from the first, to which ``first`` is added."""
        places = np.clip(np.array(token_ids, np.int64), 0, self.vocab_size - 1)
        places[:1] += first
        return places

    def total(self, token_ids: Sequence[int], first: int) -> int:
        """Pieces of a request's generated tokens."""
        return int(self.num_pieces[self.places(token_ids, first)].sum())

    def history(self, token_ids: Sequence[int], first: int) -> list[int]:
        """Pieces of all but the last, and the first of the last."""
        places = self.places(token_ids, first).tolist()
        ids = [int(u) for i in places[:-1] for u in self.pieces[self.starts[i] : self.starts[i + 1]]]
        return ids + [int(self.pieces[self.starts[i]]) for i in places[-1:]]


class PieceCounts:
    """Counts the reward tokens of the requests in the slots: on the host, or, where only the device knows the tokens,
    there; the host then learns them a step or two later.

    Args:
        table: of the two tokenizers.
        num_slots: the last one stands for no request.
        max_rows_per_request: with its drafts.
    """

    def __init__(self, table: PieceTable, num_slots: int, max_rows_per_request: int, device: torch.device) -> None:
        self.table = table
        self.host_first: np.ndarray = np.zeros(num_slots, np.int64)
        """[slots] what is added to the first generated token: ``vocab_size``, where it begins an answer"""
        self.first = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """[slots] likewise"""
        self.host_prompt_len: np.ndarray = np.zeros(num_slots, np.int64)
        self.prompt_len = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.is_new: np.ndarray = np.zeros(num_slots, bool)
        """[slots] begun, and in no step yet"""
        self.known: np.ndarray = np.zeros((num_slots, 2), np.int64)
        """[slots, 2] generated tokens of each request, and their reward tokens, as far as the host knows them"""
        self.window = max_rows_per_request + 1
        self.totals = torch.zeros(num_slots, self.window, dtype=torch.int64, device=device)
        """[slots, window] reward tokens up to each of the last positions, by position modulo the window"""
        self.latest = torch.zeros(num_slots, 2, dtype=torch.int64, device=device)
        """[slots, 2] as ``known``, of the settled token of the last step"""
        self.news = News(self.latest)

    def begin(self, slot: RequestSlot, prompt_len: int, begins_answer: bool) -> None:
        """A request begins in a slot; ``prompt_len`` of the base's prompt. ``begins_answer``: its first token begins an
        answer in a chat."""
        self.host_first[slot] = self.table.vocab_size if begins_answer and self.table.has_first else 0
        self.first[slot] = int(self.host_first[slot])
        self.host_prompt_len[slot] = prompt_len
        self.prompt_len[slot] = prompt_len
        self.is_new[slot] = True

    def count_on_host(
        self,
        slots: np.ndarray,
        generated: np.ndarray,
        n: np.ndarray,
        output_ids: Callable[[RequestSlot], Sequence[int]],
    ) -> np.ndarray:
        """Count this step's tokens.

        Args:
            slots: [C] int64.
            generated: [C] int64, tokens of each.
            n: [C] int64, reward tokens of the last one.
            output_ids: slot -> all of them.

        Returns:
            [C] int64: reward tokens of each.
        """
        num_known, totals = self.known[slots].T
        totals = totals + np.where(generated == num_known + 1, n, 0)
        is_irregular = self.is_new[slots] | (generated < num_known) | (generated > num_known + 1)
        for i in np.flatnonzero(is_irregular):
            slot = RequestSlot(int(slots[i]))
            totals[i] = self.table.total(list(output_ids(slot))[: generated[i]], int(self.host_first[slot]))
        self.known[slots, 0], self.known[slots, 1], self.is_new[slots] = generated, totals, False
        return totals

    def begin_on_device(self, slot: RequestSlot, generated: Sequence[int]) -> None:
        """A request is in its first step, with these tokens."""
        before = len(generated) - 1
        total = self.table.total(generated[:-1], int(self.host_first[slot]))
        self.totals[slot] = total
        self.known[slot] = max(before, 0), total
        self.news.forget(slot)
        self.is_new[slot] = False

    def count_on_device(
        self, row_slots: torch.Tensor, positions: torch.Tensor, n: torch.Tensor, local_positions: torch.Tensor | None
    ) -> torch.Tensor:
        """Count this step's tokens.

        Args:
            row_slots, positions: [R] int64.
            n: [R] int64, reward tokens of each row's token.
            local_positions: [R] int64: how many of its request's drafts a row sees; None where there are none.

        Returns:
            [R] int64: reward tokens up to each row's token.
        """
        first, within, settled = positions, 0, row_slots
        if local_positions is not None:  # a request's rows follow each other
            first = positions - local_positions
            sums = n.cumsum(0) - n
            place = torch.arange(len(n), device=n.device)
            within = sums - sums[(place - local_positions).clamp(min=0)]
            settled = row_slots.where(local_positions == 0, len(self.host_prompt_len) - 1)
        totals = self.totals[row_slots, (first - 1) % self.window] + within + n
        self.totals[row_slots, positions % self.window] = totals
        generated = positions - self.prompt_len[row_slots] + 1
        self.latest[settled] = torch.stack([generated, totals], 1)
        return totals

    def bounds(self, slots: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
        """[C] int64: how many reward tokens each may have, of ``num_tokens`` [C] int64 of the base's at most."""
        self.news.read_into(self.known)
        self.news.ask()
        generated, totals = self.known[slots].T
        unknown = num_tokens - self.host_prompt_len[slots] - generated
        return totals + np.maximum(unknown, 0) * self.table.max_pieces


@dataclass(eq=False)
class News:
    """Copies of a small tensor on their way to the host, one at a time, which nobody waits for."""

    source: torch.Tensor
    """[slots, 2]"""

    def __post_init__(self) -> None:
        on_gpu = self.source.is_cuda
        self._copy = torch.empty(self.source.shape, dtype=self.source.dtype, pin_memory=on_gpu)
        self._values = self._copy.numpy()  # the same memory
        self._arrived = torch.cuda.Event() if on_gpu else None
        self._asked = False
        self._is_true: np.ndarray = np.zeros(len(self.source), bool)
        """[slots] whether the copy is of the slot's request"""

    def forget(self, slot: int) -> None:
        """A slot has another request."""
        self._is_true[slot] = False

    def ask(self) -> None:
        """Begin to copy, behind what the stream was already told to do, unless a copy is on its way."""
        if not self._asked:
            self._copy.copy_(self.source, non_blocking=self._arrived is not None)
            if self._arrived is not None:
                self._arrived.record()
            self._asked = True
            self._is_true[:] = True

    def read_into(self, known: np.ndarray) -> None:
        """Take what has arrived."""
        if self._asked and (self._arrived is None or self._arrived.query()):
            known[self._is_true] = self._values[self._is_true]
            self._asked = False
