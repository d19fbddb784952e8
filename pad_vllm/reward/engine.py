"""The reward engine: brings contexts up to date and gives the hidden state at rows of a step.

A row is one token of a context whose hidden state is wanted: the last token of a sequence, or, under speculative
decoding, each of the tokens that are being verified. Rows live on the device and run as sequences of one token, so
a step in which every context is up to date reads nothing back and needs nothing from the host but its size. Draft
tokens that are rejected leave no trace: the next step writes over their keys and values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from pad_vllm.reward.adapters import NO_ADAPTER, ContextAdapters
from pad_vllm.reward.block_manager import BlockManager, Context
from pad_vllm.reward.decode import Decoder
from pad_vllm.reward.device import clear_blocks, copy_blocks, to_device
from pad_vllm.reward.pace import Lengths
from pad_vllm.reward.paged_model import ForwardBatch, PagedModel
from pad_vllm.reward.rows import ContextRows, ContextSlot


@dataclass
class Piece:
    """Tokens of a context to be computed; their hidden states are not wanted."""

    slot: ContextSlot
    start: int
    token_ids: Sequence[int]


@dataclass
class EngineStats:
    """Counters since the start."""

    num_forwards: int = 0
    num_tokens: int = 0
    """computed, rows and pieces"""
    num_recomputed_tokens: int = 0
    """of these, tokens of contexts that had them computed before"""


class RewardEngine:
    """Advances contexts through a :class:`PagedModel`.

    Args:
        model: the reward model.
        max_num_batched_tokens: most tokens in one forward.
        max_num_contexts: contexts at one time.
        max_num_rows: most rows of a step; what is more goes another way, and slower.
    """

    def __init__(
        self, model: PagedModel, max_num_batched_tokens: int, max_num_contexts: int, max_num_rows: int
    ) -> None:
        self.model = model
        self.max_num_batched_tokens = max_num_batched_tokens
        self.blocks = BlockManager(
            model.num_blocks, model.block_size, max_num_contexts, model.max_num_blocks, model.device
        )
        self.adapters = ContextAdapters(model.adapters, max_num_contexts, model.device)
        self.decoder = Decoder(model, self.blocks, min(max_num_rows, max_num_batched_tokens), self.adapters)
        self.no_slot = max_num_contexts
        self.stats = EngineStats()

    def add(
        self,
        slot: ContextSlot,
        prompt_ids: list[int],
        shared: Sequence[int] = (),
        cache_salt: str | None = None,
        adapter: int = NO_ADAPTER,
    ) -> Context:
        """Begin a context at ``slot``, which must be free; ``adapter``: its number. The rest is
        :meth:`~pad_vllm.reward.block_manager.BlockManager.add`'s."""
        return self.blocks.add(slot, prompt_ids, shared, self.adapters.begin(slot, adapter, cache_salt))

    def step(self, rows: ContextRows) -> torch.Tensor:
        """Compute rows, and whatever of their contexts is missing before them.

        Returns:
            [R, hidden_size] hidden states, in the model's dtype.

        Raises:
            Exception: whatever the model's forward raises; everything computed is forgotten then.
        """
        try:
            return self._step(rows)
        except Exception:
            self.blocks.reset()
            raise

    def give_blocks(self, slots: np.ndarray, num_tokens: np.ndarray) -> None:
        """Give contexts the blocks of their first tokens, for which ``BlockManager.has_room``; nothing is computed.

        Args:
            slots: [C] int64, distinct.
            num_tokens: [C] int64, how many of each context.
        """
        self.blocks.begin_step()
        if not self.blocks.ready(slots, Lengths(num_tokens)):
            admitted, cold = self.blocks.admit(slots.tolist(), num_tokens.tolist())
            assert admitted == len(slots)
            assert not cold
            self._clear_new_blocks()

    def _step(self, rows: ContextRows) -> torch.Tensor:
        self.blocks.begin_step()
        is_ready = self.blocks.ready(rows.slots, rows.num_tokens, rows.step)
        if is_ready and rows.row_slots.shape[0] <= self.decoder.max_num_rows:
            return self._forward([], rows)
        hidden_states: torch.Tensor | None = None
        row_slots: np.ndarray | None = None
        line, num_tokens = rows.slots.tolist(), rows.num_tokens.array().tolist()
        while line:
            # A pool too short for all contexts makes several groups of them, which take blocks from each other.
            admitted, cold = self.blocks.admit(line, num_tokens)
            assert admitted, "the pool holds at least one whole context"
            pieces = [self._missing(context, num_computed, rows) for context, num_computed in cold]
            if self.blocks.copies:
                pieces = self._copy(pieces, rows)
            else:
                self._clear_new_blocks()
            if admitted == len(rows.slots):
                return self._compute(pieces, rows)
            if row_slots is None:
                row_slots = rows.row_slots.cpu().numpy()
            mine = np.flatnonzero(np.isin(row_slots, line[:admitted]))
            output = self._compute(pieces, rows.select(mine))
            if hidden_states is None:
                hidden_states = output.new_zeros(len(row_slots), output.shape[-1])
            hidden_states[to_device(mine, output.device, torch.int64)] = output
            del line[:admitted], num_tokens[:admitted]
        return hidden_states

    def _copy(self, pieces: list[Piece], rows: ContextRows) -> list[Piece]:
        """Copy the blocks that contexts begin with, and return the pieces still to be computed. Where the source of a
        block is a piece of this step, those up to it are computed first."""
        copies = {copy.target.slot: copy for copy in self.blocks.take_copies()}
        coming = {piece.slot for piece in pieces}
        held = [copy for copy in copies.values() if copy.source.slot not in coming]
        copy_blocks(
            self.model.kv_caches.values(), [(copy.source_block, copy.block) for copy in held]
        )  # before anything is written
        self._clear_new_blocks(but={copy.block for copy in copies.values()})
        now: dict[int, Piece] = {}
        pairs: list[tuple[int, int]] = []
        for piece in pieces:
            copy = copies.get(piece.slot)
            if copy is not None and copy.source.slot in coming:
                if copy.source.slot in now:
                    copy_blocks(self.model.kv_caches.values(), pairs)
                    self._compute_pieces(list(now.values()), rows)
                    now, pairs = {}, []
                pairs.append((copy.source_block, copy.block))
            now[piece.slot] = piece
        copy_blocks(self.model.kv_caches.values(), pairs)
        return list(now.values())

    def _clear_new_blocks(self, but: Collection[int] = ()) -> None:
        """Where attention reads on behind a sequence, take away what others left there; ``but`` are copied into."""
        new_blocks = self.blocks.take_new_blocks()
        if self.model.attends_behind_end:
            clear_blocks(self.model.kv_caches.values(), [block for block in new_blocks if block not in but])

    def _missing(self, context: Context, num_computed: int, rows: ContextRows) -> Piece:
        """What must be computed of a context before its first row."""
        prompt_ids, generated = context.prompt_ids, rows.history(context.slot)
        num_before = len(prompt_ids) + len(generated) - 1
        token_ids = prompt_ids[num_computed:num_before]
        num_new = 0 if context.was_computed else len(token_ids)
        context.was_computed = True
        if generated:
            token_ids = [*token_ids, *generated[max(num_computed - len(prompt_ids), 0) : -1]]
        # What a full context's request generates, with ignore_eos, has no place there.
        token_ids = token_ids[: max(self.model.max_model_len - num_computed, 0)]
        self.stats.num_recomputed_tokens += max(len(token_ids) - num_new, 0)
        return Piece(context.slot, num_computed, token_ids)

    def _compute(self, pieces: list[Piece], rows: ContextRows) -> torch.Tensor:
        """Compute pieces, then rows, in forwards of at most ``max_num_batched_tokens``; the last pieces and the first
        rows share one."""
        budget, num_rows = self.max_num_batched_tokens, rows.row_slots.shape[0]
        pieces = self._compute_pieces(pieces, rows, leave=budget - num_rows)
        if num_rows <= budget:
            return self._forward(pieces, rows)
        outputs = [
            self._forward(pieces if first == 0 else [], rows.select(slice(first, first + budget))).clone()
            for first in range(0, num_rows, budget)
        ]
        return torch.cat(outputs)

    def _compute_pieces(self, pieces: list[Piece], rows: ContextRows, leave: int = 0) -> list[Piece]:
        """Compute pieces until no more than ``leave`` tokens of them are left, and return these."""
        pieces = [piece for piece in pieces if len(piece.token_ids)]
        while pieces and sum(len(piece.token_ids) for piece in pieces) > leave:
            now, pieces = split(pieces, self.max_num_batched_tokens)
            self._forward(now, rows.select(slice(0)))
        return pieces

    def _forward(self, pieces: list[Piece], rows: ContextRows) -> torch.Tensor:
        """One forward; returns the hidden states of its rows."""
        num_rows = rows.row_slots.shape[0]
        self.stats.num_forwards += 1
        self.stats.num_tokens += num_rows
        if not pieces and num_rows <= self.decoder.max_num_rows:
            return self.decoder.forward(rows)
        self.stats.num_tokens += sum(len(piece.token_ids) for piece in pieces)
        table, block_size = self.blocks.table, self.blocks.block_size
        row_slots, positions, token_ids, query_start_loc = self._with_pieces(pieces, rows)
        starts = to_device(query_start_loc, self.model.device, torch.int32)
        bounds = np.full(num_rows, rows.num_tokens.array().max()) if rows.lengths is None else rows.lengths.array()
        bounds = np.concatenate([bounds, [piece.start + len(piece.token_ids) for piece in pieces]]).astype(np.int32)
        last = starts[1:].long() - 1  # token of each sequence
        hidden_states = self.model.forward(
            ForwardBatch(
                input_ids=token_ids,
                positions=positions,
                slot_mapping=table[row_slots, positions // block_size].long() * block_size + positions % block_size,
                query_start_loc=starts,
                query_start_loc_cpu=torch.from_numpy(query_start_loc),
                max_query_len=int(np.diff(query_start_loc).max()),
                seq_lens=(positions[last] + 1).int(),
                seq_lens_upper_bound=torch.from_numpy(bounds),
                seq_lens_known=rows.lengths is not None,
                max_seq_len=int(bounds.max()),
                block_table=table[row_slots[last]],
                adapters=self.adapters.of(chain(rows.slots, (piece.slot for piece in pieces)), row_slots),
            )
        )
        return hidden_states[:num_rows]

    def _with_pieces(
        self, pieces: list[Piece], rows: ContextRows
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
        """Rows, then the tokens of pieces: each token's context, its position, itself; and where sequences begin."""
        device, num_rows = self.model.device, rows.row_slots.shape[0]
        ends = np.cumsum([len(piece.token_ids) for piece in pieces], dtype=np.int64)
        host = np.empty((3, ends[-1] if pieces else 0), np.int64)
        for piece, end in zip(pieces, ends, strict=True):
            n = len(piece.token_ids)
            host[0, end - n : end] = piece.slot
            host[1, end - n : end] = np.arange(piece.start, piece.start + n)
            host[2, end - n : end] = piece.token_ids
        of_pieces = to_device(host, device, torch.int64)
        return (
            torch.cat([rows.row_slots, of_pieces[0]]),
            torch.cat([rows.device_positions(), of_pieces[1]]),
            torch.cat([rows.token_ids, of_pieces[2]]).int(),
            np.concatenate([np.arange(num_rows + 1), num_rows + ends]).astype(np.int32),
        )


def split(pieces: list[Piece], num_tokens: int) -> tuple[list[Piece], list[Piece]]:
    """The first ``num_tokens`` tokens of pieces, and the rest."""
    now: list[Piece] = []
    for i, piece in enumerate(pieces):
        n = len(piece.token_ids)
        if n > num_tokens:
            if num_tokens:
                now.append(Piece(piece.slot, piece.start, piece.token_ids[:num_tokens]))
            rest = Piece(piece.slot, piece.start + num_tokens, piece.token_ids[num_tokens:])
            return now, [rest, *pieces[i + 1 :]]
        now.append(piece)
        num_tokens -= n
    return now, []
