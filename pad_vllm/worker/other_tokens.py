"""Contexts of a reward model with another tokenizer: they grow by several tokens a step.

What a base token is to the reward model, its pieces, is a static table (:mod:`pad_vllm.reward.token_tables`). So a
context is the translated prompt and the pieces of each generated token: nothing is tokenized again, nothing is taken
back. A step's rows are the pieces of the token that each request has seen last; the last of them gives the hidden
state.

Where the host knows the tokens (V1) it counts their pieces, and a step has as many rows as there are. On Model Runner
V2 the device does: each request has as many rows as the longest token has pieces, and those that there are not stand
nowhere; how long a context is, the host learns a step or two later, and until then it assumes the most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from pad_vllm.reward.device import to_device
from pad_vllm.reward.engine import RewardEngine
from pad_vllm.reward.pace import Lengths
from pad_vllm.reward.rows import ContextRows, ContextSlot
from pad_vllm.reward.token_tables import NO_KEY, TokenTables
from pad_vllm.worker.batch import GuidedBatch, RequestSlot, request_of
from pad_vllm.worker.contexts import RewardPrompt
from pad_vllm.worker.piece_counts import PieceCounts, PieceTable
from pad_vllm.worker.slots import RowParams
from pad_vllm.worker.tokens import TokenizerPair


class OtherTokens:
    """:class:`~pad_vllm.worker.contexts.Contexts` in another tokenizer's tokens.

    Args:
        pair: the two tokenizers.
        engine: runs the reward model.
        num_slots: the last one stands for no request.
        max_rows_per_request: with its drafts.
        drafts: whether the reward model makes these.
    """

    def __init__(
        self, pair: TokenizerPair, engine: RewardEngine, num_slots: int, max_rows_per_request: int, drafts: bool
    ) -> None:
        device = engine.model.device
        self.engine, self.max_len = engine, engine.model.max_model_len
        self.translator = pair.translator
        self.table = PieceTable(pair.tables, device)
        self.counts = PieceCounts(self.table, num_slots, max_rows_per_request, device)
        self.whole = WholeTokens(pair.tables, device) if drafts else None

    def read(self, prompt_ids: list[int]) -> RewardPrompt:
        ids, begins_answer, is_misread = self.translator.read(prompt_ids)
        return RewardPrompt(ids, 1, begins_answer, is_misread)

    def own_ids(self, token_ids: list[int]) -> list[int]:
        return token_ids

    def begin(self, slot: RequestSlot, prompt_len: int, prompt: RewardPrompt) -> None:
        self.counts.begin(slot, prompt_len, prompt.begins_answer)

    def hidden_states(self, batch: GuidedBatch, params: RowParams) -> torch.Tensor:
        lay_out = self._on_device if batch.last_ids is None else self._on_host
        rows, last, is_full = lay_out(batch, params)
        hidden_states = self.engine.step(rows)
        if last is not None:
            hidden_states = hidden_states[last]
        if is_full is not None:
            hidden_states = hidden_states.masked_fill(is_full.unsqueeze(1), float("nan"))
        return hidden_states

    def key_offsets(self, batch: GuidedBatch) -> torch.Tensor | None:
        if not self.table.has_first:
            return None
        counts, row_slots, slots = self.counts, batch.layout.row_slots, batch.layout.slots
        are_past = batch.exact and bool((batch.num_tokens.array() > counts.host_prompt_len[slots]).all())
        if are_past or not counts.host_first[slots].any():
            return torch.zeros_like(row_slots)
        is_first = batch.device_positions() + 1 == counts.prompt_len[row_slots]
        return counts.first[row_slots].where(is_first, 0)

    def forget_drafts(self, slots: RequestSlot | np.ndarray) -> None:
        """Nothing of them is kept: a token's rows are computed again."""

    def begin_draft(self, batch: GuidedBatch, params: RowParams, num_drafts: int) -> OtherTokensDraft | None:
        rows, last, _ = self._on_device(batch, params)
        num_tokens = np.minimum(rows.num_tokens.array() + num_drafts, self.max_len)
        if not self.engine.blocks.has_room(rows.slots, num_tokens):
            return None
        rows.num_tokens = Lengths(num_tokens)
        assert self.whole is not None  # there is a drafter
        return OtherTokensDraft(self, self.whole, rows, last, params.contexts.layout_rows)

    def draftable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.whole is not None  # there is a drafter
        return logits[:, self.whole.columns], self.whole.base_ids

    def _history(self, batch: GuidedBatch) -> Callable[[ContextSlot], Sequence[int]]:
        def history(slot: ContextSlot) -> Sequence[int]:
            request = request_of(slot)
            return self.table.history(list(batch.output_ids(request)), int(self.counts.host_first[request]))

        return history

    def _on_host(
        self, batch: GuidedBatch, params: RowParams
    ) -> tuple[ContextRows, torch.Tensor | None, torch.Tensor | None]:
        """Rows of a batch whose tokens the host knows; which of them are the last of their contexts (None: all are);
        and which contexts are full (None: none is)."""
        assert batch.last_ids is not None
        slots, contexts, table = batch.layout.slots, params.contexts, self.table
        generated = batch.num_tokens.array() - self.counts.host_prompt_len[slots]
        first = np.where(generated == 1, self.counts.host_first[slots], 0)
        last_ids = batch.last_ids.clip(0, table.vocab_size - 1) + first
        n = np.where(generated > 0, table.num_pieces[last_ids], 0)
        totals = self.counts.count_on_host(slots, generated, n, batch.output_ids)

        device = self.engine.model.device
        requests = np.arange(len(slots)) if contexts.requests is None else contexts.requests
        ends = totals[requests] + contexts.host_offset
        num_rows = np.maximum(n, 1)[requests]
        owner: np.ndarray = np.repeat(np.arange(len(requests)), num_rows)
        last = np.cumsum(num_rows) - 1
        back = last[owner] - np.arange(len(owner))
        piece = table.pieces[table.starts[last_ids[requests]][owner] + num_rows[owner] - 1 - back]
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
            num_tokens=Lengths(np.minimum(ends + 1, self.max_len)),
            lengths=Lengths(positions + 1),
            row_slots=contexts.row_slots[owner_] if grows else contexts.row_slots,
            positions=None,
            token_ids=token_ids,
            history=self._history(batch),
        )
        is_full = ends >= self.max_len
        return (
            rows,
            to_device(last, device, torch.int64) if grows else None,
            to_device(is_full, device, torch.bool) if is_full.any() else None,
        )

    def _on_device(
        self, batch: GuidedBatch, params: RowParams
    ) -> tuple[ContextRows, torch.Tensor | slice, torch.Tensor]:
        """As :meth:`_on_host`, of tokens that only the device knows; reads nothing back but of new requests.

        The last rows of contexts are given as places, or all alike.
        """
        counts, table, slots = self.counts, self.table, batch.layout.slots
        for slot in slots[counts.is_new[slots]].tolist():
            counts.begin_on_device(slot, batch.output_ids(slot))
        row_slots, contexts, width = batch.layout.row_slots, params.contexts, table.max_pieces
        tokens, base_positions = batch.token_ids.clamp(0, table.vocab_size - 1).long(), batch.device_positions()
        prompt_len = counts.prompt_len[row_slots]
        if table.has_first:
            tokens = tokens + counts.first[row_slots].where(base_positions == prompt_len, 0)
        starts = table.device_starts[tokens]
        n = (table.device_starts[tokens + 1] - starts).where(base_positions >= prompt_len, 0)
        totals = counts.count_on_device(row_slots, base_positions, n, batch.local_positions)
        offset, last_prompt_id = contexts.ints.offset, contexts.ints.last_prompt_id
        if contexts.layout_rows is not None:
            n, totals, starts = n[contexts.layout_rows], totals[contexts.layout_rows], starts[contexts.layout_rows]
        # Right-aligned: the last of a context's rows is always there.
        back = torch.arange(width - 1, -1, -1, device=n.device)
        is_there = (back < n.clamp(min=1).unsqueeze(1)) & (contexts.row_slots != self.engine.no_slot).unsqueeze(1)
        ends = totals + offset
        positions = (ends.unsqueeze(1) - back).clamp(0, self.max_len - 1).where(is_there, 0)
        token_ids = table.device_pieces[((starts + n - 1).unsqueeze(1) - back).clamp(min=0)]
        token_ids = torch.where(totals.unsqueeze(1) > 0, token_ids, last_prompt_id.unsqueeze(1))
        most: np.ndarray = 1 + counts.bounds(slots, batch.num_tokens.array())
        requests = slice(None) if contexts.requests is None else contexts.requests
        rows = ContextRows(
            slots=contexts.slots,
            num_tokens=Lengths(np.minimum(most[requests] + contexts.host_offset, self.max_len)),
            lengths=None,
            row_slots=contexts.row_slots.unsqueeze(1).where(is_there, self.engine.no_slot).flatten(),
            positions=positions.flatten(),
            token_ids=token_ids.flatten(),
            history=self._history(batch),
        )
        return rows, slice(width - 1, None, width), ends >= self.max_len


