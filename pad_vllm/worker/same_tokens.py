"""Contexts of a reward model that has the base model's tokens: a composed prompt, and what the base generates.

A step has a row for each row of logits, or, of requests with several contexts, one for each of these. Where the next
step is the same, a token further, the rows of the last one only count up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from pad_vllm.reward.device import to_device
from pad_vllm.reward.engine import RewardEngine
from pad_vllm.reward.pace import Lengths
from pad_vllm.reward.rows import ContextRows, ContextSlot
from pad_vllm.worker.batch import GuidedBatch, Layout, RequestSlot, request_of
from pad_vllm.worker.contexts import RewardPrompt
from pad_vllm.worker.loading import Loaded
from pad_vllm.worker.slots import RowParams


class SameTokens:
    """:class:`~pad_vllm.worker.contexts.Contexts` in the base model's tokens.

    Args:
        loaded: the reward model.
        engine: runs it.
        num_drafts: most drafts of a request, if the reward model makes them.
        verifies: whether there are rows of drafts, whoever makes them.
    """

    def __init__(self, loaded: Loaded, engine: RewardEngine, num_slots: int, num_drafts: int, verifies: bool) -> None:
        self.engine, self.max_len = engine, loaded.model.max_model_len
        self.reads = TokenReads(loaded, verifies)
        self.drafted = DraftedStates(loaded, engine.no_slot + 1, num_slots, num_drafts) if num_drafts else None
        tokens, self.num_drafted = loaded.fit.tokens, loaded.fit.vocab_size
        unknown = [i for i in (*tokens.foreign, *tokens.no_opinion) if i < loaded.vocab_size]
        self.not_drafted = to_device(unknown, loaded.device, torch.int64) if unknown else None
        """tokens with a row that the reward model does not know"""
        self._last: LaidOut | None = None

    def read(self, prompt_ids: list[int]) -> RewardPrompt:
        return RewardPrompt(prompt_ids, len(prompt_ids))

    def own_ids(self, token_ids: list[int]) -> list[int]:
        return self.reads.of_prompt(token_ids)

    def begin(self, slot: RequestSlot, prompt_len: int, prompt: RewardPrompt) -> None:
        self.forget_drafts(slot)

    def hidden_states(self, batch: GuidedBatch, params: RowParams) -> torch.Tensor:
        if self.drafted is not None and self.drafted.has_all(batch.layout, params):
            last = self._last_drafts(batch, params)
            if last is not None:
                return self.drafted.after(self.engine.step(last), batch.layout, params)
        rows = self._rows(batch, params)
        if self.drafted is None:
            hidden_states = self.engine.step(rows)
        else:
            assert batch.local_positions is not None  # drafts are verified
            local_positions = batch.local_positions
            if params.contexts.layout_rows is not None:
                local_positions = local_positions[params.contexts.layout_rows]
            hidden_states = self.drafted.verified(self.engine, rows, batch.layout.slots, local_positions)
        if rows.is_full is not None:
            hidden_states = hidden_states.masked_fill(rows.is_full.unsqueeze(1), float("nan"))
        return hidden_states

    def key_offsets(self, batch: GuidedBatch) -> None:
        return None

    def forget_drafts(self, slots: RequestSlot | np.ndarray) -> None:
        if self.drafted is not None:
            self.drafted.num_kept[slots] = 0

    def draft_lengths(self, batch: GuidedBatch, params: RowParams, num_drafts: int) -> np.ndarray | None:
        """[C] int64: the contexts' lengths with all drafts, at most; None where the pool has no room for them."""
        contexts = params.contexts
        num_tokens = batch.num_tokens.array()
        if contexts.requests is not None:
            num_tokens = num_tokens[contexts.requests]
        num_tokens = np.minimum(num_tokens + contexts.host_offset + num_drafts, self.max_len)
        return num_tokens if self.engine.blocks.has_room(contexts.slots, num_tokens) else None

    def begin_draft(self, batch: GuidedBatch, params: RowParams, num_drafts: int) -> SameTokensDraft | None:
        contexts, token_ids, positions = params.contexts, batch.token_ids, batch.device_positions()
        num_tokens = self.draft_lengths(batch, params, num_drafts)
        if num_tokens is None:
            return None
        if contexts.layout_rows is not None:
            token_ids, positions = token_ids[contexts.layout_rows], positions[contexts.layout_rows]
        # Of a full context too, whose request verification ends.
        further = torch.arange(num_drafts, device=positions.device).unsqueeze(1)
        positions = (positions + contexts.ints.offset + further).clamp(max=self.max_len - 1)
        rows = ContextRows(
            slots=contexts.slots,
            num_tokens=Lengths(num_tokens),
            lengths=None,
            row_slots=contexts.row_slots,
            positions=positions[0],
            token_ids=self.reads.on_device(token_ids),
            history=self._history(batch),
        )
        assert self.drafted is not None  # there is a drafter
        return SameTokensDraft(self, self.drafted, rows, positions, params)

    def note_drafts(self, params: RowParams, num_drafts: int) -> None:
        """All drafts of a layout's requests were made, ``num_drafts`` of each, and their hidden states are kept."""
        assert self.drafted is not None  # there is a drafter
        self.drafted.num_kept[params.layout.slots] = num_drafts

    def _last_drafts(self, batch: GuidedBatch, params: RowParams) -> ContextRows | None:
        """The rows of the last drafts, of a batch with rows of all drafts; None where the others are not computed."""
        contexts, last_rows = params.contexts, batch.layout.last_rows
        num_tokens = batch.num_tokens.array() + contexts.host_offset
        if num_tokens.max() > self.max_len or not self.engine.blocks.holds(contexts.slots, num_tokens):
            return None
        assert last_rows is not None
        assert batch.positions is not None
        assert self.drafted is not None
        row_slots, offset = self.drafted.last_of(params)
        return ContextRows(
            slots=contexts.slots,
            num_tokens=Lengths(num_tokens),
            lengths=None,
            row_slots=row_slots,
            positions=batch.positions[last_rows] + offset,
            token_ids=self.reads.on_device(batch.token_ids[last_rows]),
            history=self._history(batch),
        )

    def draftable(self, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits = logits[:, : self.num_drafted]
        if self.not_drafted is not None:
            logits = logits.index_fill(1, self.not_drafted, float("-inf"))
        return logits, None

    def _rows(self, batch: GuidedBatch, params: RowParams) -> ContextRows:
        """The rows of a batch in the reward model's contexts: as many as its rows, or, of requests that have several,
        more."""
        contexts, token_ids = params.contexts, batch.token_ids
        if contexts.layout_rows is not None:
            token_ids = token_ids[contexts.layout_rows]
        token_ids, history = self.reads.on_device(token_ids), self._history(batch)
        if self._last is None or self._last.params is not params:
            self._last = LaidOut(params)
        last = self._last
        if last.rows is not None and last.room and batch.step == last.rows.step + 1:
            last.room -= 1
            last.rows.advance(batch.step, token_ids, history)
            return last.rows
        of_requests = batch.num_tokens.array()
        num_tokens = of_requests if contexts.requests is None else of_requests[contexts.requests]
        num_tokens = num_tokens + contexts.host_offset
        room = self.max_len - int(num_tokens.max())
        last.past_prompts |= batch.exact and bool((of_requests > params.host_prompt_len).all())
        positions = None
        if not last.past_prompts:
            positions = batch.device_positions()
            if contexts.layout_rows is not None:
                positions = positions[contexts.layout_rows]
                if not batch.exact:
                    positions = positions.masked_fill(contexts.row_slots == self.engine.no_slot, 0)
            # The composed prompt may end otherwise than the base's, from which the base samples its first token.
            token_ids = torch.where(positions < contexts.ints.prompt_len, contexts.ints.last_prompt_id, token_ids)
        rows = ContextRows(
            slots=contexts.slots,
            num_tokens=Lengths(num_tokens),
            lengths=Lengths(num_tokens) if batch.exact else None,
            row_slots=contexts.row_slots,
            positions=None if batch.exact else positions + contexts.ints.offset,
            token_ids=token_ids,
            history=history,
            step=batch.step,
        )
        if room < 0:
            rows = rows.within(self.max_len, self.engine.no_slot)
        last.rows, last.room = rows if last.past_prompts else None, max(room, 0)
        return rows

    def _history(self, batch: GuidedBatch) -> Callable[[ContextSlot], Sequence[int]]:
        return lambda slot: self.reads.on_host(batch.output_ids(request_of(slot)))


@dataclass
class LaidOut:
    """What the steps of a layout have in common."""

    params: RowParams
    past_prompts: bool = False
    """Whether every row has seen a generated token: it stays so as long as the layout does."""
    rows: ContextRows | None = None
    """Of the last step, where those of the next may be these, a token further."""
    room: int = 0
    """Tokens that the longest of these contexts may still get, as of its rows."""


class TokenReads:
    """What the reward model reads for the base's tokens: themselves, but for those that it has by another id, or not
    at all."""

    def __init__(self, loaded: Loaded, verifies: bool) -> None:
        self.base_vocab_size, self.vocab_size = loaded.base_vocab_size, loaded.vocab_size
        # Tokens beyond the shared vocabulary: of a drafter with a larger one, or of a base model padded further. Such a
        # draft or token is no candidate, so what follows it is void.
        self.may_be_beyond = verifies or self.base_vocab_size > self.vocab_size
        self.others = loaded.fit.tokens.reads
        self.table: torch.Tensor | None = None
        """[base_vocab_size] int64"""
        if self.others:
            table = torch.arange(self.base_vocab_size)
            table[list(self.others)] = torch.tensor(list(self.others.values()))
            self.table = to_device(table, loaded.device, torch.int64)

    def of_prompt(self, token_ids: list[int]) -> list[int]:
        return [self.others.get(i, i) for i in token_ids] if self.others else token_ids

    def on_host(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Of generated tokens."""
        if not self.others and not self.may_be_beyond:
            return token_ids
        return [min(self.others.get(i, i), self.vocab_size - 1) for i in token_ids]

    def on_device(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[R] int32 or int64 -> likewise."""
        if self.table is not None:
            token_ids = self.table[token_ids.clamp(0, self.base_vocab_size - 1).long()]
        return token_ids.clamp(0, self.vocab_size - 1) if self.may_be_beyond else token_ids


class DraftedStates:
    """Hidden states of the tokens from which drafts were made: verification needs them again."""

    def __init__(self, loaded: Loaded, num_contexts: int, num_slots: int, num_drafts: int) -> None:
        config = loaded.fit.model_config
        self.kept = torch.zeros(
            num_contexts, num_drafts + 1, config.get_hidden_size(), dtype=config.dtype, device=loaded.device
        )
        """[contexts, num_drafts + 1, hidden_size]; the last is the last draft's, as long as a step takes"""
        self.num_kept: np.ndarray = np.zeros(num_slots, np.int64)
        """[slots] of a request's contexts"""
        self.num_drafts = num_drafts
        self._last: tuple[RowParams, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def has_all(self, layout: Layout, params: RowParams) -> bool:
        """Whether all rows but those of the last drafts are kept."""
        has_one_context = params.contexts.layout_rows is None
        return layout.last_rows is not None and has_one_context and bool((self._num(layout) == self.num_drafts).all())

    def _num(self, layout: Layout) -> np.ndarray:
        return self.num_kept[layout.slots]

    def _of(self, params: RowParams) -> tuple[RowParams, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What follows from the layout: the slots and the offsets of the contexts of the last drafts' rows, and the
        place of every row in ``kept``, taken as [places, hidden_size]."""
        if self._last is None or self._last[0] is not params:
            contexts, last_rows = params.contexts, params.layout.last_rows
            width = self.num_drafts + 1
            each = torch.arange(len(contexts.row_slots), device=self.kept.device) % width
            places = contexts.row_slots * width + each
            self._last = params, contexts.row_slots[last_rows], contexts.ints.offset[last_rows], places
        return self._last

    def last_of(self, params: RowParams) -> tuple[torch.Tensor, torch.Tensor]:
        """[requests] int64: the slots and the offsets of the contexts of the last drafts' rows."""
        _, row_slots, offset, _ = self._of(params)
        return row_slots, offset

    def after(self, computed: torch.Tensor, layout: Layout, params: RowParams) -> torch.Tensor:
        """Hidden states of all rows, [R, hidden_size]; ``computed`` [requests, hidden_size], of the last drafts'."""
        _, row_slots, _, places = self._of(params)
        self.kept[row_slots, self.num_drafts] = computed
        return self.kept.flatten(0, 1)[places]

    def verified(
        self, engine: RewardEngine, rows: ContextRows, request_slots: np.ndarray, local_positions: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states of rows that are verified: those kept, and the last draft's, which is computed.

        Args:
            rows: of the step, R.
            request_slots: [requests] int64, whose they are.
            local_positions: [R] int64: how many drafts before each row's token, itself included.

        Returns:
            [R, hidden_size].
        """
        num_kept = int(self.num_kept[request_slots].min())
        same = num_kept == self.num_kept[request_slots].max()
        if not num_kept or not same or not engine.blocks.holds(rows.slots, rows.num_tokens.array()):
            return engine.step(rows)
        is_last = (local_positions == num_kept) & (rows.row_slots != engine.no_slot)
        where = is_last.int().argsort(descending=True, stable=True)[: len(rows.slots)]
        is_last = is_last[where]
        last = rows.select(where)
        last.row_slots = last.row_slots.where(is_last, engine.no_slot)
        last.positions = last.device_positions().where(is_last, 0)
        computed = engine.step(last)
        hidden_states = self.kept[rows.row_slots, local_positions.clamp(max=num_kept - 1)]
        hidden_states[where] = computed.where(is_last.unsqueeze(1), hidden_states[where])
        return hidden_states


class SameTokensDraft:
    """:class:`~pad_vllm.worker.contexts.Draft` in the base model's tokens; keeps hidden states for verification.

    Args:
        rows: of the requests' last tokens; their ``num_tokens`` those with all drafts.
        positions: [num_drafts, context rows] int64, of these rows and those that follow.
    """

    def __init__(
        self,
        contexts: SameTokens,
        drafted: DraftedStates,
        rows: ContextRows,
        positions: torch.Tensor,
        params: RowParams,
    ) -> None:
        self.contexts, self.drafted, self.rows, self.params = contexts, drafted, rows, params
        self.positions, self.num_made = positions, 0

    def hidden_states(self) -> torch.Tensor:
        hidden_states = self.contexts.engine.step(self.rows)
        self.drafted.kept[self.rows.row_slots, self.num_made] = hidden_states
        return hidden_states

    def extend(self, token_ids: torch.Tensor) -> None:
        self.num_made += 1
        if self.num_made == len(self.positions):
            self.contexts.note_drafts(self.params, self.num_made)
            return
        if self.params.contexts.layout_rows is not None:
            token_ids = token_ids[self.params.contexts.layout_rows]
        self.rows = replace(self.rows, positions=self.positions[self.num_made], token_ids=token_ids)
