"""Contexts that grow by several tokens a step: those of a reward model with another tokenizer.

What a base token is to the reward model, its pieces, is a static table (:mod:`pad_vllm.reward.token_tables`). So a
context is the translated prompt and the pieces of each generated token: nothing is tokenized again, nothing is taken
back. A step's rows are the pieces of the token that each request has seen last; the last of them gives the hidden
state.

Positions here are those in the generated text: 0 is the prompt's last token, i the i-th reward token after it. Where
the host knows the tokens (V1) it counts them, and a step has as many rows as there are pieces. On Model Runner V2 the
device does: each request has as many rows as the longest token has pieces, of which those that there are not stand
nowhere; how long a context is, the host learns a step or two later, and until then it assumes the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pad_vllm.params import MAX_CONTEXTS
from pad_vllm.reward.device import to_device
from pad_vllm.reward.engine import ContextRows, RewardEngine
from pad_vllm.reward.token_tables import TokenTables
from pad_vllm.worker.batch import GuidedBatch
from pad_vllm.worker.slots import RowParams


class Growth:
    """Counts the reward tokens of the requests in the slots, and lays out a step's rows.

    Args:
        tables: of the two tokenizers.
        engine: the reward engine.
        num_slots: the last one stands for no request.
        max_rows_per_request: with its drafts.
    """

    def __init__(self, tables: TokenTables, engine: RewardEngine, num_slots: int, max_rows_per_request: int) -> None:
        self.engine = engine
        self.max_len = engine.model.max_model_len
        device = engine.model.device
        self.vocab_size = len(tables.key)
        self.has_first = tables.first is not None
        """Whether an answer's first token c has pieces, and a key, of its own: those of c + ``vocab_size``"""
        self.pieces, self.starts = tables.pieces, tables.piece_starts
        if self.has_first:
            self.pieces = np.concatenate([tables.pieces, tables.first.pieces])
            self.starts = np.concatenate([tables.piece_starts[:-1], tables.first.piece_starts + len(tables.pieces)])
        self.num_pieces = np.diff(self.starts).astype(np.int64)
        self.max_pieces = int(self.num_pieces.max())
        self.device_pieces = to_device(self.pieces, device, torch.int32)
        self.piece_starts = to_device(self.starts, device, torch.int64)
        self.host_first = np.zeros(num_slots, np.int64)
        """[slots] what is added to the first generated token: ``vocab_size``, where it begins an answer"""
        self.first = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """[slots] likewise"""
        self.host_prompt_len = np.zeros(num_slots, np.int64)
        self.prompt_len = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.is_new = np.zeros(num_slots, bool)
        """[slots] begun, and in no step yet"""
        self.known = np.zeros((num_slots, 2), np.int64)
        """[slots, 2] so many generated tokens have so many reward tokens: those that the host knows of"""
        self.window = max_rows_per_request + 1
        self.totals = torch.zeros(num_slots, self.window, dtype=torch.int64, device=device)
        """[slots, window] reward tokens up to each of the last positions, by position modulo the window"""
        self.latest = torch.zeros(num_slots, 2, dtype=torch.int64, device=device)
        """[slots, 2] as ``known``, of the settled token of the last step"""
        self.news = News(self.latest)

    def begin(self, slot: int, prompt_len: int, begins_answer: bool) -> None:
        """A request begins in a slot; ``prompt_len`` of the base's prompt. ``begins_answer``: its first token begins an
        answer in a chat."""
        self.host_first[slot] = self.vocab_size if begins_answer and self.has_first else 0
        self.first[slot] = int(self.host_first[slot])
        self.host_prompt_len[slot] = prompt_len
        self.prompt_len[slot] = prompt_len
        self.is_new[slot] = True

    def hidden_states(self, batch: GuidedBatch, params: RowParams) -> torch.Tensor:
        """Compute a step's rows, and whatever is missing before them.

        Returns:
            [context rows, hidden_size], in the order of ``params.contexts``; NaN where a context is full: the request
            then gets its end token.
        """
        batch.settle()
        lay_out = self.rows_on_device if batch.last_ids is None else self._on_host
        rows, last, is_full = lay_out(batch, params)
        hidden_states = self.engine.step(rows)
        if last is not None:
            hidden_states = hidden_states[last]
        if is_full is not None:
            hidden_states = hidden_states.masked_fill(is_full.unsqueeze(1), float("nan"))
        return hidden_states

    def key_offsets(self, batch: GuidedBatch) -> torch.Tensor | None:
        """[R] int64: what is added to the candidates of each row, where some tokens have another key at the beginning
        of an answer; None where none has."""
        if not self.has_first:
            return None
        row_slots, slots = batch.layout.row_slots, batch.layout.slots
        are_past = batch.exact and bool((batch.num_tokens > self.host_prompt_len[slots]).all())
        if are_past or not self.host_first[slots].any():
            return torch.zeros_like(row_slots)
        is_first = batch.device_positions() + 1 == self.prompt_len[row_slots]
        return self.first[row_slots].where(is_first, 0)

    def _places(self, token_ids: Sequence[int], slot: int) -> np.ndarray:
        """[tokens] int64: where in the tables a request's generated tokens stand, all from the first."""
        places = np.clip(np.array(token_ids, np.int64), 0, self.vocab_size - 1)
        places[:1] += self.host_first[slot]
        return places

    def _total(self, token_ids: Sequence[int], slot: int) -> int:
        return int(self.num_pieces[self._places(token_ids, slot)].sum())

    def _history(self, batch: GuidedBatch, slot: int) -> list[int]:
        """Of :class:`ContextRows`."""
        slot //= MAX_CONTEXTS
        places = self._places(list(batch.output_ids(slot)), slot).tolist()
        ids = [int(u) for i in places[:-1] for u in self.pieces[self.starts[i] : self.starts[i + 1]]]
        return ids + [int(self.pieces[self.starts[i]]) for i in places[-1:]]

    def _on_host(
        self, batch: GuidedBatch, params: RowParams
    ) -> tuple[ContextRows, torch.Tensor | None, torch.Tensor | None]:
        """Rows of a batch whose tokens the host knows; which of them are the last of their contexts (None: all are);
        and which contexts are full (None: none is)."""
        slots, contexts = batch.layout.slots, params.contexts
        generated = batch.num_tokens - self.host_prompt_len[slots]
        last_ids = batch.last_ids.clip(0, self.vocab_size - 1) + np.where(generated == 1, self.host_first[slots], 0)
        n = np.where(generated > 0, self.num_pieces[last_ids], 0)
        num_known, totals = self.known[slots].T
        totals = totals + np.where(generated == num_known + 1, n, 0)
        is_irregular = self.is_new[slots] | (generated < num_known) | (generated > num_known + 1)
        for i in np.flatnonzero(is_irregular):
            slot = int(slots[i])
            totals[i] = self._total(list(batch.output_ids(slot))[: generated[i]], slot)
        self.known[slots, 0], self.known[slots, 1], self.is_new[slots] = generated, totals, False

        device = self.piece_starts.device
        requests = np.arange(len(slots)) if contexts.requests is None else contexts.requests
        ends = totals[requests] + contexts.host_offset
        counts = np.maximum(n, 1)[requests]
        owner = np.repeat(np.arange(len(requests)), counts)
        last = np.cumsum(counts) - 1
        back = last[owner] - np.arange(len(owner))
        piece = self.pieces[self.starts[last_ids[requests]][owner] + counts[owner] - 1 - back]
        positions = np.minimum(ends[owner] - back, self.max_len - 1)
        owner_, token_ids = to_device(np.stack([owner, piece]), device, torch.int64).unbind()
        in_prompt = totals[requests] == 0
        if in_prompt.any():
            # The prompt's last token, from which the base samples its first.
            is_last_prompt_id = to_device(in_prompt, device, torch.bool)[owner_]
            token_ids = torch.where(is_last_prompt_id, contexts.ints.last_prompt_id[owner_], token_ids)
        grows = len(owner) > len(requests)
        rows = ContextRows(
            slots=contexts.slots,
            num_tokens=np.minimum(ends + 1, self.max_len),
            lengths=positions + 1,
            row_slots=contexts.row_slots[owner_] if grows else contexts.row_slots,
            positions=None,
            token_ids=token_ids,
            history=lambda slot: self._history(batch, slot),
        )
        is_full = ends >= self.max_len
        return (
            rows,
            to_device(last, device, torch.int64) if grows else None,
            to_device(is_full, device, torch.bool) if is_full.any() else None,
        )

    def rows_on_device(
        self, batch: GuidedBatch, params: RowParams
    ) -> tuple[ContextRows, torch.Tensor | slice, torch.Tensor]:
        """As :meth:`_on_host`, of tokens that only the device knows; reads nothing back but of new requests.

        The last rows of contexts are given as places, or all alike.
        """
        for slot in batch.layout.slots[self.is_new[batch.layout.slots]].tolist():
            self._count_new(slot, batch.output_ids(slot))
        row_slots, contexts, width = batch.layout.row_slots, params.contexts, self.max_pieces
        tokens, base_positions = batch.token_ids.clamp(0, self.vocab_size - 1).long(), batch.device_positions()
        if self.has_first:
            tokens = tokens + self.first[row_slots].where(base_positions == self.prompt_len[row_slots], 0)
        starts = self.piece_starts[tokens]
        n = (self.piece_starts[tokens + 1] - starts).where(base_positions >= self.prompt_len[row_slots], 0)
        totals = self._count(batch, base_positions, n)
        offset, last_prompt_id = contexts.ints.offset, contexts.ints.last_prompt_id
        if contexts.rows is not None:
            n, totals, starts = n[contexts.rows], totals[contexts.rows], starts[contexts.rows]
        # Right-aligned: the last of a context's rows is always there.
        back = torch.arange(width - 1, -1, -1, device=n.device)
        is_there = (back < n.clamp(min=1).unsqueeze(1)) & (contexts.row_slots != self.engine.no_slot).unsqueeze(1)
        ends = totals + offset
        positions = (ends.unsqueeze(1) - back).clamp(0, self.max_len - 1).where(is_there, 0)
        token_ids = self.device_pieces[((starts + n - 1).unsqueeze(1) - back).clamp(min=0)]
        token_ids = torch.where(totals.unsqueeze(1) > 0, token_ids, last_prompt_id.unsqueeze(1))
        rows = ContextRows(
            slots=contexts.slots,
            num_tokens=self._bounds(batch, params),
            lengths=None,
            row_slots=contexts.row_slots.unsqueeze(1).where(is_there, self.engine.no_slot).flatten(),
            positions=positions.flatten(),
            token_ids=token_ids.flatten(),
            history=lambda slot: self._history(batch, slot),
        )
        return rows, slice(width - 1, None, width), ends >= self.max_len

    def _count_new(self, slot: int, generated: list[int]) -> None:
        before = len(generated) - 1
        total = self._total(generated[:-1], slot)
        self.totals[slot] = total
        self.known[slot] = max(before, 0), total
        self.news.forget(slot)
        self.is_new[slot] = False

    def _count(self, batch: GuidedBatch, positions: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """[R] reward tokens up to each row's token, of which it has ``n`` itself."""
        row_slots = batch.layout.row_slots
        first, within = positions, 0
        settled = row_slots
        if batch.local_positions is not None:  # a request's rows follow each other
            local = batch.local_positions
            first = positions - local
            sums = n.cumsum(0) - n
            place = torch.arange(len(n), device=n.device)
            within = sums - sums[(place - local).clamp(min=0)]
            settled = row_slots.where(local == 0, len(self.host_prompt_len) - 1)
        totals = self.totals[row_slots, (first - 1) % self.window] + within + n
        self.totals[row_slots, positions % self.window] = totals
        generated = positions - self.prompt_len[row_slots] + 1
        self.latest[settled] = torch.stack([generated, totals], 1)
        return totals

    def _bounds(self, batch: GuidedBatch, params: RowParams) -> np.ndarray:
        """[contexts] int64: how long each may be."""
        slots, contexts = batch.layout.slots, params.contexts
        self.news.read_into(self.known)
        self.news.ask()
        generated, totals = self.known[slots].T
        unknown = batch.num_tokens - self.host_prompt_len[slots] - generated
        most = 1 + totals + np.maximum(unknown, 0) * self.max_pieces
        requests = slice(None) if contexts.requests is None else contexts.requests
        return np.minimum(most[requests] + contexts.host_offset, self.max_len)


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
        self._is_true = np.zeros(len(self.source), bool)
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