class WholeTokens:
    """The base tokens that are one token of the reward model's: those that it drafts, nearly all of a text."""

    def __init__(self, tables: TokenTables, device: torch.device) -> None:
        whole = tables.whole_tokens()
        columns = np.flatnonzero(whole != NO_KEY)
        self.columns = to_device(columns, device, torch.int64)
        """[W] int64: the reward tokens that are one"""
        self.base_ids = to_device(whole[columns], device, torch.int64)
        """[W] int64: the base's ids of these"""
        reward_ids: np.ndarray = np.zeros(len(tables.key), np.int64)
        reward_ids[whole[columns]] = columns
        self.reward_ids = to_device(reward_ids, device, torch.int64)
        """[base tokens] int64: what the reward model reads for one of these; anything for others"""


class OtherTokensDraft:
    """:class:`~pad_vllm.worker.contexts.Draft` in another tokenizer's tokens.

    Args:
        rows: pieces of the requests' last tokens; their ``num_tokens`` those with all drafts.
        last: which of these are the last of their contexts.
        layout_rows: [context rows] int64, the layout's row of each; None: one for each.
    """

    def __init__(
        self,
        contexts: OtherTokens,
        whole: WholeTokens,
        rows: ContextRows,
        last: torch.Tensor | slice,
        layout_rows: torch.Tensor | None,
    ) -> None:
        self.contexts, self.whole, self.rows, self.layout_rows = contexts, whole, rows, layout_rows
        self.last: torch.Tensor | slice | None = last

    def hidden_states(self) -> torch.Tensor:
        hidden_states = self.contexts.engine.step(self.rows)
        if self.last is not None:  # drafts are one piece each
            hidden_states, self.rows, self.last = hidden_states[self.last], self.rows.select(self.last), None
        return hidden_states

    def extend(self, token_ids: torch.Tensor) -> None:
        token_ids = self.whole.reward_ids[token_ids]
        self.rows = replace(
            self.rows,
            positions=(self.rows.device_positions() + 1).clamp(max=self.contexts.max_len - 1),
            token_ids=token_ids if self.layout_rows is None else token_ids[self.layout_rows],
        )
